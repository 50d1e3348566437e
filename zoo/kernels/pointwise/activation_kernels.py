"""Kernels of gated and polynomial activations: tiles of rows, or of one long row where the tensors are contiguous."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.pointwise.triton_kernels import rows_of


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """The activation and its derivative."""
    if KIND == "silu":
        gate = tl.sigmoid(x)
        value, slope = x * gate, gate * (1.0 + x * (1.0 - gate))
    elif KIND == "sigmoid":
        value = tl.sigmoid(x)
        slope = value * (1.0 - value)
    elif KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        below = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * below
        slope = below + value * (1.0 - below) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu":
        value, slope = tl.where(x > 0, x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif KIND == "relu2":
        slope = 2.0 * tl.where(x > 0, x, 0.0)
        value = 0.25 * slope * slope
    else:
        tl.static_assert(KIND == "linear", "unknown activation")
        value, slope = x, 1.0
    return value, slope


@triton.jit
def _place(block, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `[ROWS, 1]` and columns `[1, BLOCK]` of a tile, and what of it is inside."""
    across = tl.cdiv(width, BLOCK)
    row = ((block // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((block % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def gated_forward(
    gate,
    up,
    out,
    rows,
    width,
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """`out = activation(gate) * up`."""
    row, column, inside = _place(tl.program_id(0), rows, width, rows_of(TILE, BLOCK), BLOCK)
    value, _ = _activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), KIND)
    value *= tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    rows,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of gate and up from theirs and from the inputs; the activation is computed again."""
    row, column, inside = _place(tl.program_id(0), rows, width, rows_of(TILE, BLOCK), BLOCK)
    given = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(grad_up + row * width + column, (given * value).to(grad_up.dtype.element_ty), mask=inside)
    given *= tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_gate + row * width + column, (given * slope).to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit
def _scale(raised, width, eps, NORMALIZED: tl.constexpr):
    """What a power of a row is multiplied by, `[rows]`."""
    scale = tl.full([raised.shape[0]], 1.0, tl.float32)
    if NORMALIZED:
        scale = 1.0 / tl.sqrt(tl.sum(raised * raised, 1) / width + eps)
    return scale


@triton.jit
def polynomial_forward(
    x,
    coefficients,
    out,
    rows,
    width,
    eps,
    NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """`c_0 + c_1 t_1 + c_2 t_2 + c_3 t_3` with `t_i = relu(x)^i`, or `x^i` over its root mean square in the row."""
    row, column, inside = _place(tl.program_id(0), rows, width, rows_of(TILE, BLOCK), BLOCK)
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if not NORMALIZED:
        value = tl.where(value > 0, value, 0.0)
    square = value * value
    first = (tl.load(coefficients + 1).to(tl.float32) * _scale(value, width, eps, NORMALIZED))[:, None]
    second = (tl.load(coefficients + 2).to(tl.float32) * _scale(square, width, eps, NORMALIZED))[:, None]
    third = (tl.load(coefficients + 3).to(tl.float32) * _scale(square * value, width, eps, NORMALIZED))[:, None]
    total = tl.load(coefficients).to(tl.float32) + value * (first + value * (second + value * third))
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slopes(raised, given, coefficient, width, eps, NORMALIZED: tl.constexpr):
    """A power's gradient is `one * given - other * raised`, of which this gives `one` and `other`, `[rows, 1]`.

    Third is each row's share of the coefficient's gradient.
    """
    scale = _scale(raised, width, eps, NORMALIZED)
    share = scale * tl.sum(given * raised, 1)
    one = coefficient * scale
    other = tl.zeros_like(one)
    if NORMALIZED:
        other = one * scale * share / width
    return one[:, None], other[:, None], share


@triton.jit
def polynomial_backward(
    grad,
    x,
    coefficients,
    grad_x,
    grad_coefficients,
    rows,
    width,
    eps,
    NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program goes through every `programs`-th tile and leaves its shares in a row of `grad_coefficients`.

    All that is summed over a row is summed first, so that only `x` and `grad` need registers meanwhile.
    """
    ROWS: tl.constexpr = rows_of(TILE, BLOCK)
    program, programs = tl.program_id(0), tl.num_programs(0)
    shares = tl.zeros([ROWS], tl.float32)
    shares_1, shares_2, shares_3 = shares, shares, shares
    factor_1 = tl.load(coefficients + 1).to(tl.float32)
    factor_2 = tl.load(coefficients + 2).to(tl.float32)
    factor_3 = tl.load(coefficients + 3).to(tl.float32)
    for index in range(program, tl.cdiv(rows, ROWS) * tl.cdiv(width, BLOCK), programs):
        row, column, inside = _place(tl.full([], index, tl.int64), rows, width, ROWS, BLOCK)
        value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        shares += tl.sum(given, 1)
        if not NORMALIZED:
            given = tl.where(value > 0, given, 0.0)
            value = tl.where(value > 0, value, 0.0)
        square = value * value
        one_1, other_1, share = _slopes(value, given, factor_1, width, eps, NORMALIZED)
        shares_1 += share
        one_2, other_2, share = _slopes(square, given, factor_2, width, eps, NORMALIZED)
        shares_2 += share
        one_3, other_3, share = _slopes(square * value, given, factor_3, width, eps, NORMALIZED)
        shares_3 += share
        change = given * (one_1 + value * (2 * one_2 + 3 * one_3 * value))
        if NORMALIZED:
            change -= value * (other_1 + square * (2 * other_2 + 3 * other_3 * square))
        tl.store(grad_x + row * width + column, change.to(grad_x.dtype.element_ty), mask=inside)
    own = grad_coefficients + program * 4
    tl.store(own, tl.sum(shares, 0))
    tl.store(own + 1, tl.sum(shares_1, 0))
    tl.store(own + 2, tl.sum(shares_2, 0))
    tl.store(own + 3, tl.sum(shares_3, 0))
