"""What parameters, weights and states of a spec are made of, counted from the specification alone.

Sums for which `zoo.accounting` has one number: parameters by part and by axis, bytes of weights by what they are stored
in, bytes of state by tensor. They are asked for rarely, so that a search never pays for them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.accounting import ALIASES, ELEMENT_BYTES, Workload, places
from zoo.errors import ZooError, did_you_mean
from zoo.parameter import Parameter
from zoo.registry import Role

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.cost import Operator

PARTS = (Role.STEM, Role.MIXER, Role.CHANNEL, Role.NORM, Role.REDUCE, Role.HEAD)
"""What parameters are counted with: the outermost of these that they stand in, so that norms inside a mixer are its."""
GROUP = 128
"""Quantised weights that share a scale, along the last axis of their tensor."""
SCALE_BYTES = 2
FORMATS = ("float32", "bfloat16", "int8", "int4")
"""What `zoo cost --detail` shows weights in."""
_INTEGERS = re.compile(r"int([2-8])")


@dataclass(frozen=True, slots=True)
class Stored:
    """Weights in a format: `bytes` in all, of which `scales` bytes of scales; `quantised` and `kept` count weights."""

    bytes: int
    scales: int
    quantised: int
    kept: int


def parameters_by_part(spec: Spec) -> dict[str, int]:
    """Numbers of parameters by the part that they stand in, which add up to all; see `PARTS`. A table that a head
    shares with the stem is the stem's.
    """
    found: Counter[str] = Counter()
    for roles, parameter in _parameters(spec):
        part = next((role for role in roles if role in PARTS), roles[-1])
        found[part.value] += parameter.count
    return dict(found)


def parameters_by_axis(spec: Spec) -> dict[str, int]:
    """For each name of an axis (`width`, `hidden`, `heads`, `vocab`, ...) how many parameters are in tensors that have
    it, most first: what narrowing that axis acts on. A matrix counts for both of its axes.
    """
    found: Counter[str] = Counter()
    for _, parameter in _parameters(spec):
        for name in {axis.name for axis in parameter.axes}:
            found[name] += parameter.count
    return dict(found.most_common())


def stored_weights(spec: Spec, format: str, *, kept: str = "bfloat16", group: int = GROUP) -> Stored:
    """What weights take in `format`, a dtype or `int2` to `int8`.

    In an integer format matrices and tables are quantised: tensors of two axes or more that weight decay applies to or
    that are looked up in. Each `group` weights along a tensor's last axis, and the rest of a row, share a scale of 16
    bits, and have no zero point. Norms, offsets, rates and other small tensors stay in the dtype `kept`. Raises
    `ZooError` for an unknown format and a group below 1.
    """
    if group < 1:
        raise ZooError(f"a group of {group} weights; expected at least 1")
    bits, all_bits = weight_bits(format), weight_bits(kept)
    quantised = scales = rest = size = 0
    for _, parameter in _parameters(spec):
        if not _is_integer(format) or not is_quantised(parameter):
            rest += parameter.count
            continue
        rows, last = parameter.count // parameter.shape[-1], parameter.shape[-1]
        quantised += parameter.count
        scales += rows * math.ceil(last / group) * SCALE_BYTES
        size += math.ceil(parameter.count * bits / 8)
    kept_bits = all_bits if _is_integer(format) else bits
    return Stored(size + scales + rest * kept_bits // 8, scales, quantised, rest)


def weight_bits(format: str) -> int:
    """Bits of a weight in a dtype or in `int2` to `int8`, without scales; a `ZooError` for anything else."""
    name = ALIASES.get(format, format)
    if (integer := _INTEGERS.fullmatch(name)) is not None:
        return int(integer[1])
    if name not in ELEMENT_BYTES:
        known = [*ELEMENT_BYTES, *ALIASES, "int8", "int4"]
        raise ZooError(f"unknown dtype {format!r} of weights{did_you_mean(format, known)}")
    return 8 * ELEMENT_BYTES[name]


def weight_bytes(format: str) -> float:
    """Bytes of a weight of a matrix, its part of a scale included."""
    return weight_bits(format) / 8 + (SCALE_BYTES / GROUP if _is_integer(format) else 0.0)


def with_weights_in(operators: Iterable[Operator], format: str, element_bytes: int) -> list[Operator]:
    """Operators that read their weights in `format`, and all else in elements of so many bytes."""
    saved = 1 - weight_bytes(format) / element_bytes
    return [each._replace(traffic=each.traffic - saved * each.weights) for each in operators]


def is_quantised(parameter: Parameter) -> bool:
    """Whether an integer format applies to a parameter: matrices and tables."""
    return len(parameter.axes) > 1 and (parameter.decay or parameter.embedding)


def quantised_traffic(spec: Spec, work: Workload, format: str) -> float:
    """Bytes that a decoding step moves with matrices stored in `format`; activations stay in `work.dtype`."""
    work = work.at(spec.context)
    spec = spec.fill()
    operators = [each for place in places(spec, work) for each in place.cost(decoding=True).operators]
    return sum(each.traffic * each.calls for each in with_weights_in(operators, format, work.element_bytes))


def state_by_tensor(spec: Spec, work: Workload | None = None) -> dict[str, int]:
    """Bytes of the state of a whole batch behind the last token, by what components call their tensors: `keys` and
    `values` (of a window, where there is one), `memory` and `sums` of recurrences, the `tail` of a convolution.
    """
    work = (work or Workload()).at(spec.context)
    spec = spec.fill()
    found: Counter[str] = Counter()
    for _, part, scope in spec.walk(spec.root()):
        if scope.causal:
            for name, tensor in part.state(scope, (work.past or 0) + 1).items():
                found[name] += tensor.bytes(work.element_bytes) * work.batch
    return dict(found)


def breakdown(spec: Spec, work: Workload | None = None) -> Mapping[str, Mapping[str, int]]:
    """All of it: `parts`, `axes`, `weights` (bytes by format) and `state`."""
    kept = "bfloat16" if work is None else work.dtype
    return {
        "parts": parameters_by_part(spec),
        "axes": parameters_by_axis(spec),
        "weights": {format: stored_weights(spec, format, kept=kept).bytes for format in FORMATS},
        "state": state_by_tensor(spec, work),
    }


def _is_integer(format: str) -> bool:
    return _INTEGERS.fullmatch(format) is not None


def _parameters(spec: Spec) -> Iterator[tuple[list[Role], Parameter]]:
    """Every parameter with the roles of what it stands in, outermost first."""
    spec = spec.fill()
    roles: dict[str, list[Role]] = {}
    for path, part, scope in spec.walk(spec.root()):
        roles[path] = [*roles[_parent(path, roles)], part.role] if path else [part.role]
        for parameter in part.parameters(scope).values():
            yield roles[path], parameter


def _parent(path: str, known: Mapping[str, object]) -> str:
    """The nearest path above; a list of layers has none of its own."""
    path = path.rpartition(".")[0]
    return path if not path or path in known else _parent(path, known)
