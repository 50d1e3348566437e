"""Which parameters decay, and that the optimizer does what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train.tiny_models import TinyLanguageModel

from zoo.train.optimizer import adamw, parameter_groups


def _names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_identity[id(parameter)] for parameter in parameters}


def test_only_weights_outside_no_decay_decay() -> None:
    model = TinyLanguageModel()
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert _names(model, decaying["params"]) == {"hidden.weight", "head.weight"}
    assert _names(model, others["params"]) == model.no_decay


def test_a_tied_parameter_is_exempt_under_either_name() -> None:
    model = TinyLanguageModel(tied=True)
    for name in ("embedding.weight", "head.weight"):
        model.no_decay = frozenset({name})
        decaying, others = parameter_groups(model, 0.1)
        assert _names(model, others["params"]) == {"embedding.weight"}
        assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = TinyLanguageModel()
    model.hidden.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == len(list(model.parameters())) - 1


def test_unknown_names_are_refused() -> None:
    model = TinyLanguageModel()
    model.no_decay = frozenset({"norm.weigth"})
    with pytest.raises(ValueError, match=r"norm\.weigth.*did you mean 'norm\.weight'"):
        parameter_groups(model, 0.1)


@pytest.mark.parametrize("fused", [False, True])
def test_decay_is_decoupled_from_the_gradient(fused: bool) -> None:
    model = nn.Linear(3, 2).double()
    model.no_decay = frozenset({"bias"})  # type: ignore[assignment]
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.99), fused=fused)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))
    torch.testing.assert_close(model.bias.detach(), bias)


def test_complex_parameters_are_optimized_too() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    model[0].abs().sum().backward()
    optimizer.step()
    assert (model[0].abs() < 1).all()
