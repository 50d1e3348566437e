"""The short convolution as one element-wise pass for each tap, which beats grouped convolutions on the CPU; the long
one by Fourier transforms, as a custom operator, which keeps no spectra for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.segments import runs
from zoo.kernels.work import transform_length


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    taps = weight.to(at_least_float32(x.dtype)).unbind(1)
    before = len(taps) - 1
    state = x.new_zeros(batch, before, channels) if state is None else state.to(x.dtype)
    # [batch, kernel - 1 + tokens, channels]
    inputs = torch.cat([state, x], 1)
    run_of = None if segments is None else runs(segments)
    run = None if run_of is None else F.pad(run_of, (before, 0))

    out = x * taps[-1] if bias is None else torch.addcmul(bias.to(taps[-1].dtype), x, taps[-1])
    for lag in range(1, len(taps)):
        shifted = inputs[:, before - lag : before - lag + tokens]
        if run is not None:
            other = run[:, before - lag : before - lag + tokens] != run[:, before:]
            shifted = shifted.masked_fill(other.unsqueeze(-1), 0)
        out = torch.addcmul(out, shifted, taps[-1 - lag])
    if silu:
        out = F.silu(out)

    return out.to(x.dtype), last_inputs(x, state, before, run_of)


def last_inputs(x: Tensor, state: Tensor | None, count: int, run: Tensor | None) -> Tensor:
    """The last inputs, `[batch, count, channels]`, zero where they do not belong to the run of the last token.

    `run` numbers the runs of the tokens, see `segments.runs`; None is a single one.
    """
    batch, tokens, channels = x.shape
    state = x.new_zeros(batch, count, channels) if state is None else state
    near = min(tokens, count)
    kept = torch.cat([state[:, near:], x[:, tokens - near :]], 1)
    if run is not None and tokens:
        of_kept = F.pad(run[:, tokens - near :], (count - near, 0))
        kept = kept.masked_fill((of_kept != run[:, -1:]).unsqueeze(-1), 0)
    return kept


def long_convolution(x: Tensor, filters: Tensor, segments: Tensor | None) -> Tensor:
    return _long(x, filters, None if segments is None else runs(segments))


class _Layout:
    """Lays sequences out as rows `[rows, channels, length]`, and back: each run of tokens gets a row of its own."""

    def __init__(self, x: Tensor, run: Tensor | None) -> None:
        self.batch, self.length, _ = x.shape
        self.places = None
        if run is None:
            return
        token = torch.arange(run.shape[1], device=run.device)
        begin = torch.where(F.pad(run[:, 1:] != run[:, :-1], (1, 0), value=True), token, 0).cummax(1).values
        number = run + F.pad((run[:, -1] + 1).cumsum(0), (1, -1)).unsqueeze(1)
        self.places = number, token - begin
        self.batch, self.length = int(number[-1, -1]) + 1, int((token - begin).max()) + 1

    def rows(self, x: Tensor) -> Tensor:
        if self.places is None:
            return x.transpose(1, 2)
        rows = x.new_zeros(self.batch, self.length, x.shape[2])
        rows[self.places] = x
        return rows.transpose(1, 2)

    def tokens(self, rows: Tensor) -> Tensor:
        tokens = rows[..., : self.length].transpose(1, 2)
        return (tokens if self.places is None else tokens[self.places]).contiguous()


@torch.library.custom_op("zoo::long_convolution", mutates_args=())
def _long(x: Tensor, filters: Tensor, run: Tensor | None) -> Tensor:
    if not x.numel():
        return x.new_zeros(x.shape)
    layout = _Layout(x, run)
    filters = filters[:, : layout.length]
    size = transform_length(layout.length + filters.shape[1] - 1)
    spectrum = torch.fft.rfft(layout.rows(x), size) * torch.fft.rfft(filters, size)
    return layout.tokens(torch.fft.irfft(spectrum, size))


@_long.register_fake
def _(x: Tensor, filters: Tensor, run: Tensor | None) -> Tensor:
    del filters, run
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::long_convolution_backward", mutates_args=())
def _long_backward(grad: Tensor, x: Tensor, filters: Tensor, run: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `filters`: correlations of `grad` with the other."""
    if not x.numel():
        return x.new_zeros(x.shape), filters.new_zeros(filters.shape)
    layout = _Layout(x, run)
    reach = min(filters.shape[1], layout.length)
    size = transform_length(layout.length + reach - 1)
    spectrum = torch.fft.rfft(layout.rows(grad), size)
    of_filters = (spectrum * torch.fft.rfft(layout.rows(x), size).conj()).sum(0)
    of_x = spectrum * torch.fft.rfft(filters[:, :reach], size).conj()
    grad_filters = F.pad(torch.fft.irfft(of_filters, size)[:, :reach], (0, filters.shape[1] - reach))
    return layout.tokens(torch.fft.irfft(of_x, size)), grad_filters


@_long_backward.register_fake
def _(grad: Tensor, x: Tensor, filters: Tensor, run: Tensor | None) -> tuple[Tensor, Tensor]:
    del grad, run
    return x.new_empty(x.shape), filters.new_empty(filters.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_long_backward(grad, *ctx.saved_tensors), None)


_long.register_autograd(_gradients, setup_context=_keep)
