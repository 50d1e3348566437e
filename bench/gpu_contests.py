"""What `bench.gpu` times: each kernel, and the public implementations of the same thing that are installed.

Public implementations are asked for what ours computes, in their own layout. Those that are not installed are named in
`missing`; PyTorch's own are always there. Without a GPU FlexAttention runs as it is, on one it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import kernels
from zoo.kernels.cross_entropy.chunks import rows_of_chunk

Run = Callable[[], Any]
Rivals = tuple[dict[str, Run], tuple[str, ...]]
NORM_SHARE = 0.9
"""Of the measured copy bandwidth, which norms have to reach."""


@dataclass(frozen=True, slots=True)
class Contest:
    """One thing to compute: ours, the rivals, and the least work that there is to it.

    bytes and flops: what has to be moved and multiplied at least. required: by rival, how many times faster ours has to
    be. required_share: of the device's own rate. most_bytes: what ours may hold at its peak beyond its inputs. missing:
    rivals that are not installed.
    """

    primitive: str
    what: str
    ours: Run
    rivals: dict[str, Run] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    required: dict[str, float] = field(default_factory=dict)
    required_share: float | None = None
    most_bytes: float | None = None
    missing: tuple[str, ...] = ()


def contests(section: str, device: str, small: bool) -> Iterator[Contest]:
    """The contests of a section, forward and forward with backward, at the sizes of a GPU or tiny."""
    torch.manual_seed(0)
    for backward in (False, True):
        for make in SECTIONS[section]:
            yield from make(device, small, backward)


def drawn(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def run(primitive: str, call: Callable[[], Any], inputs: Sequence[Tensor], backward: bool, ours: bool = True) -> Run:
    """The call, with the gradients of its inputs if `backward`, which gives what it computed; ours by its kernel."""

    def once() -> tuple[Tensor | None, ...]:
        choice = {primitive: "triton"} if ours else {}
        with torch.set_grad_enabled(backward), kernels.use(**choice):
            found = call()
            out = found if isinstance(found, Tensor) else found[0]
            if not backward:
                return (out,)
            return out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return once


def mode(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def public(rival: str, path: str, call: Callable[[Any], Any], inputs: Sequence[Tensor], backward: bool) -> Rivals:
    """A rival that calls the function at `path`, or the rival as missing if it is not installed."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return {}, (rival,)
    return {rival: run("", lambda: call(function), inputs, backward, ours=False)}, ()


def attention(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    tokens, heads, head_dim = (70, 2, 32) if small else (8192, 16, 128)
    q, k, v = (drawn(device, 1, tokens, heads, head_dim) for _ in range(3))
    slopes = torch.linspace(0.01, 0.5, heads, device=device)
    window = tokens // 4
    work = 4.0 * tokens * tokens / 2 * heads * head_dim * (3.5 if backward else 1)
    share = {"window": 7 / 16, "soft cap": 1.0, "ALiBi": 1.0}
    flags: dict[str, dict[str, Any]] = {
        "window": {"window": window},
        "soft cap": {"softcap": 30.0},
        "ALiBi": {"alibi_slopes": slopes},
    }
    changes: dict[str, Callable[..., Tensor] | None] = {
        "window": None,
        "soft cap": lambda score, b, h, i, j: 30.0 * torch.tanh(score / 30.0),
        "ALiBi": lambda score, b, h, i, j: score - slopes[h] * (i - j),
    }
    for name, flag in flags.items():
        rivals = {"FlexAttention": _flex(q, k, v, changes[name], window if name == "window" else None, backward)}
        yield Contest(
            "attention",
            f"attention with {name}, {tokens} tokens, {heads} heads of {head_dim}, {mode(backward)}",
            run("attention", lambda flag=flag: kernels.attention(q, k, v, **flag), (q, k, v), backward),
            rivals,
            flops=work * share[name],
            required={"FlexAttention": 1.0},
        )
    log_forget = F.logsigmoid(torch.randn(1, tokens, heads, device=device) + 4).requires_grad_()
    inputs = (q, k, v, log_forget)
    path = "fla.ops.forgetting_attn.parallel_forgetting_attn"
    rivals, missing = public("flash-linear-attention", path, lambda one: one(*inputs), inputs, backward)
    yield Contest(
        "attention",
        f"attention with a forget gate, {tokens} tokens, {heads} heads of {head_dim}, {mode(backward)}",
        run("attention", lambda: kernels.attention(q, k, v, log_forget=log_forget), inputs, backward),
        rivals,
        flops=work,
        required={"flash-linear-attention": 2.0} if backward else {},
        missing=missing,
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, change: Any, window: int | None, backward: bool) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, device = q.shape[1], q.device.type

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j
        return seen if window is None else seen & (i - j < window)

    @cache
    def prepared() -> tuple[Any, Any]:
        attend = flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=False)
        return attend, create_block_mask(visible, None, None, tokens, tokens, device=device)

    def call() -> Tensor:
        attend, mask = prepared()
        # On a CPU it refuses tensors that want gradients, also where none are taken.
        given = (q, k, v) if backward else (q.detach(), k.detach(), v.detach())
        found = attend(*(x.transpose(1, 2) for x in given), score_mod=change, block_mask=mask)
        return found.transpose(1, 2)

    return run("", call, (q, k, v), backward, False)


def recurrences(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    tokens, heads, head_dim = (70, 2, 16) if small else (8192, 32, 64)
    q, k, v = (drawn(device, 1, tokens, heads, head_dim) for _ in range(3))
    moved = 4.0 * q.nbytes * (3 if backward else 1)
    gate = F.logsigmoid(torch.randn(1, tokens, heads, device=device) + 4).requires_grad_()
    inputs = (q, k, v, gate)
    path = "fla.ops.simple_gla.chunk_simple_gla"
    rivals, missing = public(
        "flash-linear-attention", path, lambda one: one(q, k, v, gate, scale=1.0), inputs, backward
    )
    yield Contest(
        "recurrence",
        f"scalar decay, {tokens} tokens, {heads} heads of {head_dim}, {mode(backward)}",
        run("recurrence", lambda: kernels.recurrence(q, k, v, log_decay=gate), inputs, backward),
        rivals,
        bytes=moved,
        required={"flash-linear-attention": 1.15},
        missing=missing,
    )
    gates = F.logsigmoid(torch.randn(1, tokens, heads, head_dim, device=device) + 4).requires_grad_()
    path, wide = "fla.ops.gla.chunk_gla", (q, k, v, gates)
    rivals, missing = public("flash-linear-attention", path, lambda one: one(q, k, v, gates, scale=1.0), wide, backward)
    yield Contest(
        "recurrence",
        f"decay per channel, {tokens} tokens, {heads} heads of {head_dim}, {mode(backward)}",
        run("recurrence", lambda: kernels.recurrence(q, k, v, log_decay=gates), wide, backward),
        rivals,
        bytes=moved + gates.nbytes,
        required={"flash-linear-attention": 1.25},
        missing=missing,
    )
    yield _ssd(device, small, backward)


def _ssd(device: str, small: bool, backward: bool) -> Contest:
    tokens, heads, head_dim, state_dim = (70, 2, 16, 16) if small else (8192, 32, 64, 128)
    x = drawn(device, 1, tokens, heads, head_dim)
    B, C = (drawn(device, 1, tokens, 1, state_dim) for _ in range(2))
    dt = torch.rand(1, tokens, heads, device=device).mul_(0.1).requires_grad_()
    A = -torch.arange(1.0, heads + 1, device=device)
    inputs = (x, B, C, dt)

    def ours() -> Tensor:
        return kernels.recurrence(C, B, (x * dt[..., None]).to(x.dtype), log_decay=dt * A)[0]

    path = "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined"
    rivals, missing = public("mamba_ssm", path, lambda one: one(x, dt, A, B, C, chunk_size=256), inputs, backward)
    return Contest(
        "recurrence",
        f"SSD, {tokens} tokens, {heads} heads of {head_dim}, state {state_dim}, {mode(backward)}",
        run("recurrence", ours, inputs, backward),
        rivals,
        bytes=2.0 * x.nbytes * (3 if backward else 1),
        required={"mamba_ssm": 1.2 if backward else 1.5},
        missing=missing,
    )


def deltas(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    tokens, heads, head_dim = (70, 2, 16) if small else (8192, 16, 128)
    q, v = drawn(device, 1, tokens, heads, head_dim), drawn(device, 1, tokens, heads, head_dim)
    k = F.normalize(drawn(device, 1, tokens, heads, head_dim).float(), dim=-1).bfloat16().detach().requires_grad_()
    beta = torch.rand(1, tokens, heads, device=device).bfloat16().requires_grad_()
    gate = F.logsigmoid(torch.randn(1, tokens, heads, device=device) + 4).requires_grad_()
    inputs = (q, k, v, beta, gate)
    path, name = "fla.ops.gated_delta_rule.chunk_gated_delta_rule", "flash-linear-attention"
    rivals, missing = public(name, path, lambda one: one(q, k, v, gate, beta, scale=1.0), inputs, backward)
    yield Contest(
        "delta_rule",
        f"gated delta rule, {tokens} tokens, {heads} heads of {head_dim}, {mode(backward)}",
        run("delta_rule", lambda: kernels.delta_rule(q, k, v, beta, log_decay=gate), inputs, backward),
        rivals,
        bytes=4.0 * q.nbytes * (3 if backward else 1),
        required={"flash-linear-attention": 1.0},
        missing=missing,
    )


def scans(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    tokens, channels, state_dim = (40, 24, 8) if small else (4096, 4096, 16)
    x = drawn(device, 1, tokens, channels)
    delta = torch.rand(1, tokens, channels, device=device).mul_(0.1).bfloat16().requires_grad_()
    A = -torch.arange(1.0, state_dim + 1, device=device).repeat(channels, 1)
    B, C = (drawn(device, 1, tokens, state_dim) for _ in range(2))
    inputs = (x, delta, B, C)

    def rival(one: Any) -> Tensor:
        found = one(*(each.transpose(1, 2) for each in (x, delta)), A, *(each.transpose(1, 2) for each in (B, C)))
        return found.transpose(1, 2)

    path = "mamba_ssm.ops.selective_scan_interface.selective_scan_fn"
    rivals, missing = public("mamba_ssm", path, rival, inputs, backward)
    yield Contest(
        "selective_scan",
        f"selective scan, {tokens} tokens, {channels} channels, state {state_dim}, {mode(backward)}",
        run("selective_scan", lambda: kernels.selective_scan(x, delta, A, B, C), inputs, backward),
        rivals,
        bytes=3.0 * x.nbytes * (3 if backward else 1),
        missing=missing,
    )


def convolutions(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    tokens, channels, taps = (40, 24, 4) if small else (8192, 4096, 4)
    x, weight = drawn(device, 1, tokens, channels), drawn(device, channels, taps)

    def plain() -> Tensor:
        return F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], groups=channels).mT

    path = "causal_conv1d.causal_conv1d_fn"
    rivals, missing = public("causal_conv1d", path, lambda one: one(x.mT, weight).mT, (x, weight), backward)
    rivals["PyTorch"] = run("", plain, (x, weight), backward, ours=False)
    yield Contest(
        "causal_convolution",
        f"causal convolution, {tokens} tokens, {channels} channels, {taps} taps, {mode(backward)}",
        run("causal_convolution", lambda: kernels.causal_convolution(x, weight), (x, weight), backward),
        rivals,
        bytes=x.nbytes * (5.0 if backward else 2.0),
        missing=missing,
    )


def norms(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    rows, width = (9, 100) if small else (16384, 4096)
    x, residual, weight, bias = (drawn(device, *shape) for shape in ((rows, width), (rows, width), (width,), (width,)))
    moved = x.nbytes * (5.0 if backward else 2.0)
    path, inputs = "liger_kernel.ops.rms_norm.LigerRMSNormFunction", (x, weight)
    rivals, missing = public("Liger", path, lambda one: one.apply(x, weight, 1e-6), inputs, backward)
    rivals["PyTorch"] = run("", lambda: F.rms_norm(x, (width,), weight, 1e-6), inputs, backward, ours=False)
    yield Contest(
        "rms_norm",
        f"RMSNorm, {rows} rows of {width}, {mode(backward)}",
        run("rms_norm", lambda: kernels.rms_norm(x, weight), inputs, backward),
        rivals,
        bytes=moved,
        required_share=NORM_SHARE,
        missing=missing,
    )
    path, inputs = "liger_kernel.ops.layer_norm.LigerLayerNormFunction", (x, weight, bias)
    rivals, missing = public("Liger", path, lambda one: one.apply(x, weight, bias, 1e-5), inputs, backward)
    rivals["PyTorch"] = run("", lambda: F.layer_norm(x, (width,), weight, bias), inputs, backward, ours=False)
    yield Contest(
        "layer_norm",
        f"LayerNorm, {rows} rows of {width}, {mode(backward)}",
        run("layer_norm", lambda: kernels.layer_norm(x, weight, bias), inputs, backward),
        rivals,
        bytes=moved,
        required_share=NORM_SHARE,
        missing=missing,
    )
    path, inputs = "liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction", (x, residual, weight)
    rivals, missing = public("Liger", path, lambda one: one.apply(x, residual, weight, 1e-6), inputs, backward)
    yield Contest(
        "rms_norm",
        f"RMSNorm of a sum, {rows} rows of {width}, {mode(backward)}",
        run("rms_norm", lambda: kernels.rms_norm(x, weight, residual=residual), inputs, backward),
        rivals,
        bytes=x.nbytes * (7.0 if backward else 4.0),
        required_share=NORM_SHARE,
        missing=missing,
    )


def activations(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    rows, width = (9, 100) if small else (16384, 8192)
    inputs = gate, up = drawn(device, rows, width), drawn(device, rows, width)
    path = "liger_kernel.ops.swiglu.LigerSiLUMulFunction"
    rivals, missing = public("Liger", path, lambda one: one.apply(gate, up), inputs, backward)
    rivals["PyTorch"] = run("", lambda: F.silu(gate) * up, inputs, backward, ours=False)
    yield Contest(
        "gated_activation",
        f"SwiGLU, {rows} rows of {width}, {mode(backward)}",
        run("gated_activation", lambda: kernels.gated_activation(gate, up), inputs, backward),
        rivals,
        bytes=gate.nbytes * (8.0 if backward else 3.0),
        missing=missing,
    )


def cross_entropy(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    if not backward:
        return
    rows, width, vocab = (30, 32, 90) if small else (8192, 2048, 65536)
    x, weight = drawn(device, rows, width), drawn(device, vocab, width)
    targets = torch.randint(vocab, (rows,), device=device)
    inputs = (x, weight)
    path = "liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction"
    rivals, missing = public("Liger", path, lambda one: one.apply(x, weight, targets)[0], inputs, True)
    rivals["PyTorch"] = run("", lambda: F.cross_entropy(F.linear(x, weight).float(), targets), inputs, True, ours=False)
    yield Contest(
        "linear_cross_entropy",
        f"linear cross entropy, {rows} rows of {width}, vocabulary {vocab}, {mode(True)}",
        run("linear_cross_entropy", lambda: kernels.linear_cross_entropy(x, weight, targets), inputs, True),
        rivals,
        flops=6.0 * rows * width * vocab,
        # A chunk of logits in the inputs' dtype; the gradients, that of the weight in float32 as well.
        most_bytes=1.05 * (2.0 * rows_of_chunk(rows, width, vocab, x) * vocab + x.nbytes + 3 * weight.nbytes),
        required={"PyTorch": 1 / 1.05},
        missing=missing,
    )


def products(device: str, small: bool, backward: bool) -> Iterator[Contest]:
    rows, width, hidden, groups = (60, 32, 48, 3) if small else (16384, 2048, 4096, 32)
    x, weight = drawn(device, rows, width), drawn(device, groups, hidden, width)
    cuts = torch.linspace(0, rows, groups + 1, device=device).long()
    ends = cuts[1:].int()
    product: Any = torch._grouped_mm  # type: ignore[attr-defined]
    rivals = {
        "torch._grouped_mm": run(
            "", lambda: product(x, weight.transpose(1, 2), offs=ends), (x, weight), backward, ours=False
        )
    }
    yield Contest(
        "grouped_matmul",
        f"{groups} experts, {rows} rows of {width} to {hidden}, {mode(backward)}",
        run("grouped_matmul", lambda: kernels.grouped_matmul(x, weight, cuts), (x, weight), backward),
        rivals,
        flops=2.0 * rows * width * hidden * (3 if backward else 1),
    )


SECTIONS: Mapping[str, tuple[Callable[[str, bool, bool], Iterator[Contest]], ...]] = {
    "attention": (attention,),
    "recurrences": (recurrences,),
    "deltas": (deltas,),
    "scans": (scans,),
    "convolutions": (convolutions,),
    "norms": (norms,),
    "activations": (activations,),
    "cross_entropy": (cross_entropy,),
    "products": (products,),
}
