"""The harness that kernels are tried in notices what it is there for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels import launch
from zoo.kernels.dispatch import Call

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed on this system", exc_type=ImportError)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def copy(x, out, count, extra, BLOCK: tl.constexpr):
    """Copies, and reads or writes `extra` elements too many."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index, mask=index < count + extra), mask=index < count + extra)


@triton.jit
def add(x, y, out, summed, count, BLOCK: tl.constexpr):
    """`-(x + y) * x` and the sum of `x`, in the dtype of `x` throughout."""
    index = tl.arange(0, BLOCK)
    inside = index < count
    a, b = tl.load(x + index, mask=inside, other=0.0), tl.load(y + index, mask=inside, other=0.0)
    tl.store(out + index, -(a + b) * a, mask=inside)
    tl.store(summed, tl.sum(a, 0))


@triton.jit
def product(x, y, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(x + row * SIZE + column), tl.load(y + row * SIZE + column)
    tl.store(out + row * SIZE + column, tl.dot(a, b).to(out.dtype.element_ty))


@triton.jit
def last_program(out):
    tl.store(out, tl.program_id(0) * 10 + tl.program_id(1))


@pytest.mark.parametrize("extra", [-3, 0])
def test_what_stays_inside_passes(extra: int) -> None:
    with interpreter.trials() as slab:
        x = slab(torch.arange(50.0))
        out = torch.empty_like(x)
        copy[(1,)](x, out, 50, extra, BLOCK=tl.constexpr(64))
    assert torch.equal(out[: 50 + extra], torch.arange(50.0 + extra))
    assert out[50 + extra :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_writing_behind_the_end_is_noticed(dtype: torch.dtype) -> None:
    x = torch.zeros(60, dtype=dtype)
    with pytest.raises(AssertionError, match="behind a tensor"), interpreter.trials():
        copy[(1,)](x, torch.empty(50, dtype=dtype), 50, 3, BLOCK=tl.constexpr(64))


def test_reading_behind_the_end_gives_nan() -> None:
    with interpreter.trials() as slab:
        out = torch.empty(53)
        copy[(1,)](slab(torch.zeros(50)), out, 50, 3, BLOCK=tl.constexpr(64))
    assert out[50:].isnan().all()


def test_inputs_keep_values_and_strides_in_a_slab() -> None:
    x = torch.randn(4, 6).t()
    with interpreter.trials() as slab:
        assert torch.equal(slab(x), x) and slab(x).stride() == x.stride()
        assert slab(torch.empty(0, 3)).shape == (0, 3)


def test_programs_run_in_another_order_each_once() -> None:
    ends = set()
    for seed in range(6):
        out = torch.zeros(1)
        with interpreter.shuffled(seed):
            last_program[(3, 4)](out)
        ends.add(int(out))
    assert len(ends) > 1 and ends <= {10 * x + y for x in range(3) for y in range(4)}


def test_bfloat16_is_computed_as_pytorch_computes_it() -> None:
    x, y = (torch.randn(50, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    out, summed = torch.empty_like(x), torch.empty(1, dtype=x.dtype)
    with interpreter.bfloat16():
        add[(1,)](x, y, out, summed, 50, BLOCK=tl.constexpr(64))
    assert torch.equal(out, -(x + y) * x)
    assert torch.equal(summed[0], x.float().sum().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_add_up_in_float32(dtype: torch.dtype) -> None:
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    out = torch.empty(32, 32)
    with interpreter.bfloat16():
        product[(1,)](x, y, out, SIZE=tl.constexpr(32))
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-6, atol=1e-6)


def test_rounding_is_to_the_nearest_even() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e38, float("inf"), float("nan"), 1.00390625])])
    found = torch.from_numpy(interpreter.rounded(values.numpy()))
    assert torch.equal(found.nan_to_num(7.0), values.bfloat16().float().nan_to_num(7.0))


def test_kernels_take_cpu_tensors_only_when_chosen_and_without_a_gpu() -> None:
    call = Call("cpu", torch.float32)
    assert launch.refusal(call) == launch.refusal(call._replace(chosen=True)) == "needs a CUDA device"
    with launch.without_gpu("sm_90"):
        assert launch.refusal(call) == "needs a CUDA device"
        assert launch.refusal(call._replace(chosen=True)) is None
        assert launch.refusal(Call("cpu", torch.float64, chosen=True)) == (
            "takes float32, float16, bfloat16, not float64"
        )
    assert launch.refusal(Call("mps", torch.float32)) == "needs a CUDA device, not mps"
    with pytest.raises(ZooError, match="unknown architecture 'sm_70'; known: sm_80, sm_90, sm_100"):
        launch.without_gpu("sm_70").__enter__()


def configurations() -> list[tuple[str, launch.Launches]]:
    from importlib.resources import files

    homes = [folder.name for folder in files("zoo.kernels").iterdir() if (folder / "launch.json").is_file()]
    return [(home, launch.Launches(home)) for home in sorted(homes)]


@pytest.mark.parametrize(("home", "table"), configurations())
def test_tables_of_configurations_are_short_and_complete(home: str, table: launch.Launches) -> None:
    for kernel, targets in table.kernels.items():
        assert set(targets) == set(launch.ARCHITECTURES), f"{home}: {kernel}"
        for found in targets.values():
            assert 1 <= len(found) <= launch.MOST_CONFIGURATIONS, f"{home}: {kernel}"
            assert all("when" in one for one in found[:-1]) and "when" not in found[-1], f"{home}: {kernel}"
            assert all({"num_warps", "num_stages"} <= one.keys() for one in found), f"{home}: {kernel}"


def test_the_first_configuration_whose_bounds_hold_is_taken() -> None:
    table, device = launch.Launches("pointwise"), torch.device("cpu")
    name = "norm_forward"
    with launch.without_gpu("sm_90"):
        found = [table.configuration(name, device, {"width": width}) for width in (64, 1024, 1025)]
        assert [one["num_warps"] for one in found] == [4, 4, 8]
        with launch.configured(norm_forward=1):
            assert table.configuration(name, device, {"width": 64})["num_warps"] == 8


def test_a_chosen_kernel_says_why_it_cannot_serve() -> None:
    from zoo import kernels

    def norm(x: Tensor) -> Tensor:
        with kernels.use(rms_norm="triton"):
            return kernels.rms_norm(x)

    with pytest.raises(ZooError, match="'triton' was chosen but cannot serve: needs a CUDA device"):
        norm(torch.zeros(2, 4))
    with launch.without_gpu("sm_90"), pytest.raises(ZooError, match="rows up to 32768 wide, not 40000"):
        norm(torch.zeros(2, 40000))
