"""Times what takes a part of its parameters for each token against dense layers of that size, on this CPU.

    python -m bench.bench_routing --json bench/results/routing.json

One thread, in turn, by the processor time of that thread; figures are medians. A `matformer` of a fraction of the
hidden width against the whole one; tokens of mixed widths in one product against each width by itself; `moe` and `mohd`
against a `glu` with the matrices that they have active: as many hidden channels as a token's experts have, and as many
channels of the stream as a token has active. The `glu` has the same tokens, activation and dtype and gives the same
gradients, of all parameters and of the input, but a stream of its own width: that `mohd` gathers its channels from
a wider one and puts them back is part of what may come on top, as are the routers and the fusion of `mohd`, whose
parameters, less than 0.5% of what is active, are not in the dense layer's size.

Gradients are made and dropped, as by a step of training, not added to those of the turn before. What is freed stays
with the process (`kept_memory`): whether a tensor of 16 MiB gets memory whose pages the kernel has to clear first hangs
on what else was freed before, differs from turn to turn and from layer to layer, and costs up to a fifth of a dense
layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.record import arguments, finish, publish
from tests.blocks.places import Built, built, place
from zoo import kernels
from zoo.blocks.matformer import MatFormer
from zoo.blocks.mlp import GLU
from zoo.blocks.moe import MixtureOfExperts
from zoo.blocks.mohd import MixtureOfHiddenDimensions
from zoo.component import Component
from zoo.latency import kept_memory

TOKENS, WIDTH, HIDDEN = 2048, 512, 2048
FRACTIONS = (0.125, 0.25, 0.5, 1.0)
SLICE_EXTRA, MIXED, ROUTED = 0.05, 1.1, 1.15
"""What may come on top of a slice's fraction of the time, of the sum of its parts, of a dense layer's time."""
WARM_UP, REPEATS = 5, 9
"""Turns before those that count, until memory has found its places, and turns that count."""


class Run(NamedTuple):
    """A forward pass, and the tensors whose gradients the backward pass gives."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]

    @classmethod
    def of(cls, block: Built, x: Tensor) -> Run:
        return cls(partial(block, x), [x, *block.weights.values()])


def medians(runs: Mapping[str, Run], backward: bool) -> dict[str, float]:
    """Milliseconds of each, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP + REPEATS):
        for name, run in runs.items():
            start = time.thread_time()
            with torch.set_grad_enabled(backward):
                out = run.forward()
                if backward:
                    torch.autograd.grad(out.sum(), run.leaves, allow_unused=True)
            if turn >= WARM_UP:
                times[name].append((time.thread_time() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def row(what: str, backward: bool, ms: float, against: str, other: float, most: float) -> dict[str, Any]:
    mode = "forward and backward" if backward else "forward"
    met = ms / other <= most
    return {"what": what, "mode": mode, "ms": ms, "against": against, "its ms": other} | {
        "ratio": ms / other,
        "at most": most,
        "met": met,
    }


def block(component: Component, width: int = WIDTH) -> Built:
    return built(component, place(width=width, tokens=TOKENS), dtype=torch.float32)


def nested(x: Tensor, backward: bool) -> list[dict[str, Any]]:
    whole = MatFormer(hidden=tuple(int(fraction * HIDDEN) for fraction in FRACTIONS))
    slices = {f"{part:g}": block(whole.model_copy(update={"active": i})) for i, part in enumerate(FRACTIONS)}
    runs = {name: Run.of(one, x) for name, one in slices.items()}
    found = medians(runs, backward)
    return [
        row(f"matformer, {part:g} of the hidden width", backward, found[f"{part:g}"], "whole", found["1"], most)
        for part in FRACTIONS[:-1]
        for most in [part + SLICE_EXTRA]
    ]


def mixed(x: Tensor, backward: bool) -> list[dict[str, Any]]:
    """As many tokens of each width, in two products of one network."""
    groups, widths = len(FRACTIONS), [int(fraction * HIDDEN) for fraction in FRACTIONS]
    up, down = (torch.randn(HIDDEN, WIDTH).mul_(0.02).requires_grad_() for _ in range(2))
    rows = x[0].detach().requires_grad_()
    offsets, taken = torch.arange(groups + 1) * (TOKENS // groups), torch.tensor(widths)

    def together() -> Tensor:
        h = kernels.grouped_matmul(rows, up, offsets, output_widths=taken)
        return kernels.grouped_matmul(h, down.T, offsets, input_widths=taken)

    def apart(index: int) -> Run:
        own = rows.detach()[index * TOKENS // groups : (index + 1) * TOKENS // groups].requires_grad_()
        return Run(lambda: own @ up[: widths[index]].T @ down[: widths[index]], [own, up, down])

    found = medians({"together": Run(together, [rows, up, down])} | {str(i): apart(i) for i in range(groups)}, backward)
    alone = sum(found[str(i)] for i in range(groups))
    return [row("mixed widths in one batch", backward, found["together"], "each by itself", alone, MIXED)]


def routed(x: Tensor, backward: bool) -> list[dict[str, Any]]:
    experts, dimensions = MixtureOfExperts(hidden=HIDDEN // 2), MixtureOfHiddenDimensions(hidden=HIDDEN)
    active = WIDTH * (dimensions.shared + dimensions.top_k) // dimensions.subdims
    rows = []
    for component, hidden, width in ((experts, experts.top_k * HIDDEN // 2, WIDTH), (dimensions, HIDDEN, active)):
        ours, dense = block(component), block(GLU(hidden=hidden), width)
        part = x[..., :width].detach().clone().requires_grad_()
        found = medians({"ours": Run.of(ours, x), "dense": Run.of(dense, part)}, backward)
        against = f"glu of {hidden} on {width}"
        rows.append(row(component.type, backward, found["ours"], against, found["dense"], ROUTED))
    return rows


def main() -> None:
    """Run all."""
    options = arguments("Partial layers against dense ones of their active size.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    with kept_memory():
        rows = [each for part in (nested, mixed, routed) for backward in (False, True) for each in part(x, backward)]
    title = f"routing: {TOKENS} tokens, width {WIDTH}, float32, one thread; medians of processor time"
    finish(publish(title, rows, options.json))


if __name__ == "__main__":
    main()
