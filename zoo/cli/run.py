"""Commands that build and train models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from zoo.accounting import ALIASES, ELEMENT_BYTES, metrics
from zoo.cli.output import console, print_json, shown
from zoo.errors import ZooError, did_you_mean
from zoo.spec.document import dump, load


def torch_dtype(name: str) -> Any:
    """The torch dtype of a name such as `bfloat16` or `bf16`."""
    import torch

    full = ALIASES.get(name, name)
    if full not in ELEMENT_BYTES:
        raise ZooError(f"unknown dtype {name!r}{did_you_mean(name, [*ELEMENT_BYTES, *ALIASES])}")
    return getattr(torch, full)


def torch_device(name: str) -> str:
    """A device to build on, checked to be there."""
    from zoo.device import resolve_device

    return name if name == "meta" else resolve_device(name).name


def build_model(name: str, device: str, dtype: str, seed: int, save: Path | None, tree: bool, as_json: bool) -> None:
    """Build a model and say what came out."""
    spec = load(name)
    place, kind = torch_device(device), torch_dtype(dtype)
    if save is not None and place == "meta":
        raise ZooError("a model on meta has no weights to save; build it on cpu or cuda")
    from zoo.model import build

    start = time.perf_counter()
    model = build(spec, device=place, dtype=kind, seed=seed)
    seconds = time.perf_counter() - start
    counted = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "name": spec.name or name,
        "hash": spec.hash,
        "device": place,
        "dtype": str(kind).removeprefix("torch."),
        "params": counted,
        "counted_params": metrics(spec)["params"],
        "seconds": seconds,
    }
    if save is not None:
        facts["saved"] = str(model.save(save))
    if as_json:
        print_json(facts)
        return
    if tree:
        print(model)
    console().print(
        f"{facts['name']}  {shown('params', counted)} parameters  {facts['dtype']} on {place}  "
        f"built in {seconds:.2f} s  hash {spec.hash}"
    )
    if save is not None:
        console().print(f"saved {save}")


def train_model(
    name: str,
    values: dict[str, Any],
    out: Path | None,
    checkpointing: bool,
    compiled: bool,
    fresh: bool,
    as_json: bool,
) -> int:
    """Train a spec; returns the exit code."""
    from zoo.train.data import load_data
    from zoo.train.fits import check_fits
    from zoo.train.settings import TrainSettings

    spec = load(name)
    settings = TrainSettings.parse({**values, "context": values["context"] or _context(spec, values["data"])})
    data = load_data(
        settings.data, context=settings.context, batch=settings.batch // settings.accumulate, seed=settings.seed
    )
    check_fits(spec, data.describe())
    folder = out or Path("runs") / f"{spec.name or Path(name).stem}-{spec.hash[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(dump(spec), encoding="utf-8")

    from zoo.model import build
    from zoo.train.loop import OtherRunError, fit
    from zoo.train.progress import live

    model = build(spec, seed=settings.seed).set_checkpointing(checkpointing)
    if compiled:
        model.compile()
    with live(spec.name or name) as progress:
        try:
            result = fit(model, settings, folder, data=data, progress=progress, resume="never" if fresh else "auto")
        except OtherRunError as error:
            remedy = "give another folder with --out, or start over with --fresh"
            raise OtherRunError(error.checkpoint, error.differences, remedy) from None
    facts = {
        "folder": str(folder),
        "steps": result.steps,
        "stopped": result.stopped,
        result.metric: result.best,
        "train_loss": result.train_loss,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "weights": str(result.weights),
    }
    if as_json:
        print_json(facts)
        return 0
    best = "not evaluated" if result.best is None else f"best {result.metric} {result.best:.4f}"
    optimum = data.describe().optimum_loss
    known = "" if optimum is None else f" (optimum loss {optimum:.4f})"
    console().print(f"{result.stopped} after {result.steps} steps, {result.seconds:.0f} s: {best}{known}  {folder}")
    return 130 if result.stopped == "interrupted" else 0


def _context(spec: Any, data: str) -> int | None:
    """The length of samples: the spec's context for text; tasks and images know their own."""
    return spec.context if data.startswith("bytes") else None


def run_search(
    space: str, values: dict[str, Any], train: dict[str, Any], out: Path | None, timeout: str | None, as_json: bool
) -> int:
    """Search a space and say what was found; returns the exit code."""
    import shlex
    import sys

    from zoo.search.live import LiveProgress
    from zoo.search.study import SearchSettings
    from zoo.search.study import run_search as run
    from zoo.train.settings import TrainSettings

    settings = SearchSettings(
        space=space,
        train=TrainSettings.parse(train),
        out=out or Path("runs") / f"search-{Path(space).stem}",
        timeout=None if timeout is None else _seconds(timeout),
        command=shlex.join(["zoo", *sys.argv[1:]]),
        **values,
    )
    with LiveProgress() as progress:
        results = run(settings, progress=progress)
    if as_json:
        print_json(results.data)
    else:
        _print_results(results)
    return 130 if results.stopped == "interrupted" else 0


def _seconds(timeout: str) -> float:
    """The time that `--timeout` gives."""
    from zoo.quantity import EXAMPLES, QuantityError, parse_quantity

    try:
        return parse_quantity(timeout, "time")
    except QuantityError as error:
        message = str(error).replace(EXAMPLES["time"], "a time such as 10min or 90s")
        raise ZooError(f"--timeout: {message}") from None


def write_report(run: Path, storage: str | None, as_json: bool) -> None:
    """Write the results of a search anew and print them."""
    from zoo.search.results import write_results

    results = write_results(run, storage)
    if as_json:
        print_json(results.data)
    else:
        _print_results(results)


def _print_results(results: Any) -> None:
    """The front as a table, whether mixing helped, and where everything is."""
    from zoo.cli.output import print_table
    from zoo.search.results import figure
    from zoo.search.results import shown as figure_shown

    figures = list(dict.fromkeys([*map(figure, results.objectives), "params"]))
    rows = [
        (str(trial.number), *(figure_shown(name, trial.metrics[name]) for name in figures), trial.baseline or "")
        for trial in results.front
    ]
    if rows:
        print_table("front", ("trial", *figures, "baseline"), rows, right=range(1, len(figures) + 1))
    for name, origin in results.data.get("latency", {}).items():
        if origin["kind"] != "measured":
            console().print(f"{name}: {origin['text']}")
    finalists = results.data["finalists"]
    if finalists:
        _print_finalists(finalists)
    mixing = results.data.get("mixing")
    if mixing:
        console().print(mixing["sentence"])
    console().print(f"{results.message}\nreport: {results.folder / 'report.html'}")


def _print_finalists(finalists: dict[str, Any]) -> None:
    """What was predicted against what was measured."""
    from zoo.cli.output import print_table
    from zoo.quantity import format_quantity
    from zoo.search.finalists import interval

    def time_of(seconds: float | None) -> str:
        return "" if seconds is None else format_quantity(seconds, "time")

    columns = ("trial", "predicted", "90% interval", "measured", "interval", "budget")
    for figure in finalists["figures"]:
        rows = [
            (
                str(row["number"]),
                time_of(row["predicted"]),
                interval(row["low"], row["high"]),
                time_of(row["measured"]),
                row["reason"] or ("inside" if row["inside"] else "outside"),
                {True: "met", False: "missed", None: ""}[row["meets"]],
            )
            for row in finalists["rows"]
            if row["figure"] == figure["figure"]
        ]
        print_table(f"finalists, {figure['figure']}", columns, rows, right=range(4))
        console().print(figure["sentence"])
