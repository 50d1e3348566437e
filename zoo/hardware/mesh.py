r"""The least time of a model on a mesh of chips, in closed form: compute, weights, state, communication, best layout.

The model is that of Pope et al. 2022, Efficiently Scaling Transformer Inference (arXiv 2211.05102), sections 3.1 to
3.3. A pass takes

$$t = \max\Big(\frac{\mathrm{flops}}{n\,\mathrm{peak}},\;
  \frac{\mathrm{weights} / n + \mathrm{state}}{\mathrm{bandwidth}}\Big) + \frac{\mathrm{exchanged}}{\mathrm{link}}$$

on $n$ chips, with the bytes of state that the fullest chip holds and the bytes that each chip receives: a gather or a
scatter-reduction whose larger side is $D$ bytes on a chip takes $D (k - 1) / k$ over $k$ chips. Like a roofline it is a
bound: kernels that reach their peak, and chips that wait for nothing but the link.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zoo.accounting import Place, Workload, places
from zoo.breakdown import weight_bits
from zoo.errors import ZooError
from zoo.hardware.profile import Profile
from zoo.registry import Role

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.component import Child

MeshPhase = Literal["prefill", "decode"]

MOST_CHIPS = 2**16


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is cut: `gathered * width_split * inner_split` chips.

    The batch is cut in `gathered` parts, and weights are gathered from that many chips before they are used; 1 leaves
    them where they are. Matrices are cut in `width_split` parts along the stream and `inner_split` along their other
    side. States are cut by sequence in `sequences` parts and by head over the chips that are left.
    """

    gathered: int
    width_split: int
    inner_split: int
    sequences: int

    @property
    def chips(self) -> int:
        return self.gathered * self.width_split * self.inner_split

    @property
    def weights(self) -> str:
        """What happens to weights: `stationary 1x8`, the paper's 1D, `stationary 2x4`, its 2D, or `gathered 4x2`."""
        kind, first = ("gathered", self.gathered) if self.gathered > 1 else ("stationary", self.width_split)
        return f"{kind} {first}x{self.inner_split}"

    @property
    def attention(self) -> Literal["heads", "batch"]:
        """What states are cut by first."""
        return "batch" if self.sequences > 1 else "heads"


@dataclass(frozen=True, slots=True)
class Placement:
    """What one layout takes: seconds by cause, the bytes that the fullest chip holds, and the share of the peak."""

    layout: Layout
    compute: float
    weight_load: float
    state_load: float
    communication: float
    memory: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Arithmetic and memory overlap; communication is waited for."""
        return max(self.compute, self.weight_load + self.state_load) + self.communication

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: what matrix products have to compute over what the chips could meanwhile."""
        return self.compute / self.seconds


@dataclass(frozen=True, slots=True)
class MeshCost:
    """All layouts of a pass, the best first: those that fit, the fastest of them first.

    enough: the smallest power of two of chips that has a layout that fits; None if there is none.
    """

    phase: MeshPhase
    chips: int
    placements: tuple[Placement, ...]
    enough: int | None

    @property
    def best(self) -> Placement:
        return self.placements[0]


def parse_mesh(text: str) -> int | tuple[int, ...]:
    """`8` chips in any arrangement, or the axes of `4x4x4`; a `ZooError` for anything else."""
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ZooError(f"{text!r} is not a mesh; expected a number of chips such as 8, or axes such as 4x4x4")
    sizes = tuple(map(int, parts))
    if math.prod(sizes) > MOST_CHIPS:
        raise ZooError(f"a mesh of {math.prod(sizes):,} chips; at most {MOST_CHIPS:,} would do")
    return sizes if len(sizes) > 1 else math.prod(sizes)


def mesh_cost(
    spec: Spec,
    work: Workload,
    device: Profile,
    mesh: int | Sequence[int],
    phase: MeshPhase,
    *,
    weights: str | None = None,
) -> MeshCost:
    """What a pass takes on a mesh of chips, under every layout that cuts the layers into equal parts.

    `mesh` is a number of chips, in whatever arrangement, or the sizes of its axes, each of which is used whole.
    `prefill` reads `work.seq` tokens of each sequence, `decode` one more behind `work.past`. `weights` is what
    weights are stored in, a dtype or `int2` to `int8`, scales left out, by default the workload's dtype, in which
    arithmetic stays.

    Weights stay, cut in one dimension or two, or are gathered over some of the chips with the batch cut among these.
    States are cut by head, of which each chip holds a whole number, or by sequence; states that do not grow with the
    tokens divide evenly. A branch reads the stream once and writes to it once, all branches of a parallel layer
    together; what stem and head exchange is left out. Experts are cut as every matrix is. Layouts are tried one by one,
    each in as many steps as there are forms of layers.

    Raises `ZooError` for a device without a link, a model that does not generate and is to decode, an unknown dtype,
    and a mesh that cuts nothing equally.
    """
    sizes = (mesh,) if isinstance(mesh, int) else tuple(mesh)
    if not sizes or min(sizes) < 1:
        raise ZooError(f"a mesh of {'x'.join(map(str, sizes)) or 'no'} chips; expected at least one along each axis")
    chips = math.prod(sizes)
    if chips > 1 and device.link is None:
        raise ZooError(
            f"{device.name} has no `link` to other chips, which a mesh of {chips} needs; add its bytes a second to the "
            "device's file, for example `link: 300GB`, or ask for one chip"
        )
    demand = _demand(spec, work.at(spec.context), phase, weights)
    splits = _divisors(chips) if isinstance(mesh, int) else _products(sizes)
    found = [_placement(demand, layout, device) for layout in _layouts(demand, chips, splits)]
    if not found:
        raise ZooError(f"{_refusal(demand, chips, sizes)}{_nearest(demand, chips)}")
    found.sort(key=lambda one: (not one.fits, one.seconds if one.fits else one.memory, one.seconds))
    return MeshCost(phase, chips, tuple(found), _enough(demand, device))


@dataclass(frozen=True, slots=True)
class _Branch:
    """What reads the stream once and writes to it once.

    rows: tokens of all sequences. inner: channels that the stream is mapped to and from, together; `mixed` of them
    belong to the mixer. side: the longest other side of its matrices. weights: elements of its matrices.
    """

    rows: int
    width: int
    inner: float
    mixed: float
    side: int
    weights: int


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a pass asks of the whole mesh, in FLOPs and bytes.

    states: bytes of all sequences by the number of heads that they divide into; 0 for those that divide evenly.
    """

    batch: int
    flops: float
    rate: str
    element_bytes: int
    weight_bytes: float
    loaded: float
    params: int
    states: Mapping[int, float]
    activations: float
    branches: Mapping[_Branch, int]


def _demand(spec: Spec, work: Workload, phase: MeshPhase, weights: str | None) -> _Demand:
    weight_bytes = weight_bits(weights or work.dtype) / 8
    assert work.seq is not None and work.past is not None
    spec = spec.fill()
    decode = phase == "decode"
    if decode and getattr(spec.head, "kind", "") != "language_model":
        raise ZooError(f"{spec.name or 'the model'} is no language model and decodes nothing; ask for `prefill`")
    states: Counter[int] = Counter()
    branches: Counter[_Branch] = Counter()
    flops = loaded = activations = 0.0
    params = 0
    for place in places(spec, work):
        call, cost = place.call(decode), place.cost(decode)
        flops += sum(operator.computed() * operator.calls for operator in cost.operators)
        activations = max(activations, cost.peak)
        for _, part, scope in place.component.walk(place.scope):
            for parameter in part.parameters(scope).values():
                params += parameter.count
                used = 1 - (1 - float(parameter.active)) ** call.rows
                # A table is read by the row, unless the head multiplies by it.
                loaded += 0 if parameter.embedding and not getattr(spec.head, "tied", False) else parameter.count * used
            if scope.causal:
                kept = part.state(scope, work.past + 1 if decode else work.seq)
                first = part.state(scope, 1)
                for state, tensor in kept.items():
                    # Only what is kept for each token is bound to heads; other memories divide by channel.
                    grows = tensor.shape != first[state].shape
                    heads = 0 if not grows else tensor.shape[1] if len(tensor.shape) > 2 else 1
                    states[heads] += tensor.bytes(work.element_bytes) * work.batch
        if place.component.role is Role.LAYER:
            branches.update(_branches(place, call.rows))
    return _Demand(
        batch=work.batch,
        flops=flops,
        rate=work.dtype,
        element_bytes=work.element_bytes,
        weight_bytes=weight_bytes,
        loaded=loaded,
        params=params,
        states=states,
        activations=activations,
        branches=branches,
    )


def _branches(place: Place, rows: int) -> Iterator[_Branch]:
    """The branches of a layer that multiply by matrices."""
    children = list(place.component.children(place.scope).values())
    inside = [child for child in children if child.component.role in (Role.MIXER, Role.CHANNEL)]
    together = any(child.component.type == "parallel" for child in children)
    for group in [inside] if together else [[child] for child in inside]:
        matrices = [_matrices(child) for child in group]
        inner = [active / child.scope.width for child, (_, active, _) in zip(group, matrices)]
        mixed = sum(share for child, share in zip(group, inner) if child.component.role is Role.MIXER)
        side = max((longest for _, _, longest in matrices), default=0)
        if sum(inner):
            yield _Branch(rows, place.scope.width, sum(inner), mixed, side, sum(count for count, _, _ in matrices))


def _matrices(child: Child) -> tuple[int, float, int]:
    """Elements of the matrices from and to the stream, how many a token uses, and their longest other side."""
    count, active, side = 0, 0.0, 0
    for _, part, scope in child.component.walk(child.scope):
        for parameter in part.parameters(scope).values():
            names = [axis.name.endswith("width") for axis in parameter.axes]
            if len(names) > 1 and any(names):
                count += parameter.count
                active += parameter.count * float(parameter.active)
                side = max(side, *(0 if stream else axis.size for stream, axis in zip(names, parameter.axes)))
    return count, active, side


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _products(sizes: Sequence[int]) -> list[int]:
    """What some of the axes make together."""
    found = {1}
    for size in sizes:
        found |= {size * other for other in found}
    return sorted(found)


def _layouts(demand: _Demand, chips: int, splits: Sequence[int]) -> Iterator[Layout]:
    """The layouts whose parts are equally large."""
    sides, widths = {b.side for b in demand.branches}, {b.width for b in demand.branches}
    most = min(chips, demand.batch)

    def divides(part: int, whole: set[int]) -> bool:
        return all(size % part == 0 for size in whole)

    for part in splits:
        rest = chips // part
        if divides(part, widths) and divides(rest, sides):
            yield from (Layout(1, part, rest, sequences) for sequences in sorted({1, most}))
        if part > 1 and demand.batch % part == 0 and divides(rest, sides):
            yield from (Layout(part, 1, rest, sequences) for sequences in sorted({part, most}))


def _placement(demand: _Demand, layout: Layout, device: Profile) -> Placement:
    chips = layout.chips
    state = _state(demand, layout)
    gathered = max((branch.weights for branch in demand.branches), default=0) * layout.gathered / chips
    stream = max((branch.rows * branch.width for branch in demand.branches), default=0)
    memory = (
        (demand.params / chips + (gathered if layout.gathered > 1 else 0)) * demand.weight_bytes
        + state
        + demand.activations / chips
        + stream * demand.element_bytes / (layout.gathered * layout.width_split)
    )
    exchanged = sum(_exchanged(demand, branch, layout) * count for branch, count in demand.branches.items())
    return Placement(
        layout=layout,
        compute=demand.flops / (chips * device.rate(demand.rate)),
        weight_load=demand.loaded * demand.weight_bytes / (chips * device.bandwidth),
        state_load=state / device.bandwidth,
        communication=exchanged / (device.link or math.inf),
        memory=memory,
        fits=memory <= device.memory,
    )


def _state(demand: _Demand, layout: Layout) -> float:
    """Bytes of state on the fullest chip."""
    sequences = math.ceil(demand.batch / layout.sequences) / demand.batch
    cut = layout.chips // layout.sequences

    def share(heads: int) -> float:
        return math.ceil(heads / cut) / heads if heads else 1 / cut

    return sequences * sum(size * share(heads) for heads, size in demand.states.items())


def _exchanged(demand: _Demand, branch: _Branch, layout: Layout) -> float:
    """Bytes that a chip receives for one branch."""
    x, y, n = layout.width_split, layout.inner_split, layout.gathered
    stream = 2 * branch.width / x * (y - 1) / y + branch.inner / y * (x - 1) / x
    regrouped = layout.sequences / n
    moved = branch.mixed / (x * y) * (regrouped - 1) / regrouped
    return (
        branch.rows / n * (stream + moved) * demand.element_bytes
        + branch.weights * (n - 1) / layout.chips * demand.weight_bytes
    )


def _enough(demand: _Demand, device: Profile) -> int | None:
    """The smallest power of two of chips that has a layout that fits."""
    for chips in (2**power for power in range(MOST_CHIPS.bit_length())):
        layouts = _layouts(demand, chips, [2**power for power in range(chips.bit_length())])
        if any(_placement(demand, layout, device).fits for layout in layouts):
            return chips
    return None


def _refusal(demand: _Demand, chips: int, sizes: Sequence[int]) -> str:
    sides = sorted({side for branch in demand.branches for side in (branch.width, branch.side) if side})
    shape = f"{chips} chips" if len(sizes) == 1 else f"a {'x'.join(map(str, sizes))} mesh"
    return (
        f"{shape} cannot share the layers equally: neither matrices with sides {', '.join(map(str, sides))} nor a "
        f"batch of {demand.batch} divide"
    )


def _nearest(demand: _Demand, chips: int) -> str:
    """The numbers of chips next to this one that would do."""

    def works(number: int) -> bool:
        return any(True for _ in _layouts(demand, number, _divisors(number)))

    below = next((number for number in range(chips - 1, 0, -1) if works(number)), 1)
    above = next((number for number in range(chips + 1, 2 * chips + 1) if works(number)), None)
    return f"; {below}{'' if above is None else f' or {above}'} chips would do"
