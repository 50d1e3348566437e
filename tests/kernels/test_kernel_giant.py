"""Calls with places in memory that 32 bits do not hold, and sizes that are refused.

Memory is mapped and not touched, so that a tensor costs what is read and written of it. Of tensors with more than 2^31
elements that is the end, which a launch's last programs compute; it must be what it is alone. Tensors that a kernel
reads by their strides may as well be small, with their elements far apart.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.launch import without_gpu

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed on this system", exc_type=ImportError)

LIMIT = 2**31
NO_RESERVE = 0x4000
"""`MAP_NORESERVE` of Linux, which Python names from 3.13 on."""
LARGE = 2**22
"""Elements from which a tensor is mapped."""
LONG = -1
"""The dimension of a shape that makes a tensor large."""


def mapped(shape: tuple[int, ...], dtype: torch.dtype, *, scattered: bool = False) -> Tensor:
    """Zeros that take no memory until they are written, a small page at a time if what is written lies `scattered`."""
    size = prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    if not scattered:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)


@contextmanager
def lazy() -> Iterator[None]:
    """Within the block large results are mapped as well, and the kernels of norms have a program for each block."""
    plain = torch.empty, torch.empty_like, torch.zeros_like, Tensor.new_empty, Tensor.new_zeros

    def empty(*size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        wanted = dtype or torch.get_default_dtype()
        return mapped(shape, wanted) if prod(shape) > LARGE else plain[0](shape, dtype=wanted, **rest)

    def empty_like(tensor: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(tuple(tensor.shape), dtype=dtype or tensor.dtype)

    def zeros_like(tensor: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return new_zeros(tensor, *tensor.shape, dtype=dtype)

    def new_empty(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(*size, dtype=dtype or tensor.dtype)

    def new_zeros(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        found = empty(*size, dtype=dtype or tensor.dtype)
        return found if found.numel() > LARGE else found.zero_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        patch.setattr(torch, "zeros_like", zeros_like)
        patch.setattr(Tensor, "new_empty", new_empty)
        patch.setattr(Tensor, "new_zeros", new_zeros)
        for path in ("triton_path", "activation_path"):
            patch.setattr(f"zoo.kernels.pointwise.{path}.processors", lambda _: LIMIT)
        yield


@contextmanager
def last_programs(count: int) -> Iterator[None]:
    """Within the block only the last `count` programs along a grid's longest axis run."""
    builder, executor = interpreter.BUILDER, interpreter.INTERPRETER.GridExecutor
    set_dim, set_index, call = builder.set_grid_dim, builder.set_grid_idx, executor.__call__
    whole, first = [1, 1, 1], [0, 0, 0]

    def called(self: Any, *arguments: Any, **constants: Any) -> None:
        grid = self.grid

        def last(given: Any) -> tuple[int, ...]:
            found: tuple[int, ...] = grid(given) if callable(grid) else grid  # type: ignore[assignment]
            whole[:] = (*found, 1, 1)[:3]
            longest = whole.index(max(whole))
            first[:] = [max(0, size - count) if axis == longest else 0 for axis, size in enumerate(whole)]
            return tuple(size - skipped for size, skipped in zip(whole, first, strict=True))

        self.grid = last
        call(self, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", called)
        patch.setattr(builder, "set_grid_dim", lambda self, *_: set_dim(self, *whole))
        patch.setattr(
            builder,
            "set_grid_idx",
            lambda self, *index: set_index(self, *(at + skipped for at, skipped in zip(index, first, strict=True))),
        )
        # It would copy every tensor over itself.
        patch.setattr(executor, "_restore_args_dev", lambda *_: None)
        yield


@dataclass(frozen=True)
class Giant:
    """A call whose largest input is above the limit, by the length of one dimension, and its other arguments."""

    primitive: str
    shapes: dict[str, tuple[int, ...]]
    """By argument; `LONG` is the dimension that all have in common."""
    rest: dict[str, Any] = field(default_factory=dict)
    by_length: Callable[[int], dict[str, Any]] = lambda length: {}
    """Arguments that hang on the length."""
    dtype: torch.dtype = torch.float16
    programs: int = 2
    backward: bool = True
    about: str = ""

    def __str__(self) -> str:
        return f"{self.primitive}-{self.about}" if self.about else self.primitive

    @property
    def length(self) -> int:
        return LIMIT // max(-prod(shape) for shape in self.shapes.values()) + 3


SCANNED = {"x": (LONG, 32, 32), "delta": (LONG, 32, 32), "B": (LONG, 32, 1), "C": (LONG, 32, 1)}

GIANTS = (
    Giant("attention", dict.fromkeys("qkv", (LONG, 64, 4, 256)), {"window": 8}, programs=1),
    Giant(
        "attention",
        {"q": (LONG, 1, 4, 256), "k": (LONG, 64, 4, 256), "v": (LONG, 64, 4, 256)},
        {"past": 63, "window": 40},
        backward=False,
        about="decode",
    ),
    Giant("recurrence", dict.fromkeys("qkv", (LONG, 8, 1, 64)), dtype=torch.float32),
    Giant("delta_rule", {**dict.fromkeys("qkv", (LONG, 8, 1, 64)), "beta": (LONG, 8, 1)}),
    Giant("selective_scan", SCANNED, {"A": -torch.ones(32, 1)}),
    Giant("diagonal_scan", {"x": (LONG, 4, 64), "decay": (LONG, 4, 64)}),
    Giant("causal_convolution", {"x": (LONG, 16, 64)}, {"weight": torch.ones(64, 4)}),
    Giant(
        "grouped_matmul",
        {"x": (LONG, 64)},
        {"weight": torch.eye(64)[None].half()},
        lambda rows: {"offsets": torch.tensor([0, rows])},
    ),
    Giant(
        "subset_matmul",
        {"x": (LONG, 1, 4096)},
        {"weight": torch.ones(1, 16, 4096).half()},
        lambda rows: {"subsets": torch.zeros(rows, 1, dtype=torch.int64)},
        backward=False,
    ),
    Giant("block_diagonal_matmul", {"x": (LONG, 64)}, {"weight": torch.ones(16, 4, 4).half(), "interleaved": True}),
    Giant("rms_norm", {"x": (LONG, 64)}, {"weight": torch.ones(64)}),
    Giant("rms_norm", {"x": (LONG, 16384)}, about="wide"),
    Giant("layer_norm", {"x": (LONG, 64)}),
    Giant("rotary", {"x": (LONG, 4, 4, 64)}, {"positions": torch.arange(4)}),
    Giant("rotary_pair", dict.fromkeys("qk", (LONG, 4, 4, 64)), {"positions": torch.arange(4)}, backward=False),
    Giant("gated_activation", {"gate": (LONG, 4096), "up": (LONG, 4096)}),
    Giant("polynomial_activation", {"x": (LONG, 4096)}, {"coefficients": torch.arange(4.0)}),
    Giant(
        "polynomial_activation",
        {"x": (LONG, 4096)},
        {"coefficients": torch.arange(4.0), "normalized": True},
        about="normalized",
    ),
)


@pytest.mark.parametrize("giant", GIANTS, ids=str)
def test_places_beyond_32_bits(giant: Giant) -> None:
    drawn = torch.Generator().manual_seed(0)
    whole, alone = {}, {}
    for name, shape in giant.shapes.items():
        length, axis = giant.length, shape.index(LONG)
        whole[name] = mapped(tuple(length if size == LONG else size for size in shape), giant.dtype)
        alone[name] = torch.rand([abs(size) for size in shape], generator=drawn).mul_(0.5).to(giant.dtype)
        whole[name].narrow(axis, length - 1, 1).copy_(alone[name])
        whole[name].requires_grad_(giant.backward)
        alone[name].requires_grad_(giant.backward)
    with kernels.use(**{giant.primitive: "triton"}), without_gpu("sm_90"), lazy():
        with last_programs(giant.programs):
            outputs = called(giant, whole, giant.length)
        expected = called(giant, alone, 1)
    for index, (out, other) in enumerate(zip(outputs, expected, strict=True)):
        last = out.narrow(out.shape.index(giant.length), giant.length - 1, 1)
        assert torch.equal(last, other), f"output {index}"


def called(giant: Giant, tensors: dict[str, Tensor], length: int) -> list[Tensor]:
    """Outputs and, from ones at the end of the first, gradients."""
    found = getattr(kernels, giant.primitive)(**tensors, **giant.rest, **giant.by_length(length))
    outputs = [found] if isinstance(found, Tensor) else [*found]
    if not giant.backward:
        return outputs
    given = mapped(tuple(outputs[0].shape), outputs[0].dtype)
    given[-1:] = 1
    return [*outputs, *torch.autograd.grad(outputs[0], [*tensors.values()], given)]


def test_tokens_of_a_residue_class_far_apart() -> None:
    """The last class of a dilation, whose tokens are more than 2^31 numbers apart, in more than 2^32 of them."""
    heads, width = 4, 256
    dilation = LIMIT // (heads * width) + 1
    whole = [mapped((1, 2 * dilation, heads, width), torch.float16) for _ in range(3)]
    given = mapped((1, 2 * dilation, heads, width), torch.float16)
    drawn = torch.Generator().manual_seed(0)
    alone = [torch.rand(1, 2, heads, width, generator=drawn).half() for _ in range(3)]
    for large, small in zip(whole, alone, strict=True):
        large[:, dilation - 1 :: dilation] = small
    given[:, dilation - 1 :: dilation] = 1
    with kernels.use(attention="triton"), without_gpu("sm_90"), lazy():
        with last_programs(1):
            outputs = differentiated(kernels.attention, whole, given, dilation=dilation)
        expected = differentiated(kernels.attention, alone, torch.ones(1, 2, heads, width).half(), window=2)
    for index, (out, other) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(out[:, dilation - 1 :: dilation], other), f"output {index}"


def differentiated(
    function: Callable[..., Any], tensors: list[Tensor], given: Tensor | None = None, **rest: Any
) -> list[Tensor]:
    """The output, and the gradients of its sum or of what is `given`, of those tensors that have any."""
    wanted = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
    found = function(*tensors, **rest)
    out = found if isinstance(found, Tensor) else found[0]
    if not out.requires_grad:
        return [out]
    return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out) if given is None else given)]


@pytest.mark.parametrize("queries", [9, 1])
def test_bias_for_many_distances(queries: int) -> None:
    """The table of the last head begins beyond 2^31 entries."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, tokens, 3, 16, generator=drawn) for tokens in (queries, 9, 9))
    bias, near = mapped((3, 2**30 + 1), torch.float32), torch.rand(3, 9, generator=drawn)
    bias[:, :9] = near
    with kernels.use(attention="triton"), without_gpu("sm_90"):
        found, expected = (
            differentiated(kernels.attention, [q, k, v], bias=table, past=9 - queries) for table in (bias, near)
        )
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"output {index}"


def test_convolution_of_many_channels() -> None:
    """Taps of the last channels, beyond 2^31 numbers."""
    from zoo.kernels.convolution import triton_path  # registers the operator

    channels, forward = LIMIT // 4 + 3, torch.ops.zoo.causal_convolution_forward
    assert triton_path.causal_convolution
    x, weight = mapped((1, 1, channels), torch.float16), mapped((channels, 4), torch.float16)
    x[..., -1], weight[-1] = 3, torch.tensor([5.0, 6.0, 7.0, 8.0])
    with without_gpu("sm_90"), lazy(), last_programs(1):
        out = forward(x, weight, None, None, None, False)
    assert out[0, 0, -1] == 24


def test_chunk_of_many_logits() -> None:
    from zoo.kernels.cross_entropy import triton_path
    from zoo.kernels.cross_entropy.chunks import Settings

    vocab = 4096
    rows, settings = LIMIT // vocab + 3, Settings(-100, None, 0.0, 0.0)
    whole, losses = mapped((rows, vocab), torch.float16), torch.zeros(rows)
    alone, loss = torch.rand(1, vocab, generator=torch.Generator().manual_seed(0)).half(), torch.zeros(1)
    whole[-1:] = alone
    with without_gpu("sm_90"):
        with last_programs(1):
            triton_path.softmax_pass(whole, torch.full((rows,), 7), None, losses, settings, True)
        triton_path.softmax_pass(alone, torch.tensor([7]), None, loss, settings, True)
    assert loss > 0 and torch.equal(losses[-1:], loss)
    assert torch.equal(whole[-1:], alone)


def test_routing_of_many_rows() -> None:
    """The last two blocks of rows: scores, choices and places are each more than 2^31 numbers."""
    from zoo.kernels.grouped import routing_kernels

    sizes: dict[str, Any] = {"TOP_K": 4, "BLOCK_CHOICES": 4, "TILE": 2048}

    def routed(scores: Tensor, programs: int) -> tuple[Tensor, Tensor]:
        """Choices, and the places of pairs were those of each row alone."""
        rows, blocks = len(scores), -(-len(scores) // 512)
        chosen, order, place = (mapped((rows, 4), torch.int64) for _ in range(3))
        counts, starts = mapped((blocks, 4), torch.int32), mapped((blocks, 4), torch.int64)
        with last_programs(programs):
            routing_kernels.route_choose[(blocks,)](scores, chosen, counts, rows, 4, 4, **sizes)
            arguments = chosen, starts, torch.arange(4) * 512, order, place, rows, 4
            routing_kernels.route_place[(blocks,)](*arguments, **sizes)
        return chosen[-1], place[-1]

    scores = mapped((LIMIT // 4 + 3, 4), torch.float16)
    scores[-1] = torch.tensor([2.0, 1.0, 4.0, 3.0])
    chosen, place = routed(scores, 1)
    assert chosen.tolist() == [2, 3, 0, 1]
    assert place.tolist() == [1026, 1538, 2, 514]


def test_pairs_behind_many_others() -> None:
    """Counts of earlier blocks that add up to more than 2^31, and pairs that are put behind them."""
    from zoo.kernels.grouped import routing_kernels

    sizes: dict[str, Any] = {"BLOCK_CHOICES": 2, "TILE": 8}
    pairs: dict[str, Any] = {"TOP_K": 1, **sizes}
    counts = torch.full((3, 2), 2**30, dtype=torch.int32)
    starts, offsets = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    routing_kernels.route_scan[(1,)](counts, starts, offsets, 3, 2, **sizes)
    assert starts.tolist() == [[0, 0], [2**30, 2**30], [2**31, 2**31]]
    assert offsets.tolist() == [0, 3 * 2**30, 6 * 2**30]
    chosen, place = torch.tensor([[1], [0]]), torch.zeros(2, 1, dtype=torch.int64)
    order = mapped((6 * 2**30,), torch.int64)
    routing_kernels.route_place[(1,)](chosen, starts[2:], offsets, order, place, 2, 2, **pairs)
    assert place.tolist() == [[5 * 2**30], [2**31]]
    assert order[place].tolist() == [[0], [1]]


def spread(tensor: Tensor, axis: int, step: int) -> Tensor:
    """The same numbers, `step` of them apart along an axis."""
    strides = [*tensor.stride()]
    strides[axis] = step
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return mapped((extent,), tensor.dtype, scattered=True).as_strided(tensor.shape, strides).copy_(tensor)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def turned(x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
    return kernels.grouped_matmul(x, weight.mT, **rest)


@dataclass(frozen=True)
class Spread:
    """A call of tensors of which one has a long stride along an axis; `call` defaults to the primitive itself."""

    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    place: int
    axis: int
    rest: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.primitive}-{self.place}-{self.axis}"


ROTATED = {"positions": torch.arange(3)}
GROUPS = {"offsets": torch.tensor([0, 2, 3, 5])}
SCAN = ((1, 5, 8), (1, 5, 8), (8, 4), (1, 5, 4), (1, 5, 4))
SPREADS = (
    *(Spread("attention", ((1, 5, 1, 16),) * 3, place, 1, {"dilation": 5}) for place in range(3)),
    *(Spread("attention", ((3, 5, 1, 16),) * 3, place, 0, {"window": 2}) for place in range(3)),
    *(Spread("attention", ((1, 5, 3, 16),) * 3, place, 2, {"window": 2}) for place in range(3)),
    *(Spread("rotary", ((3, 3, 4, 8),), 0, axis, ROTATED) for axis in range(3)),
    *(Spread("rotary_pair", ((3, 3, 6, 8), (3, 3, 3, 8)), 1, axis, ROTATED) for axis in range(3)),
    *(
        Spread("grouped_matmul", ((5, 24), (3, 20, 24)), place, axis, GROUPS)
        for place, axis in ((0, 0), (1, 0), (1, 1))
    ),
    Spread("grouped_matmul", ((5, 33), (3, 33, 20)), 1, 1, GROUPS, turned),
    Spread("block_diagonal_matmul", ((5, 12), (4, 3, 3)), 0, 0, {"interleaved": True}),
    *(Spread("block_diagonal_matmul", ((5, 12), (4, 3, 3)), 1, axis, {"interleaved": True}) for axis in range(3)),
    *(Spread("selective_scan", SCAN, place, 1) for place in (0, 1, 3, 4)),
    *(Spread("diagonal_scan", ((1, 5, 8), (1, 5, 8)), place, 1) for place in range(2)),
    Spread("causal_convolution", ((1, 5, 8), (8, 3)), 0, 1),
    *(Spread("gated_activation", ((5, 8), (5, 8)), place, 0) for place in range(2)),
    Spread("route", ((5, 4),), 0, 0, {"top_k": 2}),
)


@pytest.mark.parametrize("case", SPREADS, ids=str)
def test_elements_far_apart(case: Spread) -> None:
    """The stride fits 32 bits; its product with the last index does not."""
    tensors = drawn(*case.shapes)
    size = tensors[case.place].shape[case.axis]
    assert size > 2
    far = [*tensors]
    far[case.place] = spread(tensors[case.place], case.axis, LIMIT // (size - 1) + 1)
    function = case.call or getattr(kernels, case.primitive)
    with kernels.use(**{case.primitive: "triton"}), without_gpu("sm_90"):
        found, expected = (differentiated(function, given, **case.rest) for given in (far, tensors))
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"output {index}"


MANY = 2**30 + 1


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


@pytest.mark.parametrize(
    ("primitive", "arguments", "reason"),
    [
        ("attention", [wide(1, MANY, 1, 1)] * 3, "takes up to 1,073,741,824 tokens, not"),
        ("attention", [wide(65536, 1, 1, 1)] * 3, "takes up to 65,535 sequences, not 65,536"),
        ("recurrence", [wide(1, MANY, 1, 1)] * 3, "takes up to 1,073,741,824 tokens, not"),
        ("recurrence", [wide(1, 1, 1, 2**20 + 1)] * 3, "takes up to 1,048,576 features, not 1,048,577"),
        ("recurrence", [wide(1, 1, 1, 65536)] * 3, "takes a head's state of up to 2,147,483,648 numbers, not 4,294"),
        ("delta_rule", [*[wide(1, MANY, 1, 1)] * 3, wide(1, MANY, 1)], "takes up to 1,073,741,824 rows, not"),
        ("delta_rule", [*[wide(1, 1, 2**20 + 1, 1)] * 3, wide(1, 1, 2**20 + 1)], "takes up to 1,048,576 features"),
        ("selective_scan", [*[wide(1, MANY, 1)] * 2, wide(1, 1), *[wide(1, MANY, 1)] * 2], "takes up to .* tokens"),
        (
            "selective_scan",
            [*[wide(1, 1, 2**23)] * 2, wide(2**23, 256), *[wide(1, 1, 256)] * 2],
            "takes up to 1,073,741,824 numbers in the states of a token, not 2,147,483,648",
        ),
        ("diagonal_scan", [wide(1, MANY, 1)] * 2, "takes up to 1,073,741,824 tokens, not"),
        ("causal_convolution", [wide(1, MANY, 1), wide(1, 2)], "takes up to 1,073,741,824 tokens, not"),
        ("grouped_matmul", [wide(MANY, 1), wide(1, 1), torch.tensor([0, MANY])], "takes up to 1,073,741,824 rows"),
        (
            "subset_matmul",
            [wide(MANY, 1, 1), wide(1, 1, 1), wide(MANY, 1, dtype=torch.int64)],
            "takes up to .* pairs, not",
        ),
        ("block_diagonal_matmul", [wide(1, 1), wide(1, 1, 1)], "adjoining blocks are served by PyTorch's batched"),
        ("linear_cross_entropy", [wide(1, 1), wide(MANY, 1), torch.zeros(1).long()], "takes up to .* vocab, not"),
        ("rms_norm", [wide(2, MANY)], "takes rows up to 32768 wide, not 1073741825"),
    ],
)
def test_what_kernels_do_not_count_is_refused(primitive: str, arguments: list[Tensor], reason: str) -> None:
    with kernels.use(**{primitive: "triton"}), without_gpu("sm_90"), pytest.raises(ZooError, match=reason):
        getattr(kernels, primitive)(*arguments)


@pytest.mark.parametrize("window", [2**31 - 1, 2**63 - 1])
@pytest.mark.parametrize("queries", [70, 1])
def test_a_window_without_end(window: int, queries: int) -> None:
    q, k, v = drawn((1, queries, 2, 16), (1, 70, 2, 16), (1, 70, 2, 16))
    with kernels.use(attention="triton"), without_gpu("sm_90"):
        found, expected = (
            differentiated(kernels.attention, [q, k, v], past=70 - queries, window=size, causal=False)
            for size in (window, 200)
        )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
