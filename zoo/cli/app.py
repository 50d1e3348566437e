"""All commands and their options. Each imports what it needs when it runs, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="zoo",
    help="Specs in YAML become PyTorch models; specs with holes become architecture searches under budgets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _spec_names(incomplete: str) -> list[str]:
    from zoo.spec.document import spec_names

    return [name for name in spec_names() if name.startswith(incomplete)]


def _print_version(wanted: bool) -> None:
    if wanted:
        import zoo

        typer.echo(f"zoo {zoo.__version__}")
        raise typer.Exit


SpecArgument = Annotated[
    str, typer.Argument(help="A spec file, or the name of a shipped spec.", autocompletion=_spec_names)
]
SpaceArgument = Annotated[
    str, typer.Argument(help="A spec with holes: a file, or the name of a shipped space.", autocompletion=_spec_names)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences or images at once.")]
Seq = Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence; by default the spec's context.")]
Past = Annotated[int | None, typer.Option(min=0, help="Tokens behind which one more is decoded; by default --seq.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides every random draw.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all cores.")]


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Only names that match, for example 'mamba*'.")] = "*",
    role: Annotated[str | None, typer.Option(help="Only components of this role, or 'spec'.")] = None,
    json: Json = False,
) -> None:
    """List components and shipped specs."""
    from zoo.cli.facts import list_entries

    list_entries(pattern, role, json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A component's type, a shipped spec, or a file.")],
    canonical: Annotated[bool, typer.Option(help="Print the spec with every default spelled out.")] = False,
    json: Json = False,
) -> None:
    """Explain a component, or print a spec or space and its figures."""
    from zoo.cli.facts import show_entry

    show_entry(name, canonical, json)


@app.command()
def validate(
    names: Annotated[
        list[str] | None, typer.Argument(help="Files, folders or names; by default all shipped specs.")
    ] = None,
    json: Json = False,
) -> None:
    """Check specs and spaces: every problem with its line, and counts against published figures."""
    from zoo.cli.facts import validate_all

    raise typer.Exit(validate_all(names or [], json))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="Write to this file in place of the terminal.")] = None,
) -> None:
    """Write the JSON Schema with which editors complete and check specs."""
    from zoo.cli.facts import write_schema

    write_schema(out)


@app.command()
def cost(
    spec: SpecArgument,
    batch: Batch = 1,
    seq: Seq = None,
    past: Past = None,
    dtype: Dtype = "float32",
    layers: Annotated[
        bool | None,
        typer.Option("--layers/--no-layers", help="A row for each part of the model; by default where it is timed."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Also the time there: cpu, cuda or cuda:N, one of `zoo device list`, or a file. Predicted where it is "
            "calibrated, else bounded by its roofline, unless the options below say."
        ),
    ] = None,
    predict: Annotated[
        bool, typer.Option(help="The time on --device, or cpu, that its calibration predicts; nothing is built.")
    ] = False,
    measure: Annotated[bool, typer.Option(help="Build the model and time it on --device, or cpu.")] = False,
    threads: Threads = None,
    roofline: Annotated[
        str | None, typer.Option(help="Also the least time on a device, see `zoo device list`; nothing is built.")
    ] = None,
    picture: Annotated[
        bool | None,
        typer.Option(
            "--picture/--no-picture", help="Draw the device's roofline below the tables; by default on a terminal."
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Draw with ASCII alone, as where there is no UTF-8.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the picture of the device's roofline to this file.")] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="The least time on so many of --device, such as 8 or 4x4x4, and the best layout."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="What weights are stored in, such as int8 or int4; by default --dtype.")
    ] = None,
    detail: Annotated[
        bool,
        typer.Option(help="Also parameters by part and axis, weights by what they are stored in, states by tensor."),
    ] = False,
    json: Json = False,
) -> None:
    """Count parameters, FLOPs, bytes and state from the specification alone; on request also times on a device."""
    from zoo.accounting import Workload
    from zoo.cli.bounds import Drawing, OnMesh
    from zoo.cli.cost import Sources, print_cost

    meshed = OnMesh.asked(device, mesh, weights, predict or measure)
    sources = Sources.asked(
        device, threads, dtype, roofline=roofline, predict=predict, measure=measure, mesh=mesh is not None
    )
    drawing = Drawing.asked(sources.roof, picture, plain, svg, json)
    print_cost(
        spec,
        Workload(batch, seq, past, dtype),
        sources,
        weights=weights,
        layers=layers,
        detail=detail,
        drawing=drawing,
        mesh=meshed,
        as_json=json,
    )


@app.command()
def bench(
    spec: SpecArgument,
    device: Device = "cpu",
    batch: Batch = 1,
    seq: Annotated[
        str | None, typer.Option(help="Lengths to train and prefill, such as 128,512; by default the spec's context.")
    ] = None,
    past: Annotated[
        str | None, typer.Option(help="Tokens behind which one more is decoded, such as 0,512; by default up to four.")
    ] = None,
    dtype: Dtype = "float32",
    phases: Annotated[str, typer.Option(help="What to measure.")] = "train,prefill,decode",
    predict: Annotated[bool, typer.Option(help="Also the latency that this device's calibration predicts.")] = False,
    roofline: Annotated[
        str | None, typer.Option(help="Also the least time on a device and the share of its peak; see `zoo device`.")
    ] = None,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each, more of quick ones.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure a model: training step, prefill, decoding and peak memory, against what was counted and predicted."""
    from zoo.cli.bench import bench_model

    raise typer.Exit(
        bench_model(spec, device, batch, seq, past, dtype, phases, predict, roofline, threads, repeats, out, json)
    )


@app.command()
def build(
    spec: SpecArgument,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or meta to allocate nothing.")] = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write weights and spec to this safetensors file.")] = None,
    tree: Annotated[bool, typer.Option(help="Print the tree of modules.")] = False,
    json: Json = False,
) -> None:
    """Build the PyTorch model of a spec."""
    from zoo.cli.run import build_model

    build_model(spec, device, dtype, seed, save, tree, json)


@app.command()
def train(
    spec: SpecArgument,
    data: Annotated[str, typer.Option(help="bytes:stdlib, bytes:PATH, digits, copy, recall or selective_copy.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same again continues it.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts that a batch is cut into, to save memory.")] = 1,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample; by default the spec's.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Decoupled decay, where it belongs.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Highest norm of the gradient; 0 for none.")] = 1.0,
    precision: Annotated[str, typer.Option(help="32, bf16 or 16.")] = "32",
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many evaluations without a new best.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Recompute layers in the backward pass, to save memory.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile the model with torch.compile first.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard logs.")] = False,
    fresh: Annotated[bool, typer.Option(help="Start over where the folder holds a run.")] = False,
    json: Json = False,
) -> None:
    """Train a spec on a data set."""
    from zoo.cli.run import train_model

    settings = {
        "data": data,
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "context": context,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_share": warmup,
        "weight_decay": weight_decay,
        "clip": clip or None,
        "precision": precision,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "checkpoint_every": checkpoint_every,
        "device": device,
        "threads": threads,
        "seed": seed,
        "tensorboard": tensorboard,
    }
    raise typer.Exit(train_model(spec, settings, out, checkpointing, compile, fresh, json))


kernels = typer.Typer(help="Show which implementation of each primitive runs on a device, and why.")
app.add_typer(kernels, name="kernels")


@kernels.callback(invoke_without_command=True)
def _kernels(context: typer.Context, device: Device = "cpu", dtype: Dtype = "float32", json: Json = False) -> None:
    """Show for each primitive which implementation runs on a device, and why the others do not."""
    from zoo.cli.facts import print_kernels

    if context.invoked_subcommand is None:
        print_kernels(device, dtype, json)


@kernels.command()
def explain(
    spec: SpecArgument,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    seq: Seq = None,
    json: Json = False,
) -> None:
    """Show what each call of a model would run, and what every other implementation says against it."""
    from zoo.cli.facts import print_choices

    print_choices(spec, device, dtype, batch, seq, json)


@kernels.command("bench")
def bench_(json: Json = False) -> None:
    """Print the timings of the kernels on GPUs that are recorded with this package."""
    from zoo.cli.facts import print_kernel_timings

    print_kernel_timings(json)


device = typer.Typer(help="Show what devices can do, and measure the one at hand.", no_args_is_help=True)
app.add_typer(device, name="device")


@device.command("list")
def list_devices(json: Json = False) -> None:
    """List the devices whose figures are shipped, and the calibrations, yours among them."""
    from zoo.cli.devices import list_devices

    list_devices(json)


@device.command("show")
def show_device(
    name: Annotated[str, typer.Argument(help="A shipped or calibrated device, cpu or cuda, or a file.")],
    costs: Annotated[bool, typer.Option(help="Also what a unit of each kind of work was found to cost.")] = False,
    json: Json = False,
) -> None:
    """Show the peak figures of a device, and how far its calibrations can be trusted."""
    from zoo.cli.devices import show_device

    show_device(name, costs, json)


@device.command("probe")
def probe_device(
    device: Device = "cpu",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="Write the device's file there.")] = None,
    json: Json = False,
) -> None:
    """Measure matrix rates, copy bandwidth and launch overhead of this machine; takes some seconds."""
    from zoo.cli.devices import probe_device

    probe_device(device, threads, out, json)


@device.command("calibrate")
def calibrate_device(
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time to spend on timing, beside the half minute of probing and fitting.")
    ] = 255.0,
    prior: Annotated[
        str | None, typer.Option(help="Another device's calibration, with which ten models are a start.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Draw half of the models from this space: best for searching it.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="The device's name and peak figures, a file as `probe` writes it; probed by default."),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Forget what an interrupted calibration has timed.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the calibration there.")] = None,
    json: Json = False,
) -> None:
    """Time some hundred small models on this machine, so that latencies of others can be predicted."""
    from zoo.cli.devices import calibrate_device

    calibrate_device(device, dtype, threads, seconds, prior, space, profile, fresh, out, json)


@app.command()
def search(
    space: Annotated[
        str, typer.Argument(help="A spec with holes: a file or a shipped name.", autocompletion=_spec_names)
    ],
    data: Annotated[str, typer.Option(help="What candidates are trained on; as for `zoo train`.")] = "bytes:stdlib",
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Bounds such as 'params<=2M latency<=15ms@cpu{seq=256}'; may be given several times."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Candidates to train, those of earlier sessions included.")] = 40,
    objective: Annotated[
        str, typer.Option(help="One figure, or several with commas: loss, accuracy, bits_per_byte, latency, params ...")
    ] = "loss",
    sampler: Annotated[str, typer.Option(help="evolution, tpe, nsga2, gp or random.")] = "evolution",
    pruner: Annotated[str, typer.Option(help="none, median or halving; for one objective.")] = "none",
    latency: Annotated[
        str, typer.Option(help="measured, or predicted from `zoo device calibrate` and measured for the finalists.")
    ] = "measured",
    storage: Annotated[
        str | None, typer.Option(help="An Optuna storage URL; by default one file in the run's folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same command again continues it.")] = None,
    fresh: Annotated[bool, typer.Option(help="Start over where the folder holds a search.")] = False,
    timeout: Annotated[str | None, typer.Option(help="Start no candidate after this time, for example 10min.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps for each candidate.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample; by default the spec's.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant.")] = "cosine",
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.")] = None,
    precision: Annotated[str, typer.Option(help="32, bf16 or 16.")] = "32",
    device: Annotated[str, typer.Option(help="Where candidates are trained, and timed unless a bound says.")] = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Search a space under a budget; leaves the front as specs, best.yaml and report.html."""
    from zoo.cli.run import run_search

    train = {
        "data": data,
        "steps": steps,
        "batch": batch,
        "context": context,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "evaluate_every": evaluate_every,
        "precision": precision,
        "device": device,
        "threads": threads,
        "seed": seed,
    }
    search = {
        "budget": " ".join(budget or []),
        "trials": trials,
        "objective": objective,
        "sampler": sampler,
        "pruner": pruner,
        "latency": latency,
        "storage": storage,
        "fresh": fresh,
        "device": device,
        "seed": seed,
    }
    raise typer.Exit(run_search(space, search, train, out, timeout, json))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a search.")],
    storage: Annotated[str | None, typer.Option(help="The storage URL that the search was given, if any.")] = None,
    json: Json = False,
) -> None:
    """Write the results of a search anew: results.json, best.yaml, the front and report.html."""
    from zoo.cli.run import write_report

    write_report(run, storage, json)
