"""Calls that together use every flag of the cross entropy's kernel; rows come in chunks of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.kernels.case import Case, Draw
from zoo.kernels.cross_entropy import linear_cross_entropy

_KERNELS = ("cross_entropy_chunk",)


def _rows(*, bias: bool = False, **settings: Any) -> Callable[[Draw], Mapping[str, Any]]:
    def inputs(draw: Draw) -> Mapping[str, Any]:
        rows, width, vocab = draw.pick(7, 1024), draw.pick(9, 256), draw.pick(1037, 50_257)
        targets = torch.arange(rows, device=draw.device) * 7919 % vocab
        targets[1::3] = -100
        tensors = {"x": draw.normal(rows, width), "weight": draw.normal(vocab, width, std=width**-0.5)}
        if bias:
            tensors["bias"] = draw.normal(vocab)
        return {**tensors, "targets": targets, "chunk": draw.pick(5, 600), **settings}

    return inputs


CASES = (
    Case("linear_cross_entropy", "mean", linear_cross_entropy, _rows(), _KERNELS),
    Case(
        "linear_cross_entropy",
        "capped",
        linear_cross_entropy,
        _rows(bias=True, softcap=3.0, z_loss=0.01, label_smoothing=0.1),
        _KERNELS,
    ),
    Case("linear_cross_entropy", "rows", linear_cross_entropy, _rows(reduction="none", z_loss=0.01), _KERNELS),
    Case("linear_cross_entropy", "no-gradients", linear_cross_entropy, _rows(softcap=30.0), _KERNELS, gradients=False),
)
