"""The contract of all components: one class holds a component's settings, tensors, cost and computation.

A component is a frozen pydantic model registered under a type name and a role. It declares

- `derive`, `check`: defaults that follow from where it stands, and what must hold across fields;
- `children`, `parameters`, `state`: the components inside it, the tensors it owns, and those it remembers;
- `cost`: what a call takes;
- `forward`: what it computes, as a function of a module that holds those children and tensors.

`forward` is the only part that needs torch, and imports it itself, so that specs are read, checked and counted without
it. A module is built from the declarations (`zoo.builder`); a component that wants a hand-written `torch.nn.Module`
overrides `module`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.cost import Call, Cost
from zoo.errors import Problem, SpecError, ZooError, did_you_mean, nearest
from zoo.memo import memoized
from zoo.parameter import Axis, Parameter, StateTensor
from zoo.registry import INHERITED, Entry, Role, find, types, with_article

if TYPE_CHECKING:
    import torch
    from pydantic_core import ErrorDetails

Size = Annotated[int, Field(ge=1, le=2**24)]
"""A dimension of a tensor."""
Length = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A number of tokens."""
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A probability of dropping something."""
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A finite number above zero."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a component promises; the contract suite checks each promise.

    causal: `"always"`, `"never"`, or `"scope"` where it follows the setting of the model around it.
    streaming: a call on the first tokens that returns a state, then a call on the rest with it, equals one call.
    packed: sequences laid end to end with segment ids equal separate calls.
    grids: numbers of dimensions of the token grid that it takes.
    linear_time: the forward FLOPs grow linearly with the number of tokens.
    any_length: the parameters do not depend on the number of tokens.
    elastic: names of axes that may be narrowed to a prefix.
    """

    causal: Literal["always", "never", "scope"] = "scope"
    streaming: bool = True
    packed: bool = True
    grids: tuple[int, ...] = (1, 2, 3)
    linear_time: bool = True
    any_length: bool = True
    elastic: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """Marks a field that takes components of `role`; `many` for a sequence of them.

    `default` is the type of a mapping that names none.
    """

    role: Role
    default: str | None = None
    many: bool = False
    inherited: bool = False

    def coerce(self, value: Any) -> Any:
        """The component that a value stands for: itself, a type's name, or a mapping with a type and fields."""
        if isinstance(value, Component):
            if value.role is not self.role:
                found, wanted = with_article(value.role), with_article(self.role)
                raise ZooError(f"{value.type!r} is {found}, but {wanted} is expected here")
            return value
        if isinstance(value, str):
            return find(self.role, value)()
        if isinstance(value, Mapping):
            fields = dict(value)
            name = fields.pop("type", self.default)
            if not isinstance(name, str):
                raise ZooError(f"{with_article(self.role)} needs a `type`; known: {', '.join(types(self.role))}")
            return find(self.role, name)(**fields)
        wanted = with_article(self.role)
        raise ZooError(f"expected {wanted}: a type name or a mapping with a `type`; got {_shown(value)}")


@cache
def defaults(component: type[Component]) -> Mapping[str, Any]:
    """The defaults of the fields of a component that need no value."""
    fields = component.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}


@cache
def slots(component: type[Component]) -> Mapping[str, Slot]:
    """The fields of a class that take components, by name."""
    found: dict[str, Slot] = {}
    for name, field in component.model_fields.items():
        slot = next((item for item in field.metadata if isinstance(item, Slot)), None) or _slot_in(field.annotation)
        if slot is not None:
            found[name] = replace(slot, inherited=slot.role in INHERITED and name == slot.role)
    return found


@cache
def _inherited(component: type[Component]) -> tuple[str, ...]:
    """The inherited roles that a class has a field for."""
    return tuple(role.value for role in INHERITED if role.value in component.model_fields)


def _slot_in(annotation: Any) -> Slot | None:
    """The slot in a union or a sequence: `Norm | None`, `tuple[Layer, ...]`."""
    if get_origin(annotation) is Annotated:
        return next((item for item in annotation.__metadata__ if isinstance(item, Slot)), None)
    for part in get_args(annotation):
        slot = _slot_in(part)
        if slot is not None:
            return replace(slot, many=True) if get_origin(annotation) is tuple else slot
    return None


@dataclass(frozen=True, slots=True)
class Projection:
    """What a `linear` component is to map: `inputs` to `outputs`, with a bias or not.

    `residual` marks a projection that writes to the residual stream, whose initialisation shrinks with depth.
    """

    inputs: Axis
    outputs: Axis
    bias: bool = False
    residual: bool = False
    active: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a component stands.

    width: channels of the stream; `axis` names that axis. grid: extent of the token grid, `(tokens,)` or
    `(height, width)`, without `prefix` extra tokens (class tokens) in front. causal: whether tokens may only see
    earlier ones. depth: number of branches that write to the residual stream, for initialisation. The four inherited
    roles hold what is set here.
    """

    width: int
    grid: tuple[int, ...]
    causal: bool
    norm: Component
    activation: Component
    linear: Component
    position: Component
    axis: str = "width"
    prefix: int = 0
    depth: int = 1
    init_std: float = 0.02
    vocab: int | None = None
    branches: tuple[str, ...] = ()
    projection: Projection | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens, prefix included: the longest sequence that the model must take."""
        return math.prod(self.grid) + self.prefix

    def at(self, **changes: Any) -> Scope:
        """The same with some fields changed."""
        return Scope(**dict(zip(_SCOPE_FIELDS, _SCOPE_VALUES(self), strict=True), **changes))


# Scopes change for every component of a spec, and `dataclasses.replace` is slow.
_SCOPE_FIELDS = tuple(field.name for field in fields(Scope))
_SCOPE_VALUES = attrgetter(*_SCOPE_FIELDS)


class Child(NamedTuple):
    """A component inside another and the scope it stands in."""

    component: Component
    scope: Scope

    def cost(self, call: Call) -> Cost:
        return self.component.cost(self.scope, call)


class Complaint(NamedTuple):
    """What is wrong across fields: the field to blame (a path below the component) and the message."""

    field: str
    message: str


class Component(BaseModel):
    """Base of all components; see the module's docstring for the contract."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    type: ClassVar[str] = ""
    role: ClassVar[Role]
    traits: ClassVar[Traits] = Traits()
    entry: ClassVar[Entry] = Entry()
    transparent: ClassVar[bool] = False
    """Whether it costs and holds exactly what its children do, so that tables may look inside."""

    def __init__(self, /, **values: Any) -> None:
        problems: list[Problem] = []
        given = _coerced(type(self), values, problems)
        try:
            super().__init__(**given)
        except ValidationError as error:
            problems += _translated(type(self), error, broken={problem.path for problem in problems})
        if problems:
            raise SpecError(problems)

    def inner(self, scope: Scope) -> Scope:
        """The scope of what stands inside: the inherited roles that this component sets itself win."""
        own = {name: value for name in _inherited(type(self)) if (value := getattr(self, name)) is not None}
        return scope.at(**own) if any(value is not getattr(scope, name) for name, value in own.items()) else scope

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        """Values for fields left out that follow from the scope, by field name."""
        return {}

    def check(self, scope: Scope) -> Iterator[Complaint]:
        """What is wrong with this component, filled in, at this place; nothing for a component that can be built."""
        yield from ()

    def children(self, scope: Scope) -> Mapping[str, Child]:
        """The components inside, by the names that their modules get."""
        return {}

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        """The tensors that this component owns itself, by name, its children's not included."""
        return {}

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        """What it remembers itself between calls when up to `capacity` tokens will be seen, children's not included."""
        return {}

    def out(self, scope: Scope) -> Scope:
        """The scope behind this component; differs where it changes the width or the grid."""
        return scope

    def cost(self, scope: Scope, call: Call) -> Cost:
        """What a call takes, children included: by default what its children take one after the other."""
        return self.children_cost(scope, call)

    def resized(self, call: Call, before: Scope, after: Scope) -> Call:
        """The call at a scope whose token grid is finer or coarser than that in front of this component."""
        return call if before.tokens == after.tokens else call.with_tokens(call.tokens * after.tokens // before.tokens)

    def children_cost(self, scope: Scope, call: Call) -> Cost:
        """The sum over the children, each called once on all tokens."""
        total = Cost()
        for child in self.children(scope).values():
            total += child.cost(call)
        return total

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """What it computes.

        `module` holds the children and tensors that were declared, under their names. Mixers, channel mixers, layers
        and bodies take `(x, ctx, state)` with `x` `[batch, tokens, width]` and return `(y, state)`; a state is a
        dictionary with the tensors of `state` and one entry for each child that has a state, or None where nothing is
        remembered. Norms, activations and linear maps take and return one tensor.
        """
        raise NotImplementedError

    def module(self, scope: Scope) -> torch.nn.Module:
        """The module that computes it, without children and with uninitialised tensors on the default device."""
        from zoo.builder import Block

        return Block(self, scope)

    def project(
        self, scope: Scope, inputs: Axis, outputs: Axis, *, bias: bool = False, residual: bool = False
    ) -> Child:
        """A child of role `linear` that maps axis `inputs` to axis `outputs`."""
        linear = getattr(self, "linear", None) or scope.linear
        return Child(linear, scope.at(projection=Projection(inputs, outputs, bias, residual)))

    def fill(self, scope: Scope) -> Self:
        """The same component with every default spelled out for its place, itself and all that stands inside it."""
        inner = self.inner(scope)
        updates: dict[str, Any] = {}
        for name, slot in slots(type(self)).items():
            value = getattr(self, name)
            if value is None and slot.inherited:
                value = getattr(inner, slot.role.value)
            if isinstance(value, Component):
                updates[name] = value.fill(inner)
            elif slot.many and value is not None:
                updates[name] = _filled_in_turn(value, inner)
        updates |= {name: value for name, value in self.derive(inner).items() if getattr(self, name) is None}
        return self.model_copy(update=updates)

    def walk(self, scope: Scope, path: str = "") -> Iterator[tuple[str, Component, Scope]]:
        """This component and all inside it, with module paths and scopes, parents first."""
        yield path, self, scope
        for name, child in self.children(scope).items():
            yield from child.component.walk(child.scope, f"{path}.{name}" if path else name)


Mixer = Annotated[Component, Slot(Role.MIXER)]
Channel = Annotated[Component, Slot(Role.CHANNEL)]
Norm = Annotated[Component, Slot(Role.NORM)]
Activation = Annotated[Component, Slot(Role.ACTIVATION)]
Linear = Annotated[Component, Slot(Role.LINEAR)]
Position = Annotated[Component, Slot(Role.POSITION)]
Residual = Annotated[Component, Slot(Role.RESIDUAL)]
Stem = Annotated[Component, Slot(Role.STEM)]
Reduce = Annotated[Component, Slot(Role.REDUCE)]
Body = Annotated[Component, Slot(Role.BODY, default="stack")]
Head = Annotated[Component, Slot(Role.HEAD)]


def _filled_in_turn(parts: tuple[Component, ...], scope: Scope) -> tuple[Component, ...]:
    """Components that follow each other, each filled in for the scope behind the one before."""
    filled: list[Component] = []
    for part in parts:
        filled.append(_filled(part, scope))
        scope = filled[-1].out(scope)
    return tuple(filled)


@memoized()
def _filled(part: Component, scope: Scope) -> Component:
    """`part.fill(scope)`; layers of one form stand in many models."""
    return part.fill(scope)


def _coerced(component: type[Component], values: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Values ready for pydantic: components in their slots, tuples for lists; what cannot be is left out and noted."""
    taken: dict[str, Any] = {}
    for name, value in values.items():
        slot = slots(component).get(name)
        if slot is None or value is None:
            taken[name] = _frozen(value)
        elif not slot.many:
            taken[name] = _attempt(slot, value, name, problems)
        elif isinstance(value, list | tuple):
            items = [_attempt(slot, item, f"{name}[{index}]", problems) for index, item in enumerate(value)]
            taken[name] = tuple(item for item in items if item is not None)
        else:
            problems.append(Problem(name, f"expected a list of {slot.role}s; got {_shown(value)}"))
    return taken


def _attempt(slot: Slot, value: Any, path: str, problems: list[Problem]) -> Component | None:
    try:
        return slot.coerce(value)
    except SpecError as error:
        problems += [replace(problem, path=f"{path}.{problem.path}") for problem in error.problems]
    except ZooError as error:
        problems.append(Problem(path, str(error)))
    return None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _translated(component: type[Component], error: ValidationError, broken: set[str]) -> Iterator[Problem]:
    """Pydantic's findings in this package's words, without those about fields that are already known to be broken."""
    name = component.type or component.__name__
    roots = {path.split(".")[0].split("[")[0] for path in broken}
    found = error.errors(include_url=False, include_context=True)
    unknown = [str(item["loc"][0]) for item in found if item["type"] == "extra_forbidden"]
    keys = _keys(component)
    meant = {nearest(key, keys) for key in unknown}
    seen: set[str] = set()
    for item in found:
        field = str(item["loc"][0]) if item["loc"] else ""
        needed = item["type"] == "missing" and len(item["loc"]) == 1
        if field in roots or field in seen or (needed and meant & {field, "extends"}):
            continue
        seen.add(field)
        index = "".join(f"[{part}]" for part in item["loc"][1:] if isinstance(part, int))
        if item["type"] == "extra_forbidden":
            message = f"unknown key {field!r} of {name}{did_you_mean(field, keys)}"
        elif needed:
            message = f"{name} needs {field!r}"
        else:
            message = f"expected {_expected(item, slots(component).get(field))}; got {_shown(item['input'])}"
            index = "" if item["type"] == "missing" else index
        yield Problem(field + index, message)


def _keys(component: type[Component]) -> list[str]:
    """The keys of a mapping that stands for a component in a file."""
    beside = ["overrides"] if "layers" in component.model_fields else []
    on_top = ["extends", "vars"] if component.role is Role.MODEL else []
    return ["type", *component.model_fields, *beside, *on_top]


def _expected(item: ErrorDetails, slot: Slot | None) -> str:
    """What a finding of pydantic's says would be right."""
    if slot is not None:
        return f"{with_article(slot.role)}: a type name or a mapping with a `type`"
    limits = item.get("ctx", {})
    match item["type"]:
        case "missing":
            return f"at least {int(item['loc'][-1]) + 1} items"
        case "too_short":
            return f"at least {limits['min_length']} items"
        case "too_long":
            return f"at most {limits['max_length']} items"
        case "tuple_type":
            return "a list"
    return item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _shown(value: Any, most: int = 60) -> str:
    """A value for a message, as a file would say it, cut where it is long."""
    text = "nothing" if value is None else repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
