"""`mamba2` against transformers, its formula token by token, streaming, packing and counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops import counted_flops
from parity import MAMBA2, carry_over, parameter_count, perturb, perturbed
from places import Built, built, complaints, context, draw, place
from streams import stream
from tolerance import assert_close
from torch import Tensor

from zoo.blocks.mamba2 import Mamba2
from zoo.builder import empty_state
from zoo.cost import Call

WIDTH = 16


def small(**changes: Any) -> Mamba2:
    fields: dict[str, Any] = {"head_dim": 8, "state_dim": 6, "groups": 2, "chunk": 4}
    return Mamba2(**fields | changes)


def theirs(component: Mamba2, width: int = WIDTH) -> Any:
    """The mixer of transformers with the same settings and random weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    hidden = component.hidden or 2 * width
    config = Mamba2Config(
        hidden_size=width,
        expand=hidden // width,
        num_heads=hidden // component.head_dim,
        head_dim=component.head_dim,
        state_size=component.state_dim,
        n_groups=component.groups,
        conv_kernel=component.conv_kernel,
        chunk_size=component.chunk,
        use_bias=component.bias,
        use_conv_bias=component.conv_bias,
        num_hidden_layers=1,
    )
    return perturbed(lambda: Mamba2Mixer(config, layer_idx=0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 1},
        {"groups": 4, "bias": True},
        {"conv_bias": False, "conv_kernel": 2},
        {"hidden": 48, "chunk": 5},
    ],
)
@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_agrees_with_transformers(changes: dict[str, Any], tokens: int) -> None:
    component = small(**changes)
    other, ours = theirs(component), built(component, dtype=torch.float32)
    carry_over(other, ours.module, MAMBA2)
    x = draw(2, tokens, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        expected, found = other(x), ours(x)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5
    assert parameter_count(ours.module) == parameter_count(other)


def one_by_one(ours: Built, u: Tensor) -> Tensor:
    """The formula of the class, one sequence, one token and one head after another."""
    component, w = ours.component, ours.weights
    heads, groups, state_dim, kernel = component.heads, component.groups, component.state_dim, component.conv_kernel
    mixed = torch.cat([u @ w[f"{name}.weight"].T for name in "xBC"], dim=-1)
    taps = torch.cat([w[f"{name}_conv"] for name in "xBC"])
    offset = torch.cat([w[f"{name}_conv_bias"] for name in "xBC"])
    before = torch.cat((torch.zeros(kernel - 1, mixed.shape[1], dtype=u.dtype), mixed))
    S = torch.zeros(heads, state_dim, component.head_dim, dtype=u.dtype)
    outputs = []
    for t in range(u.shape[0]):
        now = F.silu((before[t : t + kernel] * taps.T).sum(0) + offset)
        x, B, C = now.split([component.hidden, groups * state_dim, groups * state_dim])
        dt = F.softplus(w["dt.weight"] @ u[t] + w["dt_bias"])
        rows = []
        for h in range(heads):
            group = slice(h * groups // heads * state_dim, (h * groups // heads + 1) * state_dim)
            x_h = x[h * component.head_dim : (h + 1) * component.head_dim]
            S[h] = torch.exp(-dt[h] * w["A_log"][h].exp()) * S[h] + dt[h] * torch.outer(B[group], x_h)
            rows.append(S[h].T @ C[group] + w["D"][h] * x_h)
        y, z = torch.cat(rows), F.silu(w["z.weight"] @ u[t])
        y = y if component.norm_before_gate else y * z
        parts = y.view(groups, -1)
        y = (parts / (parts.square().mean(-1, keepdim=True) + component.eps).sqrt()).flatten() * w["norm_weight"]
        outputs.append(w["out.weight"] @ (y * z if component.norm_before_gate else y))
    return torch.stack(outputs)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_is_its_formula(norm_before_gate: bool) -> None:
    ours = built(small(norm_before_gate=norm_before_gate))
    perturb(ours.module)
    u = draw(1, 9, WIDTH)
    with torch.no_grad():
        assert_close(ours(u)[0], one_by_one(ours, u[0]))


@pytest.mark.parametrize("pieces", [[1] * 13, [6, 1, 1, 5], [2, 11], [8, 4, 1]])
def test_pieces_equal_the_whole(pieces: list[int]) -> None:
    ours = built(small())
    perturb(ours.module)
    x = draw(2, 13, WIDTH)
    with torch.no_grad():
        assert_close(stream(ours, x, pieces), ours(x))


def test_old_states_stay_valid() -> None:
    ours = built(small())
    x = draw(1, 6, WIDTH)
    start = empty_state(ours.component, ours.scope, 1, 6, x)
    with torch.no_grad():
        first, after = ours.module(x, context(x), start)
        again, _ = ours.module(x, context(x), start)
    assert torch.equal(first, again)
    assert {name: tensor.shape for name, tensor in after.items()} == {name: start[name].shape for name in start}


def test_packed_sequences_do_not_meet() -> None:
    ours = built(small())
    perturb(ours.module)
    x = draw(1, 12, WIDTH)
    segments = torch.tensor([[0] * 3 + [1] * 1 + [2] * 8])
    with torch.no_grad():
        packed = ours(x, replace(context(x), segments=segments))
        apart = torch.cat([ours(piece) for piece in x.split([3, 1, 8], dim=1)], dim=1)
    assert_close(packed, apart)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 200])
@pytest.mark.parametrize("groups", [1, 2])
def test_flops_are_those_counted(tokens: int, groups: int) -> None:
    ours = built(small(groups=groups, chunk=16), place(tokens=tokens))
    x = draw(2, tokens, WIDTH)
    assert ours.component.cost(ours.scope, Call(batch=2, tokens=tokens)).flops == counted_flops(ours, x)


def test_initialisation_is_the_published_one() -> None:
    ours = built(Mamba2(hidden=64 * 256, head_dim=64, state_dim=4))
    w = ours.weights
    steps, rates = F.softplus(w["dt_bias"]), w["A_log"].exp()
    assert steps.min() >= 1e-3 * (1 - 1e-3) and steps.max() <= 0.1 * (1 + 1e-3)
    assert steps.log().mean().item() == pytest.approx(torch.tensor([1e-3, 0.1]).log().mean().item(), abs=0.3)
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert (w["D"] == 1).all() and (w["norm_weight"] == 1).all()
    assert w["x_conv"].abs().max() <= 0.5


def test_floor_of_the_steps() -> None:
    steps = F.softplus(built(small(dt_min=1e-6, dt_max=1e-5, dt_floor=0.01), dtype=torch.float32).weights["dt_bias"])
    assert_close(steps, torch.full_like(steps, 0.01))


def test_weight_decay_leaves_the_dynamics_alone() -> None:
    component = small().fill(place())
    parameters = component.parameters(place())
    assert {name for name, parameter in parameters.items() if parameter.decay} == {"x_conv", "B_conv", "C_conv"}


def test_filled_in_only_hidden_is_left() -> None:
    filled = small(expand=3).fill(place())
    assert (filled.hidden, filled.expand) == (48, None)
    assert filled.fill(place()) == filled
    assert small().fill(place()).hidden == 32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"hidden": 20},
            "head_dim: the 20 hidden channels do not divide into heads of 8; head_dim 4 would, or hidden 16 or 24",
        ),
        (
            {"hidden": 4},
            "head_dim: the 4 hidden channels do not divide into heads of 8; head_dim 4 would, or hidden 8",
        ),
        (
            {"groups": 3},
            "groups: groups 3 does not divide the 4 heads (hidden 32 / head_dim 8); groups 1 would",
        ),
        (
            {"hidden": 32, "expand": 3},
            "expand: hidden 32 and expand 3, which gives 48 at width 16, are both set; remove one",
        ),
        ({"dt_min": 0.5}, "dt_min: dt_min 0.5 is above dt_max 0.1; swap them"),
    ],
)
def test_what_cannot_be_built(changes: dict[str, Any], expected: str) -> None:
    assert complaints(small(**changes)) == [expected]


def test_can_be_built() -> None:
    assert complaints(small()) == []
