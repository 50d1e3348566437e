"""Grouped products on Triton kernels. Nothing is read back from the device: the grid hangs on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from zoo.kernels.grouped import routing_kernels, triton_kernels
from zoo.kernels.grouped.operators import complete, empty_gradient
from zoo.kernels.launch import Launches

_LAUNCHES = Launches("grouped")


@torch.library.custom_op("zoo::grouped_matmul_triton", mutates_args=())
def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    output_widths: Tensor | None = None,
    input_widths: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    if 1 not in weight.stride()[-2:]:
        weight = weight.contiguous()
    x, source, rows = _rows(x), _line(source), (x if source is None else source).shape[0]
    inputs, outputs, groups = x.shape[1], weight.shape[-2], offsets.shape[0] - 1
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out

    def grid(of: Mapping[str, int]) -> tuple[int]:
        return ((rows // of["BLOCK_ROWS"] + groups) * triton.cdiv(outputs, of["OUTPUT_BYTES"] // x.element_size()),)

    tensors = x, source, weight, _line(offsets), _line(output_widths), _line(input_widths), out
    strides = x.stride(0), weight.stride(0) if weight.dim() == 3 else 0, *weight.stride()[-2:]
    _LAUNCHES.run(
        triton_kernels.grouped_product,
        grid,
        x.device,
        {"rows_of_group": rows // groups},
        *(*tensors, x.shape[0], rows, groups, outputs, inputs, *strides),
        HAS_SOURCE=source is not None,
        HAS_OUTPUT_WIDTHS=output_widths is not None,
        HAS_INPUT_WIDTHS=input_widths is not None,
    )
    return out


@torch.library.custom_op("zoo::grouped_outer_triton", mutates_args=())
def _grouped_outer(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    output_widths: Tensor | None = None,
    input_widths: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    out = empty_gradient(weight)
    if not out.numel():
        return out
    (outputs, inputs), groups, shared = weight.shape[-2:], offsets.shape[0] - 1, weight.dim() == 2

    def grid(of: Mapping[str, int]) -> tuple[int]:
        tiles = triton.cdiv(outputs, of["BLOCK_OUTPUTS"]) * triton.cdiv(inputs, of["INPUT_BYTES"] // x.element_size())
        return (tiles if shared else tiles * groups,)

    grad, x = _rows(grad), _rows(x)
    tensors = grad, x, _line(source), _line(offsets), _line(output_widths), _line(input_widths), out
    strides = grad.stride(0), x.stride(0), 0 if shared else out.stride(0), *out.stride()[-2:]
    _LAUNCHES.run(
        triton_kernels.grouped_outer,
        grid,
        x.device,
        # An index is loaded a step before the row that it names, which takes more stages.
        {"by_index": source is not None},
        *(*tensors, x.shape[0], grad.shape[0], groups, outputs, inputs, *strides),
        HAS_SOURCE=source is not None,
        HAS_OUTPUT_WIDTHS=output_widths is not None,
        HAS_INPUT_WIDTHS=input_widths is not None,
        SHARED=shared,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """`x` with each row in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _line(values: Tensor | None) -> Tensor | None:
    """Integers in one piece."""
    return None if values is None else values.contiguous()


complete(grouped_matmul, _grouped_outer)


def subset_matmul(x: Tensor, weight: Tensor, subsets: Tensor, transposed: bool) -> Tensor:
    """Each block with all rows that take it, as a grouped product over (row, slot) pairs sorted by block."""
    taken, pairs = subsets.shape[1], subsets.numel()
    chosen, order = subsets.flatten().sort(stable=True)
    offsets = torch.searchsorted(chosen, torch.arange(weight.shape[0] + 1, device=chosen.device, dtype=chosen.dtype))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=order.device)).view_as(subsets)
    # Looked up as embeddings, whose gradient is summed in a fixed order.
    if transposed:
        return F.embedding(place, grouped_matmul(x, weight.mT, offsets, None, None, order // max(1, taken)))
    products = grouped_matmul(x.reshape(pairs, x.shape[-1]), weight, offsets, None, None, order)
    return F.embedding(place, products).sum(1)


@torch.library.custom_op("zoo::route_triton", mutates_args=())
def _route(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, (rows, choices) = _rows(scores), scores.shape
    chosen, order, place, offsets = _routing(scores, top_k)
    width, device = triton.next_power_of_2(choices), scores.device
    # Both kernels that go through rows must cut them alike.
    tile = _LAUNCHES.configuration("route_choose", device, {})["TILE"]
    blocks = triton.cdiv(rows, tile // width)
    counts = torch.empty(blocks, choices, dtype=torch.int32, device=device)
    starts = torch.empty(blocks, choices, dtype=torch.int64, device=device)
    if blocks:
        arguments = scores, chosen, counts, rows, choices, scores.stride(0), top_k, width
        _LAUNCHES.run(routing_kernels.route_choose, (blocks,), device, {}, *arguments)
    _LAUNCHES.run(routing_kernels.route_scan, (1,), device, {}, counts, starts, offsets, blocks, choices, width)
    if blocks:
        arguments = chosen, starts, offsets, order, place, rows, choices, top_k, width, tile
        _LAUNCHES.run(routing_kernels.route_place, (blocks,), device, {}, *arguments)
    return chosen, order, place, offsets


@_route.register_fake
def _routing(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen, order, place and offsets, not filled in."""
    rows, choices = scores.shape
    sizes = (rows, top_k), (rows * top_k,), (rows, top_k), (choices + 1,)
    chosen, order, place, offsets = (scores.new_empty(size, dtype=torch.int64) for size in sizes)
    return chosen, order, place, offsets


def route(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _route(scores, top_k)
