"""Commands about devices: what is known of them, and what the one at hand can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, print_json, print_table
from zoo.errors import ZooError
from zoo.quantity import format_quantity

if TYPE_CHECKING:
    from zoo.hardware.features import Phase
    from zoo.hardware.regression import Regression


def list_devices(as_json: bool) -> None:
    """Print the devices whose figures are shipped, and in which dtypes they were calibrated."""
    from zoo.hardware.profile import load_profile, profile_names
    from zoo.hardware.store import calibrations

    found = [load_profile(name) for name in profile_names()]
    dtypes: dict[str, set[str]] = {}
    for _, predictor in calibrations():
        dtypes.setdefault(predictor.profile.name, set()).add(predictor.dtype)
    calibrated = {profile.name: sorted(dtypes.get(profile.name, ())) for profile in found}
    if as_json:
        print_json([_facts(profile) | {"calibrated": calibrated[profile.name]} for profile in found])
        return
    rows = [
        (
            profile.name,
            profile.title,
            f"{format_quantity(profile.rate('bfloat16'), 'flops')}/s",
            f"{format_quantity(profile.bandwidth, 'bytes')}/s",
            format_quantity(profile.memory, "bytes"),
            profile.source,
            ", ".join(calibrated[profile.name]),
        )
        for profile in found
    ]
    columns = ("name", "device", "bfloat16", "bandwidth", "memory", "figures", "calibrated")
    print_table("", columns, rows, right=(2, 3, 4))


def show_device(name: str, as_json: bool) -> None:
    """Print what is known of a device, as the file that says so."""
    from zoo.hardware.profile import load_profile

    profile = load_profile(name)
    if as_json:
        print_json(_facts(profile))
        return
    console().print(profile.as_yaml(), end="", markup=False, highlight=False, soft_wrap=True)
    for source in profile.sources:
        console().print(f"# {source}", markup=False, highlight=False, soft_wrap=True)


def probe_device(device: str, threads: int | None, out: Path | None, as_json: bool) -> None:
    """Measure a device of this machine and print or write its file."""
    from zoo.device import resolve_device
    from zoo.hardware.probe import probe

    found = probe(resolve_device(device, threads))
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found.as_yaml(), encoding="utf-8")
        except OSError as error:
            raise ZooError(f"cannot write {out}: {error.strerror or error}") from None
    if as_json:
        print_json(_facts(found))
    else:
        console().print(found.as_yaml(), end="", markup=False, highlight=False, soft_wrap=True)


def calibrate_device(
    device: str,
    dtype: str,
    threads: int | None,
    seconds: float,
    prior: str | None,
    space: str | None,
    profile: str | None,
    fresh: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time models on a device of this machine and keep what predicts others; goes on with one that was interrupted."""
    from zoo.accounting import ALIASES
    from zoo.device import resolve_device
    from zoo.hardware.calibrate import calibrate
    from zoo.hardware.probe import probe
    from zoo.hardware.profile import load_profile
    from zoo.hardware.stopwatch import DeviceStopwatch
    from zoo.hardware.store import calibration_path, find_predictor, log_path
    from zoo.train.bench import trainer

    place, dtype = resolve_device(device, threads), ALIASES.get(dtype, dtype)
    before = None if prior is None else find_predictor(prior, dtype)
    known = None if profile is None else load_profile(profile)
    if known is not None and known.kind != place.kind:
        raise ZooError(f"--profile: {known.name} is a {known.kind} device, {place} is not")
    path, log = out or calibration_path(place, dtype), log_path(place, dtype)
    if fresh:
        log.unlink(missing_ok=True)
    pool = None if space is None else _drawn_from(space, dtype)
    with _progress() as tell:
        try:
            predictor = calibrate(
                DeviceStopwatch(place, trainer(place, dtype)),
                known or probe(place),
                log,
                dtype=dtype,
                seconds=seconds,
                prior=before,
                pool=pool,
                tell=tell,
            )
        except KeyboardInterrupt:
            raise ZooError(f"interrupted; the same command goes on, what was timed is in {log}") from None
    predictor.save(path)
    log.unlink(missing_ok=True)
    if as_json:
        facts = {"phases": _accuracy(predictor.regressions), "memory": _accuracy(predictor.memory)}
        print_json({"file": str(path), "device": str(place), "made": dict(predictor.made), **facts})
        return
    rows = [
        (f"{what}{phase}", str(found["samples"]), f"{found['error']:.1%}", f"{low - 1:+.1%} to {high - 1:+.1%}")
        for what, regressions in (("", predictor.regressions), ("memory, ", predictor.memory))
        for phase, found in _accuracy(regressions).items()
        for low, high in [found["interval"]]
    ]
    title = f"{place}: error on models that the fit has not seen"
    print_table(title, ("phase", "models", "mean error", "90% of them within"), rows, right=(1, 2))
    console().print(f"wrote {path}", soft_wrap=True)


def _accuracy(regressions: Mapping[Phase, Regression]) -> dict[Phase, dict[str, Any]]:
    """How far predictions of each phase may be trusted."""
    from zoo.hardware.predictor import COVERAGE

    return {
        phase: {"samples": len(found.errors), "error": found.error, "interval": found.interval(COVERAGE)}
        for phase, found in regressions.items()
    }


def _drawn_from(name: str, dtype: str) -> Iterator[Any]:
    """Samples drawn from a space, for a calibration that is to be best there."""
    import random

    from zoo.errors import SpecError
    from zoo.hardware.samples import BATCHES, LENGTHS, Sample
    from zoo.search.space import load_space

    space, rng = load_space(name), random.Random(0)
    while True:
        try:
            spec = space.spec_at(space.sample(rng))
        except SpecError:
            continue
        lengths = [length for length in LENGTHS if length <= spec.context] if spec.root().causal else []
        tokens, past = rng.choices(lengths or [spec.context], k=2)
        yield Sample(spec, rng.choice(BATCHES), tokens, min(past, spec.context - 1), True, dtype)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """A bar on the terminal: seconds spent, models timed, and what the sentinel says of the machine."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("calibrating", total=None, said="")

        def tell(step: Any) -> None:
            said = f"{step.samples} models, machine within {step.deviation:.0%}"
            bar.update(task, total=step.seconds, completed=step.spent, said=said)

        yield tell


def _facts(profile: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(profile).items() if value is not None}
