"""What the implementations of `attention` are given besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """The numbers and flags of a call; `first` is the position of key 0, `lse` whether the log-sum-exp is wanted."""

    causal: bool
    scale: float
    window: int | None = None
    dilation: int = 1
    block: int = 1
    softcap: float | None = None
    clip: tuple[float, float] | None = None
    first: int = 0
    lse: bool = False


@dataclass(frozen=True)
class Extras:
    """The optional tensors of a call."""

    segments: Tensor | None = None
    """`[batch, keys]`"""
    key_length: Tensor | None = None
    """`[batch]`"""
    prefix: Tensor | None = None
    """`[batch]`, in positions"""
    blocks: Tensor | None = None
    """`[heads or 1, query_blocks, key_blocks]`"""
    alibi_slopes: Tensor | None = None
    """`[heads]`"""
    bias: Tensor | None = None
    """`[heads, distances]`"""
    log_forget: Tensor | None = None
    """`[batch, keys, heads]`"""
    sink: Tensor | None = None
    """`[heads]`"""


def middle(rules: Rules, bias: Tensor) -> int:
    """The entry of `bias` that holds distance 0: the first where only earlier keys are visible."""
    return 0 if rules.causal else bias.shape[1] // 2
