"""Matrix products with a weight for each group of rows; see `grouped_matmul` and `sort_by_group`."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.grouped import reference, torch_path

_GROUPED_MATMUL = Primitive(
    "grouped_matmul",
    (
        Implementation("torch", torch_path.grouped_matmul),
        Implementation("reference", reference.grouped_matmul),
    ),
)
PRIMITIVES = (_GROUPED_MATMUL,)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Row `i` of group `g` becomes `weight_g x_i`: the products of a mixture of experts, without padding.

    Args:
        x: `[rows, input_width]`, rows sorted by group.
        weight: `[groups, output_width, input_width]`.
        offsets: integers `[groups + 1]`, from 0 to `rows`; group `g` owns rows `offsets[g]` to `offsets[g + 1]`, which
            may be none. `sort_by_group` gives them.

    Returns:
        `[rows, output_width]`. Differentiable once in `x` and `weight`; an empty group's weight has gradient zero.

    Under autocast both operands are cast to its dtype, as a linear layer's are.
    `O(rows input_width output_width)`. Raises `ZooError` for shapes that do not fit, and for offsets that do not
    ascend from 0 to `rows`.
    """
    name = "grouped_matmul"
    checks.rank(name, "x", x, "rows, input_width")
    checks.rank(name, "weight", weight, "groups, output_width, input_width")
    checks.rank(name, "offsets", offsets, "groups + 1")
    checks.integers(name, "offsets", offsets)
    groups, output_width, _ = weight.shape
    axes = "groups, output_width, input_width"
    checks.shape(name, "weight", weight, axes, (groups, output_width, x.shape[1]))
    checks.shape(name, "offsets", offsets, "groups + 1", (groups + 1,))
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _GROUPED_MATMUL.select(Call(x.device.type, x.dtype, {"groups": groups}))(x, weight, offsets)


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
