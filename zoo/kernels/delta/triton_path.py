"""The delta rule on Triton kernels, as an operator that `torch.compile` and `torch.export` know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from zoo.kernels.decay import highest
from zoo.kernels.delta import triton_kernels
from zoo.kernels.launch import Launches
from zoo.kernels.segments import runs

_LAUNCHES = Launches("delta")
_CHUNK = 64
_LEAST_EXPONENT = -1e4
"""The exponential of it is zero, and sums of 64 of it in two float32 numbers are still exact."""


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float | None,
    steps: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    del chunk
    batch, tokens, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    out_dtype = v.dtype
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), out_dtype)
    q, k, v = (x.to(common) for x in (q, k, v))
    if log_decay is not None:
        log_decay = log_decay.float().clamp(_LEAST_EXPONENT, highest(torch.float32)).expand(batch, tokens, heads)
    if state is None:
        state = q.new_zeros(batch, heads, key_dim, value_dim, dtype=torch.float32)
    run = None if segments is None else runs(segments).int()
    if steps > 1:
        # The decay comes before the first step of a token, the output after its last.
        q = _at_step(q, steps, steps - 1)
        log_decay = None if log_decay is None else _at_step(log_decay, steps, 0)
        run = None if run is None else run.repeat_interleave(steps, 1)
    out, final = _forward(q, k, v, beta, log_decay, state.float(), run, 1.0 if scale is None else scale)
    if steps > 1:
        out = out.unflatten(1, (tokens, steps))[:, :, -1]
    return out.to(out_dtype), final


def _at_step(x: Tensor, steps: int, step: int) -> Tensor:
    """`x` at one of the steps of each token, zeros at the others; a row for each step."""
    return F.pad(x.unsqueeze(2), (0, 0) * (x.dim() - 2) + (step, steps - 1 - step)).flatten(1, 2)


class _Inputs(NamedTuple):
    """Contiguous tensors as the kernels read them, `length` rows each of which is one step."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    total: Tensor
    total_rest: Tensor
    runs: Tensor
    state: Tensor
    scale: float
    flags: dict[str, Any]

    @property
    def chunks(self) -> int:
        return -(-self.v.shape[1] // _CHUNK)

    @property
    def lanes(self) -> int:
        """Heads of all sequences."""
        return self.v.shape[0] * self.v.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        return {"key_dim": self.k.shape[3], "value_dim": self.v.shape[3], "bytes": self.v.element_size()}

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        (_, length, heads, value_dim), (_, _, groups, key_dim) = self.v.shape, self.k.shape
        return length, heads, heads // groups, key_dim, value_dim

    def run(self, kernel: Any, grid: Any, *arguments: Any) -> None:
        """Launch a kernel whose programs each take whole keys."""
        block = max(16, triton.next_power_of_2(self.k.shape[3]))
        _LAUNCHES.run(kernel, grid, self.v.device, self.sizes, *arguments, BLOCK_K=block, **self.flags)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def slices(self, constants: Any) -> int:
        return triton.cdiv(self.v.shape[3], constants["BLOCK_V"])


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    runs: Tensor | None,
    scale: float,
) -> _Inputs:
    flags = {"HAS_DECAY": log_decay is not None, "HAS_SEGMENTS": runs is not None}
    q, k, v, beta, state = (x.contiguous() for x in (q, k, v, beta, state))
    high = low = beta
    if log_decay is not None:
        batch, length, heads = log_decay.shape
        total = F.pad(log_decay.double() * math.log2(math.e), (0, 0, 0, -length % _CHUNK))
        total = total.view(batch, -1, _CHUNK, heads).cumsum(2).view(batch, -1, heads)[:, :length].contiguous()
        high = total.float()
        low = (total - high.double()).float()
    return _Inputs(q, k, v, beta, high, low, beta if runs is None else runs.contiguous(), state, scale, flags)


def _states(given: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverses, the states that enter the chunks, the updates and the state after the last chunk."""
    length, heads, per_group, key_dim, value_dim = given.numbers
    inverse = given.new(given.lanes, given.chunks, _CHUNK, _CHUNK)
    states = given.new(given.lanes, given.chunks, key_dim, value_dim)
    updates, final = given.new(*given.v.shape), given.new(*given.state.shape)
    vectors = given.beta, given.total, given.total_rest, given.runs
    shared = given.k, *vectors, inverse, length, heads, per_group, key_dim
    grid = (given.lanes * given.chunks,)
    _LAUNCHES.run(triton_kernels.delta_inverse, grid, given.v.device, given.sizes, *shared, **given.flags)
    tensors = given.k, given.v, *vectors, inverse, given.state, states, updates, final
    grid = lambda constants: (given.lanes, given.slices(constants))  # noqa: E731
    given.run(triton_kernels.delta_states, grid, *tensors, *given.numbers)
    return inverse, states, updates, final


@torch.library.custom_op("zoo::delta_rule_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    runs: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if not (v.numel() and k.numel()):
        return v.new_zeros(v.shape), state.clone()
    given = _prepared(q, k, v, beta, log_decay, state, runs, scale)
    out = given.new(*v.shape, dtype=v.dtype)
    _, states, updates, final = _states(given)
    tensors = given.q, given.k, given.total, given.total_rest, given.beta, given.runs, states, updates, out
    grid = lambda constants: (given.lanes * given.chunks, given.slices(constants))  # noqa: E731
    given.run(triton_kernels.delta_output, grid, *tensors, scale, *given.numbers)
    return out, final


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    runs: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    del q, k, beta, log_decay, runs, scale
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("zoo::delta_rule_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    runs: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not (v.numel() and k.numel()):
        blank = [x.new_zeros(x.shape) for x in (q, k, v, beta)]
        decay = beta.new_zeros(0 if log_decay is None else log_decay.shape, dtype=torch.float32)
        return blank[0], blank[1], blank[2], blank[3], decay, grad_final.clone()
    given = _prepared(q, k, v, beta, log_decay, state, runs, scale)
    length, heads, per_group, key_dim, _ = given.numbers
    inverse, states, updates, _ = _states(given)
    grad_out, grad_final = grad_out.contiguous(), grad_final.contiguous()
    grad_states, grad_rights = torch.empty_like(states), torch.empty_like(updates)
    grad_state = torch.empty_like(given.state)
    vectors = given.beta, given.total, given.total_rest, given.runs
    tensors = given.q, given.k, *vectors, inverse, grad_out, grad_final, grad_states, grad_rights, grad_state
    grid = lambda constants: (given.lanes, given.slices(constants))  # noqa: E731
    given.run(triton_kernels.delta_states_backward, grid, *tensors, scale, *given.numbers)

    # Shares of the heads of a group are added up below.
    dtype = q.dtype if per_group == 1 else torch.float32
    grad_q, grad_k = (given.new(v.shape[0], length, heads, key_dim, dtype=dtype) for _ in range(2))
    grad_v, grad_beta = torch.empty_like(given.v), given.new(*beta.shape)
    grad_decay = given.new(*(beta.shape if log_decay is not None else (0,)))
    grad_pairs = given.new(given.lanes, given.chunks, 2, _CHUNK, _CHUNK)
    computed = states, updates, grad_out, grad_states, grad_rights, grad_pairs
    tensors = given.q, given.k, given.v, *vectors, *computed, grad_v, grad_beta, grad_decay
    given.run(triton_kernels.delta_pairs_backward, (given.lanes * given.chunks,), *tensors, scale, *given.numbers)
    tensors = given.q, given.k, *vectors, *computed, grad_q, grad_k
    grid = lambda constants: (given.lanes * given.chunks, triton.cdiv(key_dim, constants["BLOCK_K"]))  # noqa: E731
    kernel = triton_kernels.delta_keys_backward
    _LAUNCHES.run(kernel, grid, v.device, given.sizes, *tensors, scale, *given.numbers, **given.flags)
    if per_group > 1:
        grad_q, grad_k = (x.unflatten(2, (-1, per_group)).sum(3).to(q.dtype) for x in (grad_q, grad_k))
    return grad_q, grad_k, grad_v, grad_beta.to(beta.dtype), grad_decay, grad_state


@_backward.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    runs: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad_out, grad_final, runs, scale
    decay = beta.new_empty(0 if log_decay is None else log_decay.shape, dtype=torch.float32)
    found = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    return found[0], found[1], found[2], found[3], decay, state.new_empty(state.shape)


def _remember(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    del output
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, state, run = ctx.saved_tensors
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    grad_final = torch.zeros_like(state) if grad_final is None else grad_final
    *found, decay, grad_state = _backward(grad_out, grad_final, q, k, v, beta, log_decay, state, run, ctx.scale)
    return *found, None if log_decay is None else decay, grad_state, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
