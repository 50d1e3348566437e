"""The one rule by which results in floating point are compared.

A result may differ from the exact one, computed in float64, at most `slack` times as much as a plain PyTorch
computation of the same thing in the same dtype does. Where no such computation is at hand, its error is taken to be
`ROUNDINGS` roundings of the largest exact value: there is no absolute escape, except for results that are exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_SLACK = 2.0
GRADIENT_SLACK = 3.0
ROUNDINGS = 256


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square difference, as a share of the root mean square of `exact` (absolute where `exact` is zero)."""
    difference = (actual.detach().double() - exact.detach().double()).square().mean().sqrt().item()
    scale = exact.detach().double().square().mean().sqrt().item()
    return difference / scale if scale else difference


def assert_close(
    actual: Tensor,
    exact: Tensor,
    *,
    plain: Tensor | None = None,
    slack: float = FORWARD_SLACK,
    what: str = "result",
) -> None:
    """Fail unless `actual` is as near to `exact` as the rule above asks for."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    rounding = torch.finfo(actual.dtype).eps * ROUNDINGS
    allowed = rounding if plain is None else max(slack * error(plain, exact), torch.finfo(actual.dtype).eps)
    found = error(actual, exact)
    assert found <= allowed, f"{what}: relative error {found:.3e}, allowed {allowed:.3e}"
