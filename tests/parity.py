"""Weights of implementations that we did not write, carried over to ours by rules from name to name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Rule:
    """Where a tensor goes whose name is like `theirs`: to the names `ours`, cut into parts along `along`.

    A `*` stands for a piece of a name without dots, the first one of `ours` for what the first one of `theirs` is.
    `transpose` swaps the last two dimensions of matrices before anything else.
    """

    theirs: str
    ours: tuple[str, ...]
    along: int = 0
    transpose: bool = False

    def targets(self, name: str) -> list[str] | None:
        """Our names for their `name`, or None if the rule is not about it."""
        pattern = re.escape(self.theirs).replace(r"\*", "([^.]+)")
        found = re.fullmatch(pattern, name)
        return None if found is None else [_filled(each, found.groups()) for each in self.ours]

    def parts(self, tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """The tensor cut into parts of these sizes."""
        if self.transpose and tensor.dim() > 1:
            tensor = tensor.transpose(-1, -2)
        return [tensor] if len(sizes) == 1 else tensor.split(list(sizes), dim=self.along)


def _filled(template: str, pieces: Sequence[str]) -> str:
    numbers = count()
    return re.sub(r"\*", lambda _: pieces[next(numbers)], template)


def rules(*lines: str, along: int = 0, transpose: bool = False) -> list[Rule]:
    """Rules from lines like `in_proj.* -> x.* z.*`."""
    sides = [line.split("->") for line in lines]
    return [Rule(theirs.strip(), tuple(ours.split()), along, transpose) for theirs, ours in sides]


def within(theirs: str, ours: str, table: Sequence[Rule]) -> list[Rule]:
    """The same rules for what stands inside `theirs` and `ours`."""
    return [
        replace(rule, theirs=f"{theirs}.{rule.theirs}", ours=tuple(f"{ours}.{name}" for name in rule.ours))
        for rule in table
    ]


def carry_over(theirs: nn.Module, ours: nn.Module, table: Sequence[Rule]) -> None:
    """Copy all weights by the first rule that fits: none of theirs may be left over, none of ours left out."""
    left = dict(ours.named_parameters())
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            rule, names = next(((rule, found) for rule in table if (found := rule.targets(name))), (None, []))
            assert rule is not None, f"no rule for {name}"
            assert left.keys() >= set(names), f"{name} goes to {names}, but left are {sorted(left)}"
            targets = [left.pop(each) for each in names]
            for target, part in zip(targets, rule.parts(tensor, [t.shape[rule.along] for t in targets]), strict=True):
                target.copy_(part.reshape(target.shape))
    assert not left, f"nothing went to {sorted(left)}"


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Random weights at which everything matters: matrices keep the size of what they map, vectors move."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def perturbed(make: Callable[[], M], seed: int = 0) -> M:
    """What `make` makes, in eval mode and with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().eval()
    perturb(module, seed)
    return module


def parameter_count(module: nn.Module) -> int:
    """How many numbers a module learns, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


MAMBA = rules(
    "in_proj.* -> x.* z.*",
    "conv1d.weight -> conv",
    "conv1d.bias -> conv_bias",
    "x_proj.weight -> dt_low.weight B.weight C.weight",
    "dt_proj.weight -> dt.weight",
    "dt_proj.bias -> dt_bias",
    "out_proj.* -> out.*",
    "* -> *",
)
MAMBA2 = rules(
    "in_proj.* -> z.* x.* B.* C.* dt.*",
    "conv1d.weight -> x_conv B_conv C_conv",
    "conv1d.bias -> x_conv_bias B_conv_bias C_conv_bias",
    "norm.weight -> norm_weight",
    "out_proj.* -> out.*",
    "* -> *",
)
