"""The recurrence on Triton kernels, as operators that `torch.compile` and `torch.export` know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Launches, processors
from zoo.kernels.linear_recurrence import torch_path, triton_kernels

_LAUNCHES = Launches("linear_recurrence")
# Products of float32 are computed without tensor cores, where shorter chunks are less work.
_CHUNKS = {torch.float32: 32, torch.bfloat16: 64}


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    if q.shape[1] < 2:
        return torch_path.recurrence(q, k, v, log_decay, state, segments, scale, chunk)
    return _recurrence_forward(q, k, v, log_decay, state, segments, 1.0 if scale is None else scale)


class _Launcher:
    """Launches the kernels for tensors of one set of shapes."""

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor | None, segments: Tensor | None) -> None:
        self.batch, self.tokens, self.groups, self.key_dim = q.shape
        self.heads, self.value_dim = v.shape[2:]
        chunk = _CHUNKS[v.dtype]
        self.chunks = triton.cdiv(self.tokens, chunk)
        self.device = v.device
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        self.segments = None if segments is None else segments.contiguous()
        kind = "none" if log_decay is None else {1: "heads", 3: "tokens", 4: "channels"}[log_decay.dim()]
        self.by_channel = kind == "channels"
        self.constants = {"DECAY": kind, "SEGMENTS": segments is not None, "CHUNK": chunk}
        self.sizes = {"key_dim": self.key_dim, "value_dim": self.value_dim, "element_bytes": v.element_size()}
        self.dims = (self.tokens, self.groups, self.heads, self.key_dim, self.value_dim)

    def states(
        self, keys: Tensor, values: Tensor, initial: Tensor | None, factor: float, *, reverse: bool, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """The states that enter the chunks, in `values`' dtype, and the one after; see the kernel."""
        shape = (self.key_dim, self.value_dim)
        states = torch.empty(self.batch, self.heads, self.chunks, *shape, dtype=values.dtype, device=self.device)
        final = torch.empty(self.batch, self.heads, *shape, dtype=torch.float32, device=self.device)

        def grid(meta: Any) -> tuple[int, int, int]:
            slices = triton.cdiv(self.key_dim, meta["BLOCK_K"]), triton.cdiv(self.value_dim, meta["BLOCK_V"])
            return self.batch * self.heads, *slices

        tensors = (keys, values, self.log_decay, self.segments, initial, states, final)
        flags = {"INITIAL": initial is not None, "REVERSE": reverse, "EXACT": exact}
        kernel = triton_kernels.recurrence_states
        _LAUNCHES.run(kernel, grid, self.device, self.sizes, *tensors, *self.dims, factor, **flags, **self.constants)
        return states, final

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
        """Products of queries and keys in a chunk where each channel has its decay, else None."""
        if not self.by_channel:
            return None
        chunk = self.constants["CHUNK"]
        shape = (self.batch, self.groups, self.chunks, chunk, chunk)
        pairs = torch.empty(shape, dtype=q.dtype, device=self.device)
        kernel, grid = triton_kernels.recurrence_scores, (self.chunks * self.groups * self.batch,)
        tensors = (q, k, self.log_decay, self.segments, pairs)
        _LAUNCHES.run(kernel, grid, self.device, self.sizes, *tensors, *self.dims, scale, **self.halves)
        return pairs

    @property
    def halves(self) -> dict[str, Any]:
        chunk = self.constants["CHUNK"]
        return {"SEGMENTS": self.segments is not None, "CHUNK": chunk, "LEVELS": chunk.bit_length() - 1}

    def output(
        self,
        left: Tensor,
        right: Tensor,
        values: Tensor,
        states: Tensor,
        pairs: Tensor | None,
        scale: float,
        *,
        reverse: bool,
    ) -> Tensor:
        """The output, or reversed the gradient of the values; see the kernel."""
        out = torch.empty_like(values)
        kernel = triton_kernels.recurrence_output
        slices = triton.cdiv(self.value_dim, self.block(kernel, "BLOCK_V"))
        parts, each = self.share(slices)
        grid = (self.chunks * parts * self.groups * self.batch, slices)
        tensors = (left, right, values, self.log_decay, self.segments, states, pairs, out)
        sizes = (*self.dims, scale, each)
        _LAUNCHES.run(kernel, grid, self.device, self.sizes, *tensors, *sizes, REVERSE=reverse, **self.constants)
        return out

    def keys_gradient(
        self,
        left: Tensor,
        right: Tensor,
        own: Tensor,
        other: Tensor,
        states: Tensor,
        entering: Tensor,
        scale: float,
        *,
        reverse: bool,
        decay: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of `own`, and that of the decay for each slice of the keys if it is wanted."""
        kernel = triton_kernels.recurrence_backward
        slices = triton.cdiv(self.key_dim, self.block(kernel, "BLOCK_K"))
        parts, each = self.share(slices)
        dtype = own.dtype if parts == 1 else torch.float32
        found = torch.empty(parts, *own.shape, dtype=dtype, device=self.device)
        shape = (slices, self.batch, self.tokens, self.heads)
        grad_decay = torch.empty(shape, dtype=torch.float32, device=self.device) if decay else None
        grid = (self.chunks * parts * self.groups * self.batch, slices)
        tensors = (left, right, own, other, self.log_decay, self.segments, states, entering, found, grad_decay)
        flags = {"DECAY_GRADIENT": decay, "REVERSE": reverse, **self.constants}
        _LAUNCHES.run(kernel, grid, self.device, self.sizes, *tensors, *self.dims, scale, each, **flags)
        return found[0] if parts == 1 else found.sum(0).to(own.dtype), grad_decay

    def channel_gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor,
        states: Tensor,
        leaving: Tensor,
        scale: float,
        *,
        decay: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of queries, keys and, if it is wanted, of the decay of each channel."""
        kernel = triton_kernels.recurrence_channels_backward
        slices = triton.cdiv(self.key_dim, self.block(kernel, "BLOCK_K"))
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        grad_decay = torch.empty_like(self.log_decay) if decay and self.log_decay is not None else None
        grid = (self.chunks * self.groups * self.batch, slices)
        tensors = (q, k, v, grad, self.log_decay, self.segments, states, leaving, grad_q, grad_k, grad_decay)
        flags = {"DECAY_GRADIENT": decay, **self.halves}
        _LAUNCHES.run(kernel, grid, self.device, self.sizes, *tensors, *self.dims, scale, **flags)
        return grad_q, grad_k, grad_decay

    def block(self, kernel: Any, name: str) -> int:
        return _LAUNCHES.configuration(kernel.__name__, self.device, self.sizes)[name]

    def share(self, slices: int) -> tuple[int, int]:
        """Into how many parts the heads of a group are cut to give every processor work, and the heads of one."""
        per_group = self.heads // self.groups
        programs = max(1, self.chunks * self.groups * self.batch * slices)
        each = triton.cdiv(per_group, min(per_group, triton.cdiv(2 * processors(self.device), programs)))
        return triton.cdiv(per_group, each), each


@torch.library.custom_op("zoo::recurrence_forward", mutates_args=())
def _recurrence_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    state = None if state is None else state.contiguous()
    run = _Launcher(q, v, log_decay, segments)
    if not v.numel():
        return torch.empty_like(v), _state_like(q, v).zero_()
    states, final = run.states(k, v, state, 1.0, reverse=False, exact=True)
    return run.output(q, k, v, states, run.scores(q, k, scale), scale, reverse=False), final


def _state_like(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


@_recurrence_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    del k
    return v.new_empty(v.shape), _state_like(q, v)


@torch.library.custom_op("zoo::recurrence_backward", mutates_args=())
def _recurrence_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    decay_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    state = None if state is None else state.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    run = _Launcher(q, v, log_decay, segments)
    states, _ = run.states(k, v, state, 1.0, reverse=False, exact=False)
    leaving, grad_state = run.states(q, grad, grad_final, scale, reverse=True, exact=state is not None)
    grad_v = run.output(k, q, grad, leaving, run.scores(q, k, scale), scale, reverse=True)
    options = {"scale": scale, "decay": decay_wanted}
    if run.by_channel:
        grad_q, grad_k, grad_decay = run.channel_gradients(q, k, v, grad, states, leaving, **options)
    else:
        grad_q, passing = run.keys_gradient(grad, v, q, k, states, states, reverse=False, **options)
        grad_k, leaving_share = run.keys_gradient(v, grad, k, q, leaving, states, reverse=True, **options)
        grad_decay = None
        if passing is not None and leaving_share is not None and log_decay is not None:
            grad_decay = passing.sum(0) + leaving_share.sum(0)
            grad_decay = (grad_decay if log_decay.dim() == 3 else grad_decay.sum((0, 1))).to(log_decay.dtype)
    grad_decay = q.new_empty(0) if grad_decay is None else grad_decay
    return grad_q, grad_k, grad_v, grad_decay, q.new_empty(0) if state is None else grad_state.to(state.dtype)


@_recurrence_backward.register_fake
def _(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    decay_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad, grad_final, segments, scale
    grad_decay = log_decay.new_empty(log_decay.shape) if decay_wanted and log_decay is not None else q.new_empty(0)
    grad_state = q.new_empty(0) if state is None else state.new_empty(state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_decay, grad_state


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    del output
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, state, segments = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(v)
    decay_wanted = log_decay is not None and ctx.needs_input_grad[3]
    grad_q, grad_k, grad_v, grad_decay, grad_state = _recurrence_backward(
        grad, grad_final, q, k, v, log_decay, state, segments, ctx.scale, decay_wanted
    )
    found_decay = grad_decay if decay_wanted else None
    return grad_q, grad_k, grad_v, found_decay, None if state is None else grad_state, None, None


_recurrence_forward.register_autograd(_differentiate, setup_context=_remember)
