"""The model itself, measured: a training step, prefill, decoding; what each takes, against what was predicted.

Importing this imports no torch: what is asked for is checked first.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from zoo.accounting import ALIASES, Workload, figures, total
from zoo.device import Device
from zoo.errors import OutOfMemoryError, ZooError, did_you_mean, memory_explained
from zoo.hardware.profile import Profile
from zoo.hardware.roofline import roofline
from zoo.hardware.work import held_bytes
from zoo.latency import Case, Clock, Context, LatencyFigure, Timing, kept_memory, measure, pinned_threads
from zoo.quantity import finite, format_quantity

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.hardware.features import Phase as PredictedPhase
    from zoo.hardware.predictor import Held
    from zoo.hardware.samples import Sample
    from zoo.model import Model

Phase = Literal["train", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("train", "prefill", "decode")
PRECISIONS = {"float32": "32", "bfloat16": "bf16", "float16": "16"}
"""How `zoo train` computes in a dtype; it keeps parameters in float32."""
FLOPS = {"train": "train_flops", "prefill": "flops", "decode": "decode_flops"}
LOSSES = ("language_model", "classifier", "regression")
LESS_MEMORY = "A smaller --batch or shorter --seq needs less"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to measure: a phase at one length, with what was counted and predicted for it.

    tokens: of each sequence, in training and prefill; those behind which one more is decoded. handled: tokens, or
    images, that one call handles. flops: of matrix products. counted_memory: bytes held at once. bound: the least
    seconds that a profile allows, of `roofline`; the optimizer is left out. predicted, predicted_memory: what a
    predictor says.
    """

    phase: Phase
    tokens: int
    handled: int
    flops: float
    counted_memory: float
    bound: float | None = None
    predicted: LatencyFigure | None = None
    predicted_memory: Held | None = None

    @property
    def name(self) -> str:
        return f"{self.phase} {self.tokens}"


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of an item.

    memory: bytes of torch's tensors that were held at once: parameters, the state in decoding, gradients and moments in
    training, and what the call itself took. failure: why there is nothing.
    """

    item: Item
    timing: Timing | None = None
    memory: int | None = None
    failure: str | None = None

    @property
    def per_second(self) -> float | None:
        """Tokens or images a second."""
        return None if self.timing is None else self.item.handled / self.timing.median

    @property
    def flops_per_second(self) -> float | None:
        return None if self.timing is None else self.item.flops / self.timing.median

    @property
    def ratio(self) -> float | None:
        """Predicted over measured time."""
        predicted = self.item.predicted
        return None if predicted is None or self.timing is None else predicted.seconds / self.timing.median


class Forecast(Protocol):
    """Whoever predicts, such as `zoo.hardware.predictor.PredictedLatency`."""

    @property
    def phases(self) -> Collection[PredictedPhase]: ...

    def latency(self, spec: Spec, context: Context, phase: PredictedPhase) -> LatencyFigure: ...

    def held(self, spec: Spec, context: Context, phase: PredictedPhase) -> Held | None: ...


class Listener(Protocol):
    """Is told what is measured next, after `done` of `items`."""

    def __call__(self, done: int, items: int, name: str, /) -> None: ...


@dataclass(slots=True)
class Report:
    """The rows in the order of the phases; `notes` say what was left out and why."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    seq: lengths of training samples and of prefill; by default the spec's context. past: lengths behind which one more
    token is decoded; by default up to four, to the end of the context. dtype: of parameters and activations; in
    training that of the mixed precision of `zoo train`. repeats: timed runs, as in `zoo.latency.measure`.
    """

    batch: int = 1
    seq: tuple[int, ...] = ()
    past: tuple[int, ...] = ()
    dtype: str = "float32"
    phases: tuple[str, ...] = PHASES
    repeats: int = 20


def plan(
    spec: Spec,
    device: Device,
    request: Request,
    *,
    profile: Profile | None = None,
    predictor: Forecast | None = None,
) -> tuple[list[Item], list[str]]:
    """What will be measured, and notes on what of the request a spec or device has not.

    Raises `ZooError` for an unknown phase or dtype and for lengths that the spec does not take.
    """
    for phase in request.phases:
        if phase not in PHASES:
            raise ZooError(f"unknown phase {phase!r}{did_you_mean(phase, PHASES)}")
    spec = spec.fill()
    seqs, pasts = _lengths(spec, request)
    items: list[Item] = []
    notes: list[str] = []
    for phase in PHASES:
        if phase not in request.phases:
            continue
        missing = _missing(spec, phase, device, request)
        if missing is not None:
            notes.append(f"{phase}: {missing}")
            continue
        if predictor is not None and _timed_as(phase) not in predictor.phases:
            notes.append(f"{phase}: the calibration does not know it; `zoo device calibrate` makes one that does")
        lengths = pasts if phase == "decode" else seqs
        items += [_item(spec, phase, tokens, request, profile, predictor) for tokens in lengths]
    return items, notes


def bench(
    spec: Spec,
    device: Device,
    request: Request,
    *,
    profile: Profile | None = None,
    predictor: Forecast | None = None,
    progress: Listener | None = None,
    clock: Clock = time.perf_counter,
) -> Report:
    """Measure what `plan` lists, one item after the other.

    What does not fit into memory becomes a row that says so; on a CPU, where the system would end the process, nothing
    is tried that is counted to take more than there is. An interrupt ends the bench with the rows that are done.
    """
    items, notes = plan(spec, device, request, profile=profile, predictor=predictor)
    report = Report(notes=notes)
    session = _Session(spec, device, request, clock)
    try:
        for item in items:
            if progress is not None:
                progress(len(report.rows), len(items), item.name)
            report.rows.append(session.measured(item))
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def facts(report: Report, profile: Profile | None, dtype: str) -> list[dict[str, Any]]:
    """The rows as plain values, in seconds, bytes and FLOPs."""
    return [_facts(row, None if profile is None else profile.rate(dtype)) for row in report.rows]


def _facts(row: Row, rate: float | None) -> dict[str, Any]:
    item, timing, predicted = row.item, row.timing, row.item.predicted
    achieved = row.flops_per_second
    return {
        "phase": item.phase,
        "past" if item.phase == "decode" else "seq": item.tokens,
        "median": None if timing is None else timing.median,
        "low": None if timing is None else timing.low,
        "high": None if timing is None else timing.high,
        "runs": 0 if timing is None else len(timing.runs),
        "per_second": row.per_second,
        "flops": item.flops,
        "flops_per_second": achieved,
        "share_of_peak": None if achieved is None or rate is None else achieved / rate,
        "memory": row.memory,
        "counted_memory": item.counted_memory,
        "bound": item.bound,
        "predicted": None if predicted is None else _interval(asdict(predicted)),
        "predicted_memory": None if item.predicted_memory is None else _interval(item.predicted_memory._asdict()),
        "ratio": row.ratio,
        "failure": row.failure,
    }


def _interval(figure: dict[str, Any]) -> dict[str, Any]:
    """A figure whose interval has None for an end that is not known."""
    return {**figure, "high": finite(figure["high"])}


def _lengths(spec: Spec, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of samples and of pasts, checked."""
    fixed = fixed_tokens(spec)
    context = spec.context
    if fixed is not None:
        if request.seq not in ((), (fixed,)):
            raise ZooError(f"seq: a sample of this spec always has {fixed} tokens; leave it out")
        return (fixed,), ()
    for name, lengths, least, most in (("seq", request.seq, 1, context), ("past", request.past, 0, context - 1)):
        for length in lengths:
            if not least <= length <= most:
                why = "" if name == "seq" else " less the token that is decoded"
                raise ZooError(f"{name}: expected {least} to {most}, the spec's context{why}; got {length}")
    return request.seq or (context,), request.past or default_pasts(context)


def default_pasts(context: int) -> tuple[int, ...]:
    """Up to four lengths, each four times the one before, the last one token short of the context."""
    return tuple(sorted({length for length in (context // 64, context // 16, context // 4, context - 1) if length > 0}))


def fixed_tokens(spec: Spec) -> int | None:
    """The tokens of every sample where they lie in a grid or behind others of the model's own; None for sequences."""
    entry = spec.stem.out(spec.root())
    return None if entry.prefix == 0 and len(entry.grid) == 1 else entry.tokens


def _timed_as(phase: Phase) -> PredictedPhase:
    """A phase by the name that predictors and rooflines know it by."""
    return "forward" if phase == "prefill" else phase


def _missing(spec: Spec, phase: Phase, device: Device, request: Request) -> str | None:
    """Why a phase cannot be measured, or None."""
    head = getattr(spec.head, "kind", "other")
    if phase == "decode":
        if head != "language_model":
            return f"a {head} has none"
        stateless = {part.type: None for _, part, _ in spec.walk(spec.root()) if not part.traits.streaming}
        return f"{' and '.join(stateless)} cannot go on from a state" if stateless else None
    if phase == "train":
        dtype = ALIASES.get(request.dtype, request.dtype)
        if head not in LOSSES:
            return f"no loss belongs to the head {spec.head.type}"
        if dtype not in PRECISIONS:
            return f"`zoo train` computes in {', '.join(PRECISIONS)}; not in {dtype}"
        if dtype == "float16" and device.kind == "cpu":
            return "float16 needs a GPU; bfloat16 trains on the CPU"
    return None


def _item(
    spec: Spec,
    phase: Phase,
    tokens: int,
    request: Request,
    profile: Profile | None,
    predictor: Forecast | None,
) -> Item:
    dtype = ALIASES.get(request.dtype, request.dtype)
    decoding = phase == "decode"
    work = Workload(request.batch, 1 if decoding else tokens, tokens if decoding else 0, dtype)
    timed = _timed_as(phase)
    flops = figures(total(spec, work), work)[FLOPS[phase]]
    bound = None if profile is None else sum(part.seconds for part in roofline(spec, work, profile, timed))
    context = Context(request.batch, tokens, tokens, dtype)
    predicted = held = None
    if predictor is not None and timed in predictor.phases:
        predicted, held = predictor.latency(spec, context, timed), predictor.held(spec, context, timed)
    images = fixed_tokens(spec) is not None
    handled = request.batch * (1 if decoding or images else tokens)
    return Item(phase, tokens, handled, flops, held_bytes(spec, work, timed), bound, predicted, held)


def trainer(device: Device, dtype: str) -> Callable[[Sample], Case | None]:
    """Makes steps of training in a dtype, as they are measured here; none of what has no loss or cannot be trained."""

    def case(sample: Sample) -> Case | None:
        if _missing(sample.spec, "train", device, Request(dtype=dtype)) is not None:
            return None
        import torch

        from zoo.model import build
        from zoo.train.case import training_case

        model = build(sample.spec, device=device.name, dtype=torch.float32)
        return training_case(model, sample.batch, sample.tokens, PRECISIONS[ALIASES.get(dtype, dtype)])

    return case


class _Session:
    """Builds models and measures them; passes without gradients share one model."""

    def __init__(self, spec: Spec, device: Device, request: Request, clock: Clock) -> None:
        self.spec = spec
        self.device = device
        self.request = request
        self.dtype = ALIASES.get(request.dtype, request.dtype)
        self.clock = clock
        self._shared: tuple[Model, int] | None = None

    def measured(self, item: Item) -> Row:
        """The row of an item."""
        have = self.device.memory
        if self.device.kind == "cpu" and have is not None and item.counted_memory > have:
            sizes = [format_quantity(size, "bytes") for size in (item.counted_memory, have)]
            return Row(item, failure=f"out of memory: counted to take {sizes[0]} of {sizes[1]}")
        try:
            with (
                kept_memory(),
                pinned_threads(self.device.threads),
                memory_explained(f"measuring {item.name}", LESS_MEMORY),
            ):
                return self._measured(item)
        except OutOfMemoryError as error:
            # The error's traceback holds what filled the memory.
            failure = str(error)
        gc.collect()
        if self.device.kind == "cuda":
            import torch

            torch.cuda.empty_cache()
        return Row(item, failure=failure)

    def _measured(self, item: Item) -> Row:
        import torch

        from zoo.hardware.memory import kept_bytes, peak_bytes

        training = item.phase == "train"
        model, held = (None, 0) if training else self._model()
        with torch.inference_mode(not training):
            case, kept = kept_bytes(lambda: self._ready(item, model), self.device)
            peak = peak_bytes(case, self.device)
        # By now the case has run three times.
        timing = measure(
            {item.name: case}, device=self.device, repeats=self.request.repeats, warmup=1, clock=self.clock
        )[item.name]
        return Row(item, timing, held + kept + peak)

    def _ready(self, item: Item, model: Model | None) -> Case:
        """The case of an item that has run once, so that everything which lasts is there."""
        batch = self.request.batch
        if model is None:
            import torch

            from zoo.train.case import training_case

            case = training_case(self._build(torch.float32), batch, item.tokens, PRECISIONS[self.dtype])
        elif item.phase == "prefill":
            case = model.forward_case(batch, item.tokens)
        else:
            case = model.decode_case(batch, item.tokens)
        case()
        return case

    def _model(self) -> tuple[Model, int]:
        """The model for passes without gradients, and its bytes."""
        if self._shared is None:
            import torch

            from zoo.hardware.memory import kept_bytes

            kind = getattr(torch, self.dtype)
            self._shared = kept_bytes(lambda: self._build(kind).eval(), self.device)
        return self._shared

    def _build(self, dtype: Any) -> Model:
        from zoo.model import build

        return build(self.spec, device=self.device.name, dtype=dtype)
