"""Which implementation each call of a model would run, and why not another: the model runs on `meta` and is watched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zoo.kernels.dispatch import Call, Primitive, as_dtype, chosen, device_kind, observed, use
from zoo.model import build

if TYPE_CHECKING:
    from zoo.blocks.model import Spec


@dataclass(frozen=True, slots=True)
class Choice:
    """Calls of a primitive that are alike: in which phase, how many, what runs, and what the others say.

    refusals: by implementation, those that do not serve and why; an implementation that could serve but comes later in
    the order, or was not chosen, is not among them. runs: None if nothing serves.
    """

    phase: str
    primitive: str
    count: int
    facts: Mapping[str, Any]
    runs: str | None
    refusals: Mapping[str, str]


def choices(
    spec: Spec, device: str = "cpu", dtype: str | torch.dtype = "float32", *, batch: int = 1, tokens: int | None = None
) -> list[Choice]:
    """What a forward pass and, for a language model, the decoding of a sequence's last token would run on a device.

    For CUDA where there is none, the answer is that of a device that kernels support.

    `tokens` is the length of the sequence, the spec's context if None. Raises `ZooError` for an unknown device or
    dtype.
    """
    kind = device_kind(device)
    # Free of the spec's own choices, which could not serve on `meta`.
    model = build(spec.model_copy(update={"kernels": ()}), device="meta", dtype=as_dtype(dtype))
    tokens = spec.context if tokens is None else tokens
    phases = {"forward": model.forward_case(batch, tokens)}
    if model.head_kind == "language_model":
        phases["decode"] = model.decode_case(batch, tokens - 1)
    found: list[Choice] = []
    for phase, run in phases.items():
        with torch.no_grad(), observed() as notes:
            run()
        with use(**spec.kernel_choices):
            found += _grouped(
                phase, [(primitive, call._replace(device=kind, supposed=True)) for primitive, call in notes]
            )
    return found


def _grouped(phase: str, calls: list[tuple[Primitive, Call]]) -> list[Choice]:
    alike = Counter((primitive.name, call.dtype, tuple(call.facts.items())) for primitive, call in calls)
    first = {(primitive.name, call.dtype, tuple(call.facts.items())): (primitive, call) for primitive, call in calls}
    return [_choice(phase, *first[key], count) for key, count in alike.items()]


def _choice(phase: str, primitive: Primitive, call: Call, count: int) -> Choice:
    wanted = chosen(primitive.name)
    asked = {one.name: one.supports(call._replace(chosen=one.name == wanted)) for one in primitive.implementations}
    serving = [name for name, reason in asked.items() if reason is None and wanted in (None, name)]
    refusals = {name: reason for name, reason in asked.items() if reason is not None}
    return Choice(phase, primitive.name, count, call.facts, next(iter(serving), None), refusals)
