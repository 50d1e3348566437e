"""The operators on kernels, interpreted: as torch knows them, and where no row or column fills a tile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from agreement import assert_agrees
from flops import counted_flops
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.launch import without_gpu

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed on this system", exc_type=ImportError)

OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with without_gpu("sm_90"):
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def on_kernels(x: Tensor, weight: Tensor, offsets: Tensor, **parts: Tensor) -> Tensor:
    with kernels.use(grouped_matmul=kernels.dispatch.chosen("grouped_matmul") or "triton"):
        return kernels.grouped_matmul(x, weight, offsets, **parts)


@pytest.mark.parametrize("shared", [True, False])
def test_operators_are_well_formed(shared: bool) -> None:
    from zoo.kernels.grouped import triton_path

    x, offsets, widths = draw(5, 4), torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 2])
    weight = (draw(4, 3) if shared else draw(3, 4, 3)).mT
    source = torch.tensor([4, 0, 0, 1, 2]) if shared else None
    given = x.requires_grad_(), weight.requires_grad_(), offsets, widths, None, source
    torch.library.opcheck(triton_path.grouped_matmul, given, test_utils=OPCHECKS)
    outer = draw(5, 3), x.detach(), weight.detach(), offsets, widths, None, source
    torch.library.opcheck(torch.ops.zoo.grouped_outer_triton, outer, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("sizes", "output_width", "input_width"),
    [([1], 1, 1), ([0, 0], 3, 2), ([0], 0, 2), ([2, 1], 3, 0), ([0, 0, 1, 0, 0], 2, 33), ([1] * 20, 1, 2)],
)
def test_hardly_anything(sizes: list[int], output_width: int, input_width: int) -> None:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    x, weight = draw(sum(sizes), input_width), draw(len(sizes), output_width, input_width)
    assert_agrees("grouped_matmul", on_kernels, x, weight, offsets)


def test_any_strides() -> None:
    """Transposed rows, rows that are all one, a slice of every other channel of a weight, offsets in 32 bits."""
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert_agrees("grouped_matmul", on_kernels, draw(4, 5).T, draw(2, 3, 8)[..., ::2], offsets)
    assert_agrees("grouped_matmul", on_kernels, draw(1, 4).expand(5, 4), draw(2, 4, 3).mT, offsets)


def test_everything_at_once() -> None:
    offsets, source = torch.tensor([0, 3, 3, 9]), torch.tensor([1, 0, 3, 3, 2, 0, 1, 1, 2])
    widths, depths = torch.tensor([4, 2, 5]), torch.tensor([33, 1, 20])

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return on_kernels(x, weight, offsets, source=source, output_widths=widths, input_widths=depths)

    assert_agrees("grouped_matmul", product, draw(4, 40), draw(3, 6, 40))


def test_wrong_integers_stay_inside_the_tensors() -> None:
    """What lies on a GPU is not checked by the host: groups that make sense are right all the same."""
    x, weight, source = draw(6, 4), draw(3, 2, 4), torch.tensor([0, 1, 2, 3, -(10**12), 10**12])
    with kernels.use(grouped_matmul="triton"):
        found = kernels.grouped_matmul(
            x,
            weight,
            torch.tensor([0, 2, 2, 10**12]),
            source=source,
            output_widths=torch.tensor([-(10**12), 0, 10**12]),
        )
    expected = torch.cat([torch.zeros(2, 2), x[[2, 3, 0, 5]] @ weight[2].T])
    torch.testing.assert_close(found, expected)


def test_the_same_bits_every_time() -> None:
    given = draw(40, 20).requires_grad_(), draw(3, 9, 20).requires_grad_()
    offsets, source = torch.tensor([0, 30, 31, 80]), torch.arange(80) * 7 % 40

    def run(seed: int) -> tuple[Tensor, ...]:
        with interpreter.trials(seed) as slab, kernels.use(grouped_matmul="triton"):
            x, weight = (slab(each.detach()).requires_grad_() for each in given)
            out = kernels.grouped_matmul(x, weight, slab(offsets), source=slab(source))
            return out, *torch.autograd.grad(out.square().sum(), (x, weight))

    assert all(torch.equal(one, other) for one, other in zip(run(0), run(1), strict=True))


def test_compiles_into_one_graph() -> None:
    from zoo.kernels.grouped import triton_path

    x, weight, offsets = draw(5, 4), draw(2, 3, 4).requires_grad_(), torch.tensor([0, 2, 5])
    compiled = torch.compile(triton_path.grouped_matmul, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, weight, offsets).square().sum(), weight)
    expected = torch.autograd.grad(kernels.grouped_matmul(x, weight, offsets).square().sum(), weight)
    torch.testing.assert_close(found, expected)


def test_exports_for_any_number_of_rows() -> None:
    """Sizes that kernels refuse bound no size that is left open."""

    class Product(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
            return kernels.grouped_matmul(x, weight, offsets)

    given, shapes = (draw(5, 4), draw(2, 3, 4), torch.tensor([0, 2, 5])), ({0: torch.export.Dim("rows")}, None, None)
    with kernels.use(grouped_matmul="triton"):
        exported = torch.export.export(Product(), given, dynamic_shapes=shapes, strict=True).module()
    longer = draw(7, 4), given[1], torch.tensor([0, 2, 7])
    torch.testing.assert_close(exported(*longer), kernels.grouped_matmul(*longer))


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    with kernels.use(block_diagonal_matmul=kernels.dispatch.chosen("block_diagonal_matmul") or "triton"):
        return kernels.block_diagonal_matmul(x, weight, interleaved=True)


def test_interleaved_operators_are_well_formed() -> None:
    from zoo.kernels.grouped import interleaved_path

    assert interleaved_path.block_diagonal_matmul
    x, weight = draw(5, 6).requires_grad_(), draw(3, 2, 4).requires_grad_()
    torch.library.opcheck(torch.ops.zoo.interleaved_matmul_triton, (x, weight), test_utils=OPCHECKS)
    outer = draw(5, 12), x.detach(), weight.detach()
    torch.library.opcheck(torch.ops.zoo.interleaved_outer_triton, outer, test_utils=OPCHECKS)
    once = 2 * 5 * 3 * 2 * 4
    assert counted_flops(mixed, x, weight) == once
    assert counted_flops(lambda: mixed(x, weight).sum().backward()) == 3 * once


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((2, 3, 33), (33, 1, 1)), ((6,), (2, 3, 5)), ((3, 0, 4), (4, 1, 2)), ((2, 0), (3, 0, 2)), ((2, 6), (3, 2, 0))],
)
def test_hardly_any_blocks(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    assert_agrees("block_diagonal_matmul", mixed, draw(*shape), draw(*sizes))


def test_interleaved_rows_with_any_strides() -> None:
    assert_agrees("block_diagonal_matmul", mixed, draw(6, 5).T, draw(3, 4, 4)[:, ::2, ::2])
    assert_agrees("block_diagonal_matmul", mixed, draw(1, 6).expand(5, 6), draw(3, 4, 2).mT)
    assert_agrees("block_diagonal_matmul", mixed, draw(5, 9)[:, 2:8], draw(1, 2, 4).expand(3, 2, 4))


def test_blocks_too_wide_for_plain_multiplications() -> None:
    with pytest.raises(ZooError, match="takes interleaved blocks up to 32 wide, not 33"):
        mixed(draw(2, 66), draw(2, 33, 3))
