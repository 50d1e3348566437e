"""Norms and rotary embedding: against their formulas, torch and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_as_exact_as_reference
from tolerance import assert_close
from torch import Tensor
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from zoo import kernels
from zoo.errors import ZooError


def random(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64)


def test_norms_agree_with_reference() -> None:
    assert_agrees("rms_norm", kernels.rms_norm, random(2, 3, 8), random(8))
    assert_agrees("rms_norm", kernels.rms_norm, random(8))
    assert_agrees("layer_norm", kernels.layer_norm, random(2, 3, 8), random(8), random(8) + 1)
    assert_agrees("layer_norm", kernels.layer_norm, random(0, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_as_exact_as_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_reference("rms_norm", dtype, kernels.rms_norm, random(5, 32), random(32))
    assert_as_exact_as_reference("layer_norm", dtype, kernels.layer_norm, random(5, 32) + 3, random(32), random(32))


def test_norms_agree_with_torch() -> None:
    x, weight, bias = random(5, 8), random(8), random(8) + 1
    assert_close(kernels.rms_norm(x, weight, 0.1), F.rms_norm(x, (8,), weight, 0.1))
    assert_close(kernels.layer_norm(x, weight, bias, 0.1), F.layer_norm(x, (8,), weight, bias, 0.1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 2, 6])
def test_rotary_agrees_with_reference(interleaved: bool, dim: int | None) -> None:
    for positions in (torch.arange(5) * 100, torch.stack([torch.arange(5), torch.arange(5) + 7])):
        assert_agrees(
            "rotary", lambda x, p: kernels.rotary(x, p, dim=dim, interleaved=interleaved), random(2, 5, 3, 8), positions
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_as_exact_as_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_reference("rotary", dtype, kernels.rotary, random(2, 50, 3, 8), torch.arange(50))


def test_rotary_agrees_with_transformers() -> None:
    x, positions = random(2, 9, 3, 8).float(), torch.arange(9)
    rotation = LlamaRotaryEmbedding(LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8))
    expected, _ = apply_rotary_pos_emb(x, x, *rotation(x, positions[None]), unsqueeze_dim=2)
    torch.testing.assert_close(kernels.rotary(x, positions), expected)

    sin, cos = create_sinusoidal_positions(9, 8).expand(2, -1, -1).chunk(2, -1)
    torch.testing.assert_close(kernels.rotary(x, positions, interleaved=True), gptj_rotary(x, sin, cos))


def test_rotary_depends_on_distances_only() -> None:
    q, k, positions = random(1, 6, 2, 8), random(1, 6, 2, 8).flip(1), torch.arange(6)

    def scores(shift: int) -> Tensor:
        return torch.einsum("bihd,bjhd->bhij", *(kernels.rotary(x, positions + shift) for x in (q, k)))

    assert_close(scores(1000), scores(0))


def test_gradcheck() -> None:
    x = random(1, 2, 1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernels.rotary(x, torch.tensor([3, 5])), x)
    assert torch.autograd.gradcheck(kernels.rms_norm, (x, random(4).requires_grad_()))


def test_meta() -> None:
    x = random(2, 5, 3, 8).to("meta")
    assert kernels.rotary(x, torch.arange(5, device="meta"), dim=4).shape == x.shape
    assert kernels.rms_norm(x).shape == kernels.layer_norm(x).shape == x.shape


def test_bad_input() -> None:
    x = random(2, 5, 3, 8)
    with pytest.raises(ZooError, match=r"weight has shape \[7\], expected \[width\] = \[8\]"):
        kernels.rms_norm(x, random(7))
    with pytest.raises(ZooError, match=r"positions has shape \[4\], expected \[tokens\] = \[5\]"):
        kernels.rotary(x, torch.arange(4))
    with pytest.raises(ZooError, match="dim is 3, expected an even number from 0 to head_dim = 8"):
        kernels.rotary(x, torch.arange(5), dim=3)
    with pytest.raises(ZooError, match="expected an integer dtype"):
        kernels.rotary(x, torch.arange(5.0))
