"""Matrix products with a weight for each group of rows or of columns; see the public functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels import checks, launch
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.grouped import reference, subset_path, torch_path

WIDEST_INTERLEAVED = 32
"""Widest interleaved block whose plain multiplications keep up with memory."""
MOST_CHOICES = 1024
"""Most choices of which the kernel holds a row in registers."""


class Routing(NamedTuple):
    """Which choices each row takes, and the (row, choice) pairs sorted by choice."""

    chosen: Tensor
    """`[rows, top_k]`, the best first."""
    order: Tensor
    """`[rows * top_k]`: the numbers `row * top_k + k` of the pairs, sorted by choice; equal choices by number."""
    place: Tensor
    """`[rows, top_k]`: where each pair stands in `order`."""
    offsets: Tensor
    """`[choices + 1]`: where each choice's pairs begin, as `grouped_matmul` takes them."""


def _grouped_matmul_kernel(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    output_widths: Tensor | None,
    input_widths: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    from zoo.kernels.grouped import triton_path

    return triton_path.grouped_matmul(x, weight, offsets, output_widths, input_widths, source)


_GROUPED_MATMUL = Primitive(
    "grouped_matmul",
    (
        Implementation("triton", _grouped_matmul_kernel, launch.refusal),
        Implementation("torch", torch_path.grouped_matmul),
        Implementation("reference", reference.grouped_matmul),
    ),
)


def _serves_blocks(call: Call) -> str | None:
    facts = call.facts
    if (reason := launch.refusal(call)) is not None or not facts:
        return reason
    if not facts["interleaved"]:
        return "adjoining blocks are served by PyTorch's batched products, which copy nothing"
    if (width := max(facts["input_width"], facts["output_width"])) > WIDEST_INTERLEAVED:
        return f"takes interleaved blocks up to {WIDEST_INTERLEAVED} wide, not {width}"
    return None


def _interleaved_kernel(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    from zoo.kernels.grouped import interleaved_path

    del interleaved
    return interleaved_path.block_diagonal_matmul(x, weight)


_BLOCK_DIAGONAL = Primitive(
    "block_diagonal_matmul",
    (
        Implementation("triton", _interleaved_kernel, _serves_blocks),
        Implementation("torch", torch_path.block_diagonal_matmul),
        Implementation("reference", reference.block_diagonal_matmul),
    ),
)


def _serves_routing(call: Call) -> str | None:
    choices = call.facts.get("choices", 0)
    too_many = f"takes up to {MOST_CHOICES} choices, not {choices}" if choices > MOST_CHOICES else None
    return launch.refusal(call) or too_many


def _route_kernel(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from zoo.kernels.grouped import triton_path

    return triton_path.route(scores, top_k)


_ROUTE = Primitive(
    "route",
    (
        Implementation("triton", _route_kernel, _serves_routing),
        Implementation("torch", torch_path.route),
        Implementation("reference", reference.route),
    ),
)


def _subset_matmul_kernel(x: Tensor, weight: Tensor, subsets: Tensor, transposed: bool) -> Tensor:
    from zoo.kernels.grouped import triton_path

    return triton_path.subset_matmul(x, weight, subsets, transposed)


_SUBSET_MATMUL = Primitive(
    "subset_matmul",
    (
        Implementation("triton", _subset_matmul_kernel, launch.refusal),
        Implementation("torch", subset_path.subset_matmul),
        Implementation("reference", reference.subset_matmul),
    ),
)
PRIMITIVES = (_GROUPED_MATMUL, _BLOCK_DIAGONAL, _ROUTE, _SUBSET_MATMUL)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    source: Tensor | None = None,
    output_widths: Tensor | None = None,
    input_widths: Tensor | None = None,
) -> Tensor:
    """Row `i` of group `g` becomes `weight_g x_i`: the products of a mixture of experts, without padding.

    Args:
        x: `[rows, input_width]`, rows sorted by group; or in any order, with `source`.
        weight: `[groups, output_width, input_width]`, or `[output_width, input_width]` for all groups.
        offsets: integers `[groups + 1]`, from 0 to `rows`; group `g` owns rows `offsets[g]` to `offsets[g + 1]`, which
            may be none. `sort_by_group` gives them.
        source: integers `[rows]`: row `i` of the product reads `x[source[i]]`, as of a token that several experts take,
            without a copy of `x` in the order of the groups. None is row `i` itself.
        output_widths: integers `[groups]`, from 0 to `output_width`: group `g` has only the first `output_widths[g]`
            outputs, the others are 0. None is all.
        input_widths: integers `[groups]`: group `g` reads only the first `input_widths[g]` inputs. None is all.

    With a weight for all groups the widths are MatFormer's nested networks, of different sizes in one batch (Devvrit et
    al. 2023, arXiv 2310.07707): with `up` and `down` `[hidden, width]` and the tokens sorted by size,
    `h = act(grouped_matmul(x, up, offsets, output_widths=m))`, `y = grouped_matmul(h, down.T, offsets,
    input_widths=m)`. A group costs what its widths say.

    Returns:
        `[rows, output_width]`. Differentiable once in `x` and `weight`; an empty group's weight has gradient zero.

    Under autocast both operands are cast to its dtype, as a linear layer's are.
    `O(rows input_width output_width)`. Raises `ZooError` for shapes, dtypes and devices that do not fit. Offsets that
    do not ascend from 0 to `rows`, and widths outside the weight, raise it where the host sees them; on a GPU, which is
    not waited for, widths and `source` are clamped and wrong offsets leave rows undefined.
    """
    name = "grouped_matmul"
    checks.rank(name, "x", x, "rows, input_width")
    checks.rank(name, "offsets", offsets, "groups + 1")
    checks.integers(name, "offsets", offsets)
    checks.is_tensor(name, "weight", weight)
    if weight.dim() == 2:
        axes = "output_width, input_width"
        checks.shape(name, "weight", weight, axes, (weight.shape[0], x.shape[1]))
    else:
        axes = "groups, output_width, input_width"
        checks.rank(name, "weight", weight, axes)
        checks.shape(name, "weight", weight, axes, (*weight.shape[:2], x.shape[1]))
        checks.shape(name, "offsets", offsets, "groups + 1", (weight.shape[0] + 1,))
    if source is not None:
        checks.rank(name, "source", source, "rows")
        checks.integers(name, "source", source)
    groups, rows = offsets.shape[0] - 1, (x if source is None else source).shape[0]
    if groups < 1 and not (groups == 0 and rows == 0):
        checks.fail(name, f"offsets has shape {list(offsets.shape)}, no group for {rows} rows")
    if rows and not x.shape[0]:
        checks.fail(name, f"source asks for {rows} rows, x has none")
    for parameter, widths in (("output_widths", output_widths), ("input_widths", input_widths)):
        if widths is not None:
            checks.integers(name, parameter, widths)
            checks.shape(name, parameter, widths, "groups", (groups,))
    checks.one_device(
        name, x=x, weight=weight, offsets=offsets, source=source, output_widths=output_widths, input_widths=input_widths
    )
    x, weight = _one_dtype(name, x, weight)
    call = Call(x.device.type, x.dtype, {"rows": rows, "groups": groups})
    return _GROUPED_MATMUL.select(call)(x, weight, offsets, output_widths, input_widths, source)


def sort_by_group(group_of_row: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by group, and where each group begins.

    `group_of_row` is `[rows]`, integers from 0 to `groups - 1`. Returns `order` `[rows]`, stable, so that
    `x[order]` is sorted, and `offsets` `[groups + 1]` as `grouped_matmul` takes them. `O(rows log rows)`.
    """
    checks.rank("sort_by_group", "group_of_row", group_of_row, "rows")
    checks.integers("sort_by_group", "group_of_row", group_of_row)
    sorted_groups, order = torch.sort(group_of_row, stable=True)
    bounds = torch.arange(groups + 1, device=group_of_row.device, dtype=sorted_groups.dtype)
    return order, torch.searchsorted(sorted_groups, bounds)


def route(scores: Tensor, top_k: int) -> Routing:
    """The `top_k` choices of each row with the highest scores, and the pairs sorted by choice, for `grouped_matmul`.

    `scores` is `[rows, choices]`. The result is integers, to which no gradient flows; the weights of the choices are
    `scores.gather(-1, chosen)`. With `routing = route(scores, k)` the experts' first product is
    `grouped_matmul(x, weight, routing.offsets, source=routing.order // k)`, and row `routing.place[i, j]` of what the
    experts make belongs to token `i` and its choice `j`.

    NaN counts as the highest score. Of equal scores the reference and the kernel take the first, `torch.topk` any.
    `O(rows choices top_k)`. Raises `ZooError` unless `scores` is a floating-point matrix and `top_k` from 1 to
    `choices`.
    """
    checks.rank("route", "scores", scores, "rows, choices")
    checks.floats("route", scores=scores)
    choices = scores.shape[1]
    if not 1 <= top_k <= choices:
        checks.fail("route", f"top_k is {top_k}, expected 1 to the number of choices, {choices}")
    call = Call(scores.device.type, scores.dtype, {"choices": choices})
    return Routing(*_ROUTE.select(call)(scores.detach(), top_k))


def subset_matmul(x: Tensor, weight: Tensor, subsets: Tensor, *, transposed: bool = False) -> Tensor:
    """Each row meets the blocks of a weight that it takes: routed sub-dimensions.

    With `weight` `[blocks, output_width, input_width]` and the blocks `subsets` `[rows, taken]` of each row `r`

        y_r = sum_j weight[subsets_rj] x_rj         x [rows, taken, input_width], y [rows, output_width]
        y_rj = weight[subsets_rj]^T x_r             x [rows, output_width], y [rows, taken, input_width], if transposed

    Args:
        x: as above.
        weight: `[blocks, output_width, input_width]`.
        subsets: integers `[rows, taken]`, from 0 to `blocks - 1`, in any order. Rows that take the same blocks in the
            same order should adjoin (`sort_by_subset`); on the CPU they are then one product.
        transposed: whether a row is spread over the blocks that it takes, instead of gathered from them.

    Differentiable once in `x` and `weight`; a block that no row takes has gradient zero. Under autocast both operands
    are cast to its dtype.

    `O(rows taken input_width output_width)`. Raises `ZooError` for shapes, dtypes and devices that do not fit, and for
    blocks that do not exist where the host sees them. Source: Chen et al. 2024, Mixture of Hidden-Dimensions
    Transformer.
    """
    name = "subset_matmul"
    checks.rank(name, "weight", weight, "blocks, output_width, input_width")
    checks.rank(name, "subsets", subsets, "rows, taken")
    checks.integers(name, "subsets", subsets)
    (rows, taken), (blocks, outputs, inputs) = subsets.shape, weight.shape
    if transposed:
        checks.shape(name, "x", x, "rows, output_width", (rows, outputs))
    else:
        checks.shape(name, "x", x, "rows, taken, input_width", (rows, taken, inputs))
    if subsets.numel() and not blocks:
        checks.fail(name, f"weight has shape {list(weight.shape)}, no block for {rows} rows")
    checks.one_device(name, x=x, weight=weight, subsets=subsets)
    x, weight = _one_dtype(name, x, weight)
    call = Call(x.device.type, x.dtype, {"pairs": rows * taken, "blocks": blocks})
    return _SUBSET_MATMUL.select(call)(x, weight, subsets, transposed)


def sort_by_subset(subsets: Tensor, blocks: int) -> Tensor:
    """An order `[rows]` of the rows of `subsets` `[rows, taken]`, integers below `blocks`, in which equal ones adjoin.

    Stable; subsets with the same beginning adjoin as well. `O(rows (taken + log rows))`.
    """
    checks.rank("sort_by_subset", "subsets", subsets, "rows, taken")
    checks.integers("sort_by_subset", "subsets", subsets)
    # Where numbers of so many digits overflow, unequal subsets may meet; equal ones still do.
    key = torch.zeros_like(subsets[:, 0], dtype=torch.int64)
    for column in subsets.unbind(1):
        key = key * blocks + column
    return key.sort(stable=True).indices


def block_diagonal_matmul(x: Tensor, weight: Tensor, *, interleaved: bool = False) -> Tensor:
    """`x @ diag(weight_0, weight_1, ...)`: each part of the last dimension meets a matrix of its own.

    `x` is `[..., blocks * input_width]`, `weight` `[blocks, input_width, output_width]`; the result is `[..., blocks *
    output_width]`. If `interleaved`, block `j` has the channels `j, j + blocks, j + 2 blocks, ...` of both instead of
    adjoining ones. Differentiable once. Under autocast both operands are cast to its dtype.

    `O(rows blocks input_width output_width)`, a `blocks`-th of the whole matrix. Raises `ZooError` for shapes, dtypes
    and devices that do not fit. Source: Dao et al. 2022, arXiv 2204.00595 (one factor of a Monarch matrix).
    """
    name = "block_diagonal_matmul"
    checks.rank(name, "weight", weight, "blocks, input_width, output_width")
    blocks, input_width, output_width = weight.shape
    checks.is_tensor(name, "x", x)
    if x.dim() == 0 or x.shape[-1] != blocks * input_width:
        expected = f"[..., blocks * input_width] = [..., {blocks * input_width}]"
        checks.fail(name, f"x has shape {list(x.shape)}, expected {expected} for weight {list(weight.shape)}")
    checks.one_device(name, x=x, weight=weight)
    x, weight = _one_dtype(name, x, weight)
    facts = {
        "rows": x.shape[:-1].numel(),
        "blocks": blocks,
        "input_width": input_width,
        "output_width": output_width,
        "interleaved": interleaved,
    }
    return _BLOCK_DIAGONAL.select(Call(x.device.type, x.dtype, facts))(x, weight, interleaved)


def _one_dtype(name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands as autocast wants them, else as they are."""
    if (dtype := checks.autocast_dtype(x.device.type)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    checks.floats(name, x=x, weight=weight)
    if weight.dtype != x.dtype:
        checks.fail(name, f"x has dtype {x.dtype} and weight {weight.dtype}, expected one dtype")
    return x, weight
