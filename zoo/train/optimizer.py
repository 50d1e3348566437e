"""AdamW that decays only the parameters that are meant to decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW

from zoo.errors import did_you_mean


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters that require a gradient: with decay and without, in the model's order.

    A parameter does not decay if any of its names is in `model.no_decay`; tied parameters have several. Raises
    ValueError if `no_decay` names something that is not a parameter.
    """
    no_decay: frozenset[str] = getattr(model, "no_decay", frozenset())
    named = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    for unknown in sorted(no_decay.difference(names)):
        raise ValueError(f"no_decay names {unknown!r}, which is not a parameter{did_you_mean(unknown, names)}")
    exempt = {id(parameter) for name, parameter in named if name in no_decay}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if id(parameter) not in exempt]
    others = [parameter for parameter in trained if id(parameter) in exempt]
    return [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, weight_decay), (others, 0.0))
        if parameters
    ]


def adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], fused: bool
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2): `w <- w - lr (m / (sqrt(v) + eps) + weight_decay w)`.

    `fused` asks for the kernel that updates all parameters at once; complex parameters do without.
    """
    groups = parameter_groups(model, weight_decay)
    real = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused and real)
