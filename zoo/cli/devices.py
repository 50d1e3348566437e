"""Commands about devices: what is known of them, and what the one at hand can do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, destination, print_json, print_table
from zoo.errors import ZooError, did_you_mean
from zoo.quantity import format_quantity

if TYPE_CHECKING:
    from zoo.hardware.calibrate import Pool
    from zoo.hardware.features import Phase
    from zoo.hardware.predictor import Predictor
    from zoo.hardware.profile import Profile
    from zoo.hardware.regression import Regression

_PHASES: tuple[Phase, ...] = ("forward", "decode", "train")


def list_devices(as_json: bool) -> None:
    """Print the devices whose figures are shipped, and all calibrations, shipped and one's own."""
    from zoo.hardware.profile import load_profile, profile_names
    from zoo.hardware.store import calibrations, threads_here

    profiles = [load_profile(name) for name in profile_names()]
    here = threads_here("cpu")
    found = [_calibration(path, predictor, here) for path, predictor in calibrations()]
    if as_json:
        print_json({"devices": [_facts(profile) for profile in profiles], "calibrations": found})
        return
    rows = [
        (
            profile.name,
            f"{format_quantity(profile.rate('bfloat16'), 'flops')}/s",
            f"{format_quantity(profile.bandwidth, 'bytes')}/s",
            format_quantity(profile.memory, "bytes"),
            profile.source,
        )
        for profile in profiles
    ]
    print_table("", ("device", "bfloat16", "bandwidth", "memory", "figures"), rows, right=(1, 2, 3))
    table = [
        (
            one["name"],
            f"{one['dtype']}, {_whose(one)}, {one['made'][:10]}",
            *(f"{one['phases'][phase]['error']:.1%}" if phase in one["phases"] else "" for phase in _PHASES),
        )
        for one in found
    ]
    if table:
        columns = ("calibrated", "", *_PHASES)
        print_table("mean error on models that the fit has not seen", columns, table, right=(2, 3, 4))


def _whose(calibration: Mapping[str, Any]) -> str:
    """Whether a calibration is shipped, and for how many threads of this machine it is, if any."""
    threads = f" for --threads {calibration['threads']}" if calibration["threads"] else ""
    return ("shipped" if calibration["shipped"] else "yours") + threads


def show_device(name: str, costs: bool, as_json: bool) -> None:
    """Print what is known of a device, as the file that says so, how good its calibrations are, and what they found."""
    from zoo.hardware.store import threads_here

    profile, found = _looked_up(name)
    here = threads_here("cpu")
    facts = [_calibration(path, predictor, here) for path, predictor in found]
    if as_json:
        for (_, predictor), fact in zip(found, facts, strict=True):
            fact |= {"costs": {phase: _costs(predictor, phase) for phase in predictor.regressions}} if costs else {}
        print_json({**_facts(profile), "calibrations": facts})
        return
    console().print(profile.as_yaml(), end="", markup=False, highlight=False, soft_wrap=True)
    for (path, predictor), fact in zip(found, facts, strict=True):
        made = ", ".join(f"{key} {value}" for key, value in predictor.made.items() if key != "samples")
        console().print(f"\n{path}\n{_whose(fact)}; {made}", markup=False, highlight=False, soft_wrap=True)
        _print_accuracy(predictor, f"{predictor.dtype}: error on models that the fit has not seen")
        for phase in predictor.regressions if costs else ():
            _print_costs(predictor, phase)


def _looked_up(name: str) -> tuple[Profile, list[tuple[Path, Predictor]]]:
    """A device by its name or file, and the calibrations of it that there are."""
    from zoo.device import is_here
    from zoo.hardware.predictor import load_predictor
    from zoo.hardware.profile import load_profile, profile_names
    from zoo.hardware.store import calibrations, threads_here

    if name.endswith(".json"):
        predictor = load_predictor(Path(name))
        return predictor.profile, [(Path(name), predictor)]
    here = threads_here(name) if is_here(name) else {}
    stored = list(calibrations())
    found = [
        (path, predictor) for path, predictor in stored if predictor.device in here or predictor.profile.name == name
    ]
    if is_here(name) and not found:
        raise ZooError(f"{name} has no calibration; `zoo device calibrate` makes one, `zoo device probe` peak figures")
    if found:
        return found[0][1].profile, found
    if Path(name).suffix not in (".yaml", ".yml") and name not in profile_names():
        known = ["cpu", "cuda", *profile_names(), *(predictor.profile.name for _, predictor in stored)]
        raise ZooError(f"unknown device {name!r}{did_you_mean(name, known)}")
    return load_profile(name), found


def _calibration(path: Path, predictor: Predictor, here: Mapping[str, int]) -> dict[str, Any]:
    """What there is to say of a calibration: whose it is, for how many threads of this machine, and how good."""
    from zoo.hardware.store import folder

    return {
        "name": predictor.profile.name,
        "dtype": predictor.dtype,
        "file": str(path),
        "shipped": path.parent != folder(),
        "threads": here.get(predictor.device),
        "made": predictor.made.get("date", ""),
        "phases": _accuracy(predictor.regressions),
        "memory": _accuracy(predictor.memory),
    }


def _print_accuracy(predictor: Predictor, title: str) -> None:
    rows = [
        (f"{what}{phase}", str(found["samples"]), f"{found['error']:.1%}", f"{low - 1:+.1%} to {high - 1:+.1%}")
        for what, regressions in (("", predictor.regressions), ("memory, ", predictor.memory))
        for phase, found in _accuracy(regressions).items()
        for low, high in [found["interval"]]
    ]
    print_table(title, ("phase", "models", "mean error", "90% of them within"), rows, right=(1, 2))


def _print_costs(predictor: Predictor, phase: Phase) -> None:
    """What a unit of work costs in a phase, and how sure that is; more than the cost itself is not told from others."""
    rows = [
        (name, format_quantity(cost, "time"), f"{deviation / cost:.0%}" if deviation <= cost else "not told apart")
        for name, (cost, deviation) in _costs(predictor, phase).items()
    ]
    print_table(f"{phase}: what one costs of", ("", "seconds", "standard error"), rows, right=(1, 2))


def _costs(predictor: Predictor, phase: Phase) -> dict[str, tuple[float, float]]:
    """Seconds of a unit of each feature that costs something, and the standard deviation of these."""
    found = predictor.regressions[phase]
    deviations = found.covariance.diagonal() ** 0.5
    rows = zip(found.names, found.coefficients.tolist(), deviations.tolist(), strict=True)
    return {name: (cost, deviation) for name, cost, deviation in rows if cost > 0}


def probe_device(device: str, threads: int | None, out: Path | None, as_json: bool) -> None:
    """Measure a device of this machine and print or write its file."""
    from zoo.device import resolve_device
    from zoo.hardware.probe import probe

    if out is not None:
        destination(out)
    found = probe(resolve_device(device, threads))
    if out is not None:
        out.write_text(found.as_yaml(), encoding="utf-8")
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
    path, log = destination(out) if out is not None else calibration_path(place, dtype), log_path(place, dtype)
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
            print(f"what was timed is in {log}; the same command goes on with it", file=sys.stderr)
            raise
    predictor.save(path)
    log.unlink(missing_ok=True)
    if as_json:
        facts = {"phases": _accuracy(predictor.regressions), "memory": _accuracy(predictor.memory)}
        print_json({"file": str(path), "device": str(place), "made": dict(predictor.made), **facts})
        return
    _print_accuracy(predictor, f"{place}: error on models that the fit has not seen")
    console().print(f"wrote {path}", soft_wrap=True)


def _accuracy(regressions: Mapping[Phase, Regression]) -> dict[Phase, dict[str, Any]]:
    """How far predictions of each phase may be trusted."""
    from zoo.hardware.predictor import COVERAGE

    return {
        phase: {"samples": len(found.errors), "error": found.error, "interval": found.interval(COVERAGE)}
        for phase, found in regressions.items()
    }


def _drawn_from(name: str, dtype: str) -> Pool:
    """Samples drawn from a space, for a calibration that is to be best there."""
    import random

    from zoo.errors import SpecError
    from zoo.hardware.calibrate import Pool
    from zoo.hardware.samples import BATCHES, LENGTHS, Sample
    from zoo.search.space import load_space

    space, rng = load_space(name), random.Random(0)

    def samples() -> Iterator[Sample]:
        while True:
            try:
                spec = space.spec_at(space.sample(rng))
            except SpecError:
                continue
            lengths = [length for length in LENGTHS if length <= spec.context] if spec.root().causal else []
            tokens, past = rng.choices(lengths or [spec.context], k=2)
            yield Sample(spec, rng.choice(BATCHES), tokens, min(past, spec.context - 1), True, dtype)

    return Pool(space.hash, samples())


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
