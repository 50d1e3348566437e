"""What every registered component promises, as tests."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from zoo.builder import declared, initialize
from zoo.component import Component, Role, Scope
from zoo.cost import Call
from zoo.docs import field_docs
from zoo.testing.flops import counted_flops
from zoo.testing.subject import Example, Subject, module, tensors
from zoo.testing.tolerance import GRADIENT_SLACK, ROUNDINGS, assert_close, error

HALF_SLACK = 8.0
"""How much more bfloat16 may err than a single rounding of each weight and input does."""
FLOP_SHARE = 0.005
"""By how much counted FLOPs may differ from those of `torch.utils.flop_counter`."""
COUNTED = (Role.MIXER, Role.CHANNEL, Role.NORM, Role.LINEAR)
"""Roles whose cost is their own and not that of what stands inside them."""
LONG = 4096
"""Tokens at which what is quadratic stands out."""


def where(applies: Callable[[Example], bool], *, once: bool = False) -> Callable[[Any], Any]:
    """Run a test on those examples only, or on the first of them for each component."""

    def mark(test: Any) -> Any:
        test.applies, test.once = applies, once
        return test

    return mark


def is_built(example: Example) -> bool:
    return example.component.role is not Role.RECORD


def is_mixer(example: Example) -> bool:
    return example.component.role is Role.MIXER


def stands_alone(example: Example) -> bool:
    """Whether it is tried by itself, on a stream of tokens, and may know the grid."""
    return example.spec is None and example.component.role in (Role.MIXER, Role.CHANNEL, Role.LAYER)


def cuts(tokens: int) -> Iterator[list[int]]:
    """Ways to cut `tokens` in pieces: all single, in two, and by chance."""
    yield [1] * tokens
    yield [tokens - 1, 1]
    chance = random.Random(tokens)
    for _ in range(3):
        places = sorted(chance.sample(range(1, tokens), min(tokens - 1, 3)))
        yield [end - start for start, end in zip([0, *places], [*places, tokens], strict=True)]


class ComponentContract:
    """Subclass it with `examples`, each a component with settings; give several to cover what they change.

    Every test runs on each example whose component promises what it checks (`zoo.component.Traits`).
    """

    examples: ClassVar[Sequence[Example]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "example" in metafunc.fixturenames:
            applies = getattr(metafunc.function, "applies", is_built)
            chosen = [each for each in self.examples if applies(each)]
            if getattr(metafunc.function, "once", False):
                chosen = list({type(each.component): each for each in reversed(chosen)}.values())[::-1]
            none = pytest.param(None, marks=pytest.mark.skip("no example promises this"), id="none")
            metafunc.parametrize("example", chosen or [none], ids=str)

    def test_settings_are_right(self, example: Example) -> None:
        assert example.complaints == []

    @where(lambda example: is_mixer(example) and example.component.traits.causal == "never")
    def test_refuses_a_causal_model(self, example: Example) -> None:
        assert example.at(causal=True).complaints != []

    def test_keeps_shapes(self, example: Example) -> None:
        subject = Subject(example)
        for tokens in example.lengths:
            whole = subject(subject.inputs(3, tokens))
            assert torch.isfinite(whole).all()
            assert whole.shape[0] == 3
            if example.per_token:
                assert whole.shape[1] == tokens
            if stands_alone(example):
                assert whole.shape == (3, tokens, example.width)
            assert_close(subject(subject.inputs(3, tokens)[:1]), whole[:1], what="one sequence of three")

    @where(stands_alone)
    def test_takes_the_grids_it_promises(self, example: Example) -> None:
        for dimensions in example.component.traits.grids:
            for prefix in (0, 1):
                if dimensions == 1 and prefix and example.causal:
                    continue
                causal = example.causal and dimensions == 1
                grid = example.grid if dimensions == 1 else (6, 8) if dimensions == 2 else (4, 3, 4)
                placed = example.at(grid=grid, prefix=prefix, causal=causal)
                assert placed.complaints == []
                subject = Subject(placed)
                x = subject.inputs()
                y = subject(x)
                assert y.shape == x.shape
                assert torch.isfinite(y).all()

    def test_float32_agrees_with_float64(self, example: Example) -> None:
        exact, subject = Subject(example), Subject(example, dtype=torch.float32)
        y = subject(subject.inputs())
        assert y.dtype == torch.float32
        assert_close(y, exact(exact.inputs()))

    def test_bfloat16_agrees_with_float64(self, example: Example) -> None:
        exact, half = Subject(example), Subject(example, dtype=torch.bfloat16)
        unrounded, x = exact(exact.inputs()), half.inputs()
        actual = half(x)
        assert actual.dtype == torch.bfloat16
        exact.module.load_state_dict(half.module.state_dict())
        rounded = exact(x.double() if x.dtype.is_floating_point else x)
        assert_close(actual, rounded, plain=unrounded, slack=HALF_SLACK)

    def test_runs_under_autocast(self, example: Example) -> None:
        subject, exact, half = Subject(example, dtype=torch.float32), Subject(example), Subject(example)
        half.module.to(torch.bfloat16).double()
        x = subject.inputs()
        with torch.autocast("cpu", torch.bfloat16):
            actual = subject(x)
        wide, rounded = (x.double(), x.bfloat16().double()) if x.dtype.is_floating_point else (x, x)
        assert_close(actual, exact(wide), plain=half(rounded), slack=HALF_SLACK)
        if actual.requires_grad:
            assert all(gradient.isfinite().all() for gradient in gradients(subject, x, actual).values())

    @where(lambda example: is_built(example) and example.per_token and example.is_causal)
    def test_no_token_sees_later_ones(self, example: Example) -> None:
        subject = Subject(example)
        x = subject.inputs()
        y = subject(x)
        for token in {0, 1, example.tokens // 2, example.tokens - 1}:
            other = subject(subject.changed(x, token))
            assert_close(other[:, :token], y[:, :token], what=f"before token {token}")
            assert error(other[:, token:], y[:, token:]) > 1e-6, f"token {token} changes nothing"

    @where(lambda example: is_mixer(example) and not example.is_causal)
    def test_tokens_see_later_ones(self, example: Example) -> None:
        subject = Subject(example)
        x = subject.inputs()
        other = subject(subject.changed(x, example.tokens - 1))
        assert error(other[:, :-1], subject(x)[:, :-1]) > 1e-6

    @where(lambda example: is_built(example) and example.streams)
    def test_pieces_equal_the_whole(self, example: Example) -> None:
        subject = Subject(example)
        x = subject.inputs()
        whole = subject(x)
        for index, lengths in enumerate(cuts(example.tokens)):
            assert_close(in_pieces(subject, x, lengths, capacity=example.tokens + index), whole, what=f"{lengths}")

    @where(lambda example: is_built(example) and example.streams)
    def test_a_state_can_be_taken_up_again(self, example: Example) -> None:
        subject = Subject(example)
        x, other = subject.inputs(seed=0), subject.inputs(seed=1)
        middle = example.tokens // 2
        with torch.no_grad():
            _, saved = subject.run(x[:, :middle], state=subject.start(2, example.tokens))
            first, _ = subject.run(x[:, middle:], state=saved)
            subject.run(other[:, middle:], state=saved)
            for token in range(middle, example.tokens):
                subject.run(other[:, token : token + 1], state=saved)
            again, _ = subject.run(x[:, middle:], state=saved)
        assert torch.equal(first, again)

    @where(lambda example: is_built(example) and example.streams)
    def test_gradients_pass_through_a_state(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        first = example.tokens // 2 + 1
        assert_same_gradients(subject, lambda x: in_pieces(subject, x, [first, example.tokens - first], grad=True))

    @where(lambda example: is_built(example) and example.packs)
    def test_packed_equals_separate(self, example: Example) -> None:
        subject = Subject(example)
        x, tokens = subject.inputs(), example.tokens
        rows = [[1, tokens // 3, tokens - 1 - tokens // 3], [tokens - 2, 2]]
        segments = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
        packed = subject(x, segments=segments)
        for index, row in enumerate(rows):
            apart = [subject(piece) for piece in x[index : index + 1].split(row, dim=1)]
            assert_close(packed[index : index + 1], torch.cat(apart, dim=1), what=f"sequences of {row}")

    def test_every_parameter_matters(self, example: Example) -> None:
        subject = Subject(example)
        x = subject.inputs()
        found = gradients(subject, x, subject(x))
        for name, gradient in found.items():
            assert torch.isfinite(gradient).all(), name
            assert gradient.any() != (name in example.idle), name

    def test_gradients_are_right(self, example: Example) -> None:
        subject = Subject(example)
        x = subject.inputs(1, example.lengths[-1] if len(example.lengths) == 1 else min(5, example.tokens))
        named = {name: parameter.detach().requires_grad_() for name, parameter in subject.module.named_parameters()}
        stream = (x.requires_grad_(),) if x.dtype.is_floating_point else ()

        def call(*leaves: Tensor) -> Tensor:
            given, weights = (leaves[0], leaves[1:]) if stream else (x, leaves)
            return subject(given, weights=dict(zip(named, weights, strict=True)))

        assert torch.autograd.gradcheck(call, (*stream, *named.values()), fast_mode=True)

    def test_trains(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        subject.module.train()
        losses: dict[str, list[Tensor]] = {}
        torch.manual_seed(0)
        y = subject(subject.inputs(), losses=losses)
        extra = [value for values in losses.values() for value in values]
        assert all(value.dim() == 0 and torch.isfinite(value) for value in extra)
        if not y.requires_grad:
            return
        (y.square().mean() + sum(extra)).backward()
        for name, parameter in subject.module.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name

    def test_holds_the_parameters_it_declares(self, example: Example) -> None:
        expected = list(declared(example.root, example.scope))
        names = [name for name, _ in expected]
        assert len(set(names)) == len(names)
        found = {name: tuple(parameter.shape) for name, parameter in module(example).named_parameters()}
        assert found == {name: parameter.shape for name, parameter in expected}
        for name, parameter in expected:
            assert parameter.count == parameter.active * parameter.count or 0 < parameter.active < 1, name
            assert all(axis.name.isidentifier() for axis in parameter.axes), name

    @where(lambda example: is_built(example) and example.streams)
    def test_holds_the_state_it_declares(self, example: Example) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            subject = Subject(example, dtype=dtype)
            for capacity in (example.tokens, 2 * example.tokens):
                states = [part.state(place, capacity) for _, part, place in example.parts]
                expected = sum(item.bytes(dtype.itemsize) for state in states for item in state.values())
                before = dict(tensors(subject.start(2, capacity).tree))
                assert sum(tensor.nbytes for tensor in before.values()) == 2 * expected
                with torch.no_grad():
                    _, state = subject.run(subject.inputs(), state=subject.start(2, capacity))
                assert state is not None
                after = dict(tensors(state.tree))
                for name, tensor in before.items():
                    assert (name, after[name].shape, after[name].dtype) == (name, tensor.shape, tensor.dtype)
                assert after.keys() == before.keys()

    def test_takes_the_flops_it_says(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        for batch, tokens in [(2, example.tokens), *((1, tokens) for tokens in example.lengths)]:
            for packed in (False, True) if example.packs else (False,):
                said = example.root.cost(example.scope, Call(batch, tokens, packed=packed))
                forward, backward = step_flops(subject, batch, tokens, packed)
                where = f"{batch} x {tokens} tokens{', packed' * packed}"
                assert said.flops == pytest.approx(forward, rel=FLOP_SHARE), where
                assert said.backward_flops == pytest.approx(backward, rel=FLOP_SHARE), f"backward, {where}"

    @where(lambda example: is_built(example) and example.streams)
    def test_takes_the_flops_it_says_in_decoding(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        with torch.no_grad():
            for past in (1, example.tokens - 1):
                x = subject.inputs(2, past + 1)
                _, state = subject.run(x[:, :past], state=subject.start(2, past + 1))
                said = example.root.cost(example.scope, Call(2, 1, past)).flops
                assert said == pytest.approx(flops(subject, x[:, past:], state=state), rel=FLOP_SHARE), f"past {past}"

    def test_cost_is_complete(self, example: Example) -> None:
        small, large = (example.root.cost(example.scope, Call(batch, example.tokens)) for batch in (1, 4))
        for name in ("flops", "backward_flops", "pointwise", "traffic", "saved", "peak", "rising", "falling"):
            assert 0 <= getattr(small, name) <= getattr(large, name), name
        if is_mixer(example) and example.component.type != "identity":
            assert small.traffic > 0
            assert small.pointwise + small.flops > 0

    def test_runs_on_meta(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        shape = subject(subject.inputs()).shape
        x = subject.inputs().to("meta")
        subject.module = module(example).eval()
        assert all(parameter.is_meta for parameter in subject.module.parameters())
        y = subject(x)
        assert y.is_meta
        assert y.shape == shape

    def test_saves_and_loads(self, example: Example) -> None:
        from safetensors.torch import load, save

        subject, other = Subject(example), Subject(example, seed=1)
        held = {name: tensor.contiguous() for name, tensor in subject.module.state_dict().items()}
        other.module.load_state_dict(load(save(held)))
        assert torch.equal(subject(subject.inputs()), other(subject.inputs()))

    def test_starts_from_its_seed_alone(self, example: Example) -> None:
        declarations = dict(declared(example.root, example.scope))

        def start(seed: int, names: Sequence[str]) -> dict[str, Tensor]:
            built = module(example).to_empty(device="cpu")
            initialize(built, {name: declarations[name] for name in names}, seed)
            return {name: parameter for name, parameter in built.named_parameters() if name in names}

        first, again, other = start(0, [*declarations]), start(0, [*declarations]), start(1, [*declarations])
        for name, tensor in first.items():
            assert torch.isfinite(tensor).all(), name
            assert torch.equal(tensor, again[name]), name
            assert torch.equal(tensor, start(0, [name])[name]), f"{name} depends on other parameters"
        random_ones = [name for name, declaration in declarations.items() if declaration.decay]
        assert all(not torch.equal(first[name], other[name]) for name in random_ones)

    def test_compiles_without_breaks(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        x = subject.inputs()
        torch.compiler.reset()
        compiled = torch.compile(lambda x: subject(x), fullgraph=True, backend="eager")
        with torch.no_grad():
            assert_close(compiled(x), subject(x))

    @where(lambda example: is_built(example) and example.streams, once=True)
    def test_compiles_from_a_state(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        x, past = subject.inputs(), example.tokens // 2
        torch.compiler.reset()
        compiled = torch.compile(subject.run, fullgraph=True, backend="eager")
        with torch.no_grad():
            _, state = subject.run(x[:, :past], state=subject.start(2, example.tokens))
            assert_close(compiled(x[:, past:], state=state)[0], subject.run(x[:, past:], state=state)[0])

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    @where(lambda example: example.component.role in (Role.MIXER, Role.CHANNEL, Role.MODEL), once=True)
    def test_compiled_gradients_are_right(self, example: Example) -> None:
        subject = Subject(example, dtype=torch.float32)
        torch.compiler.reset()
        # With the decompositions of the default backend, whose strides are the real ones, but without its code.
        compiled = torch.compile(lambda x: subject(x), fullgraph=True, backend="aot_eager_decomp_partition")
        assert_same_gradients(subject, compiled)

    @where(lambda example: example.component.role in COUNTED)
    def test_linear_time_is_true(self, example: Example) -> None:
        once, twice = (long_flops(example, tokens) for tokens in (LONG, 2 * LONG))
        if example.component.traits.linear_time:
            assert twice <= 2.2 * once
        elif self.is_first(example):
            assert twice > 2.2 * once

    def is_first(self, example: Example) -> bool:
        """Whether it is the first example of its component, the one that shows it as it is."""
        mine = (each for each in self.examples if type(each.component) is type(example.component))
        return next(mine) == example

    @where(lambda example: example.component.role in (*COUNTED, Role.ACTIVATION, Role.POSITION))
    def test_any_length_is_true(self, example: Example) -> None:
        shapes = [
            {name: parameter.shape for name, parameter in declared(component, scope)}
            for component, scope in (longer(example, tokens) for tokens in (LONG, 2 * LONG))
        ]
        assert (shapes[0] == shapes[1]) == example.component.traits.any_length

    @where(lambda example: bool(example.component.traits.elastic))
    def test_elastic_axes_are_there(self, example: Example) -> None:
        axes = {axis.name for _, parameter in declared(example.root, example.scope) for axis in parameter.axes}
        assert set(example.component.traits.elastic) <= axes

    @where(lambda _: True)
    def test_is_documented(self, example: Example) -> None:
        component = type(example.component)
        assert "__doc__" in vars(component), "the class has no docstring of its own"
        assert inspect.cleandoc(component.__doc__ or "")
        assert set(field_docs(component)) == set(component.model_fields)
        if component.role in (Role.MIXER, Role.CHANNEL):
            assert component.entry.sources, "where was it published?"


def in_pieces(
    subject: Subject, x: Tensor, lengths: Sequence[int], *, capacity: int | None = None, grad: bool = False
) -> Tensor:
    """The outputs for `x` fed in pieces of these lengths, each going on from the state after the one before."""
    state, outputs = subject.start(x.shape[0], capacity or x.shape[1]), []
    with torch.set_grad_enabled(grad):
        for piece in x.split(list(lengths), dim=1):
            y, after = subject.run(piece, state=state)
            assert after is not None
            state = after
            outputs.append(y)
    return torch.cat(outputs, dim=1)


def gradients(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of a random combination of outputs by parameter and input; zeros where there is none."""
    leaves = dict(subject.module.named_parameters())
    if x.requires_grad:
        leaves["input"] = x
    if not leaves:
        return {}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in pairs}


def assert_same_gradients(subject: Subject, call: Callable[[Tensor], Tensor]) -> None:
    """Fail unless `call`, another way of computing in float32 what the subject computes, has the same gradients."""
    twin = Subject(subject.example)
    twin.module.load_state_dict(subject.module.state_dict())
    x = subject.inputs()
    if x.dtype.is_floating_point:
        x.requires_grad_()
    wide = x.detach().double().requires_grad_() if x.dtype.is_floating_point else x
    actual, expected = call(x), subject(x)
    assert_close(actual, expected)
    exact, plain = gradients(twin, wide, twin(wide)), gradients(subject, x, expected)
    for name, gradient in gradients(subject, x, actual).items():
        noisy = GRADIENT_SLACK * error(plain[name], exact[name]) > ROUNDINGS * torch.finfo(torch.float32).eps
        assert_close(gradient, exact[name], plain=plain[name] if noisy else None, slack=GRADIENT_SLACK, what=name)


def flops(subject: Subject, x: Tensor, **options: Any) -> int:
    with torch.no_grad():
        return counted_flops(subject, x, **options)


def step_flops(subject: Subject, batch: int, tokens: int, packed: bool) -> tuple[int, int]:
    """FLOPs of a forward and of a backward pass to all weights and to the stream, of three sequences if `packed`."""
    x = subject.inputs(batch, tokens)
    if subject.example.spec is None:
        x.requires_grad_()
    segments = (3 * torch.arange(tokens) // tokens).expand(batch, tokens) if packed else None
    outputs: list[Tensor] = []
    forward = counted_flops(lambda: outputs.append(subject(x, segments=segments)))
    return forward, counted_flops(outputs.pop().sum().backward)


def longer(example: Example, tokens: int) -> tuple[Component, Scope]:
    """The component on a line of `tokens`, filled in."""
    scope = example.scope.at(grid=(tokens,))
    return example.component.fill(scope), scope


def long_flops(example: Example, tokens: int) -> float:
    component, scope = longer(example, tokens)
    return component.cost(scope, Call(1, tokens)).flops
