"""`mamba` against transformers, its formula token by token, streaming, packing and counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops import counted_flops
from parity import MAMBA, carry_over, parameter_count, perturb, perturbed
from places import Built, built, complaints, context, draw, place
from streams import stream
from tolerance import assert_close
from torch import Tensor

from zoo.blocks.mamba import Mamba
from zoo.blocks.model import Spec
from zoo.builder import declared, empty_state
from zoo.cost import Call
from zoo.kernels import work

WIDTH = 16


def small(**changes: Any) -> Mamba:
    fields: dict[str, Any] = {"state_dim": 6, "dt_rank": 3}
    return Mamba(**fields | changes)


def theirs(component: Mamba, width: int = WIDTH) -> Any:
    """The mixer of transformers with the same settings and random weights."""
    from transformers import FalconMambaConfig, MambaConfig
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config: Any = FalconMambaConfig if component.normalize_inputs else MambaConfig
    mixer: Any = FalconMambaMixer if component.normalize_inputs else MambaMixer
    settings = config(
        hidden_size=width,
        expand=(component.hidden or 2 * width) // width,
        state_size=component.state_dim,
        time_step_rank=component.dt_rank,
        conv_kernel=component.conv_kernel,
        use_bias=component.bias,
        use_conv_bias=component.conv_bias,
        num_hidden_layers=1,
    )

    def make() -> Any:
        made = mixer(settings, layer_idx=0, initialize_mixer_weights=False)
        torch.nn.init.uniform_(made.A_log, -1.0, 1.0)
        torch.nn.init.ones_(made.D)
        return made

    return perturbed(make)


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True, "state_dim": 1}, {"conv_bias": False, "conv_kernel": 2}, {"normalize_inputs": True}],
)
@pytest.mark.parametrize("tokens", [1, 11])
def test_agrees_with_transformers(changes: dict[str, Any], tokens: int) -> None:
    component = small(**changes)
    other, ours = theirs(component), built(component, dtype=torch.float32)
    carry_over(other, ours.module, MAMBA)
    x = draw(2, tokens, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        expected, found = other(x), ours(x)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5
    assert parameter_count(ours.module) == parameter_count(other)


def one_by_one(ours: Built, u: Tensor) -> Tensor:
    """The formula of the class, one sequence, one token after another."""
    w, kernel = ours.weights, ours.component.conv_kernel
    x, z = u @ w["x.weight"].T, F.silu(u @ w["z.weight"].T)
    before = torch.cat((torch.zeros(kernel - 1, x.shape[1], dtype=u.dtype), x))
    A = -w["A_log"].exp()
    h = torch.zeros_like(A)
    outputs = []
    for t in range(u.shape[0]):
        now = F.silu((before[t : t + kernel] * w["conv"].T).sum(0) + w["conv_bias"])
        delta = F.softplus(w["dt.weight"] @ (w["dt_low.weight"] @ now) + w["dt_bias"])[:, None]
        h = torch.exp(delta * A) * h + delta * now[:, None] * (w["B.weight"] @ now)
        outputs.append(w["out.weight"] @ ((h @ (w["C.weight"] @ now) + w["D"] * now) * z[t]))
    return torch.stack(outputs)


def test_is_its_formula() -> None:
    ours = built(small())
    perturb(ours.module)
    u = draw(1, 9, WIDTH)
    with torch.no_grad():
        assert_close(ours(u)[0], one_by_one(ours, u[0]))


@pytest.mark.parametrize("pieces", [[1] * 13, [6, 1, 1, 5], [2, 11]])
def test_pieces_equal_the_whole(pieces: list[int]) -> None:
    ours = built(small(normalize_inputs=True))
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


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_flops_are_those_counted(tokens: int) -> None:
    ours = built(small(), place(tokens=tokens))
    x = draw(2, tokens, WIDTH)
    assert ours.component.cost(ours.scope, Call(batch=2, tokens=tokens)).flops == counted_flops(ours, x)


def test_the_scan_is_pointwise_work() -> None:
    def pointwise(state_dim: int) -> float:
        return small(state_dim=state_dim).fill(place()).cost(place(), Call(batch=2, tokens=5)).pointwise

    assert pointwise(12) - pointwise(6) == work.selective_scan_pointwise(2, 5, 2 * WIDTH, 6)


def test_initialisation_is_the_published_one() -> None:
    ours = built(Mamba(hidden=4096, dt_rank=64))
    w = ours.weights
    steps = F.softplus(w["dt_bias"])
    assert steps.min() >= 1e-3 * (1 - 1e-3) and steps.max() <= 0.1 * (1 + 1e-3)
    assert steps.log().mean().item() == pytest.approx(torch.tensor([1e-3, 0.1]).log().mean().item(), abs=0.1)
    assert_close(w["A_log"].exp(), torch.arange(1.0, 17.0).expand(4096, 16).double(), plain=w["A_log"].float().exp())
    assert (w["D"] == 1).all()
    assert w["dt.weight"].std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.02)


def test_weight_decay_leaves_the_dynamics_alone() -> None:
    parameters = small().fill(place()).parameters(place())
    assert {name for name, parameter in parameters.items() if parameter.decay} == {"conv"}


def test_parameters_of_mamba_130m() -> None:
    parts: dict[str, Any] = {
        "stem": {"type": "token", "vocab": 50280},
        "body": {"type": "stack", "layers": [{"mixer": "mamba"}] * 24},
        "head": "language_model",
    }
    spec = Spec(width=768, **parts).fill()
    assert sum(parameter.count for _, parameter in declared(spec, spec.root())) == 129_135_360


def test_defaults_follow_the_width() -> None:
    filled = Mamba().fill(place(width=40))
    assert (filled.hidden, filled.dt_rank, filled.expand) == (80, 3, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"hidden": 32, "expand": 3},
            "expand: hidden 32 and expand 3, which gives 48 at width 16, are both set; remove one",
        ),
        ({"dt_max": 1e-4}, "dt_min: dt_min 0.001 is above dt_max 0.0001; swap them"),
    ],
)
def test_what_cannot_be_built(changes: dict[str, Any], expected: str) -> None:
    assert complaints(small(**changes)) == [expected]
    assert complaints(small()) == []
