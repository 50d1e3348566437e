"""Which implementation of a primitive runs: an ordered table each, the first that serves a call is taken.

The decision rests on device, dtype, shapes and flags of the call, never on what happens to be installed, so the same
call runs the same code on every machine of a kind. A function compiled by `torch.compile` keeps the choice that held
when it was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    import torch

HOMES: Mapping[str, str] = {
    "attention": "softmax_attention",
    "recurrence": "linear_recurrence",
    "delta_rule": "delta",
    "selective_scan": "scan",
    "diagonal_scan": "scan",
    "causal_convolution": "convolution",
    "long_convolution": "convolution",
    "grouped_matmul": "grouped",
    "block_diagonal_matmul": "grouped",
    "route": "grouped",
    "subset_matmul": "grouped",
    "rms_norm": "pointwise",
    "layer_norm": "pointwise",
    "rotary": "pointwise",
    "rotary_pair": "pointwise",
    "gated_activation": "pointwise",
    "polynomial_activation": "pointwise",
    "linear_cross_entropy": "cross_entropy",
}
"""Where the table of each primitive lives, below `zoo.kernels`."""
IMPLEMENTATIONS = ("triton", "torch", "reference")
"""What implementations are called; not every primitive has all."""


class Call(NamedTuple):
    """What an implementation may base its answer on; `facts` holds shapes and flags under the primitive's own names.

    `chosen` tells that the implementation was asked for by `use`, `supposed` that the call is only talked about: a
    device that is not there then counts as one that serves.
    """

    device: str
    dtype: torch.dtype
    facts: Mapping[str, Any] = {}
    chosen: bool = False
    supposed: bool = False


def serves_all(call: Call) -> str | None:
    """The `supports` of an implementation that takes every call."""
    del call
    return None


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute a primitive; `supports` returns None, or the reason why it cannot serve a call."""

    name: str
    function: Callable[..., Any]
    supports: Callable[[Call], str | None] = serves_all


@dataclass(frozen=True, slots=True)
class Primitive:
    """A primitive and its implementations, the preferred one first."""

    name: str
    implementations: tuple[Implementation, ...]
    _by_name: dict[str, Implementation] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {one.name: one for one in self.implementations})

    def select(self, call: Call) -> Callable[..., Any]:
        """The function that serves `call`: the one chosen by `use`, else the first of the table that can.

        Raises `ZooError` with the reason if the chosen one, or every one, refuses.
        """
        notes = _observer()
        if notes is not None:
            notes.append((self, call))
        name = chosen(self.name)
        if name is not None:
            implementation = self._by_name[name]
            reason = implementation.supports(call._replace(chosen=True))
            if reason is not None:
                raise ZooError(f"{self.name}: the implementation {name!r} was chosen but cannot serve: {reason}")
            return implementation.function
        for implementation in self.implementations:
            if implementation.supports(call) is None:
                return implementation.function
        reasons = "; ".join(f"{one.name}: {one.supports(call)}" for one in self.implementations)
        raise ZooError(f"{self.name}: no implementation serves this call ({reasons})")

    def implementation(self, name: str) -> Implementation:
        """The implementation called `name`; raises `ZooError` with the nearest name if there is none."""
        if name not in self._by_name:
            raise ZooError(f"{self.name}: no implementation is called {name!r}{did_you_mean(name, self._by_name)}")
        return self._by_name[name]


class Row(NamedTuple):
    """One line of `explain`: `reason` says why the implementation would not serve; None if it would."""

    primitive: str
    implementation: str
    reason: str | None

    @property
    def serves(self) -> bool:
        return self.reason is None


_choices: ContextVar[Mapping[str, str]] = ContextVar("kernel_choices", default=MappingProxyType({}))


def chosen(primitive: str) -> str | None:
    """The implementation that `use` has chosen for a primitive here, if any."""
    return _choices.get().get(primitive)


_notes: ContextVar[list[tuple[Primitive, Call]] | None] = ContextVar("notes", default=None)


def _observer() -> list[tuple[Primitive, Call]] | None:
    return _notes.get()


# Dynamo cannot trace a context variable; under this mark it calls the function once and keeps the result. It is what
# `torch.compiler.assume_constant_result` sets, without importing torch.
for _function in (chosen, _observer):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def observed() -> Iterator[list[tuple[Primitive, Call]]]:
    """Within the block every call of a primitive is noted, in order, whichever implementation serves it."""
    notes: list[tuple[Primitive, Call]] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def primitive(name: str) -> Primitive:
    """The table of a primitive; raises `ZooError` with the nearest name if there is none."""
    if name not in HOMES:
        raise ZooError(f"no primitive is called {name!r}{did_you_mean(name, HOMES)}")
    tables: tuple[Primitive, ...] = import_module(f"zoo.kernels.{HOMES[name]}").PRIMITIVES
    return next(table for table in tables if table.name == name)


@contextmanager
def use(**choices: str) -> Iterator[None]:
    """Within the block, compute each named primitive with the named implementation: `use(attention="reference")`.

    A call that the chosen implementation cannot serve raises `ZooError` instead of falling back.
    """
    for name, implementation in choices.items():
        primitive(name).implementation(implementation)
    token = _choices.set({**_choices.get(), **choices})
    try:
        yield
    finally:
        _choices.reset(token)


def explain(device: str = "cpu", dtype: str | torch.dtype = "float32") -> list[Row]:
    """For each primitive, in order of preference, which implementations serve on `device` in `dtype`, or why not.

    For CUDA where there is none, the answer is that of a device that kernels support.
    """
    call = Call(device_kind(device), as_dtype(dtype), supposed=True)
    return [
        Row(name, implementation.name, implementation.supports(call))
        for name in HOMES
        for implementation in primitive(name).implementations
    ]


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype from its name; raises `ZooError` for what is none."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ZooError(f"{dtype!r} is no dtype; expected one such as 'float32', 'bfloat16' or 'float64'")
    return found


def device_kind(device: str) -> str:
    """`cuda` of `cuda:1`; raises `ZooError` for what is no device."""
    import torch

    try:
        return torch.device(device).type
    except RuntimeError as problem:
        raise ZooError(f"{device!r} is no device; expected one such as 'cpu' or 'cuda:0'") from problem
