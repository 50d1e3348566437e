"""A built model: forward passes, streaming with a state, generation, saving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from zoo.blocks.model import Spec
from zoo.builder import Block, declared, empty_state, initialize
from zoo.context import Context
from zoo.errors import ZooError, memory_explained
from zoo.generate import generate
from zoo.kernels.dispatch import use

BUILD_ADVICE = "`zoo cost` says what it takes; --dtype bfloat16 halves it, and --device meta allocates nothing"


@dataclass(frozen=True, slots=True)
class State:
    """What a model remembers of the `past` tokens that it has seen; there is room for `capacity` of them."""

    past: int
    capacity: int
    tree: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Output:
    """What a forward pass returns.

    logits: `[batch, tokens, vocab]` of a language model, `[batch, classes]`, or `[batch, outputs]`.
    losses: auxiliary losses, weighted, to be added to the model's own. state: set if one was given.
    hidden: the output of each layer `[batch, tokens, width]`, if asked for. loss: the mean cross entropy in nats over
    the labels that were given, if the head computes it by itself; `logits` then are those of no token.
    """

    logits: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    state: State | None = None
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


class Model(Block):
    """A spec as a `torch.nn.Module`; `zoo.build` makes it.

    `entry` is the scope behind the stem; `sequential` tells whether tokens come one after the other, not as a grid.
    """

    def __init__(self, spec: Spec) -> None:
        spec = spec.fill()
        super().__init__(spec, spec.root())
        self.spec = spec
        self.checkpointing = False
        self.entry = spec.stem.out(self.scope)
        self.sequential = self.entry.prefix == 0 and len(self.entry.grid) == 1
        parts = [part for _, part, _ in spec.walk(self.scope)]
        self._without_state = list(dict.fromkeys(part.type for part in parts if not part.traits.streaming))
        self._without_packing = list(dict.fromkeys(part.type for part in parts if not part.traits.packed))

    @property
    def head_kind(self) -> str:
        """`language_model`, `classifier` or `regression`."""
        return getattr(self.spec.head, "kind", "other")

    @property
    def no_decay(self) -> frozenset[str]:
        """Names of the parameters that weight decay must leave alone."""
        return frozenset(name for name, parameter in declared(self.spec, self.scope) if not parameter.decay)

    def set_checkpointing(self, enabled: bool = True) -> Self:
        """Recompute each layer in the backward pass in place of keeping its activations."""
        self.checkpointing = enabled
        return self

    def forward(
        self,
        inputs: Tensor,
        *,
        state: State | None = None,
        segments: Tensor | None = None,
        hidden_states: bool = False,
        labels: Tensor | None = None,
    ) -> Output:
        """What the model says of `inputs`.

        `inputs` are `[batch, tokens]` integers or `[batch, channels, height, width]` images. With a `state`, the
        inputs follow on the tokens that it has seen and `Output.state` has seen them too. `segments`
        `[batch, tokens]` names the sequence of each token where several are laid end to end; it excludes a state.
        With `labels` `[batch, tokens]`, the token that follows each or -100 where none counts, a language model's head
        that is a full matrix gives the `loss` in place of the `logits`, of which only a few are held at a time; other
        heads give their logits.
        """
        tokens = inputs.shape[1] if self.sequential else self.entry.tokens
        past = 0 if state is None else state.past
        self._check(tokens, state, segments)
        ctx = Context(
            positions=_positions(tokens, past, segments, inputs.device),
            past=past,
            grid=(tokens,) if self.sequential else self.entry.grid,
            prefix=self.entry.prefix,
            segments=segments,
            hidden=[] if hidden_states else None,
            checkpointing=self.checkpointing,
            labels=labels,
        )
        with use(**self.spec.kernel_choices) if self.spec.kernels else nullcontext():
            logits, tree = super().forward(inputs, ctx, None if state is None else state.tree)
        return Output(
            logits=logits,
            losses={name: torch.stack(values).sum() for name, values in ctx.losses.items()},
            state=None if state is None else State(past + tokens, state.capacity, tree),
            hidden=None if ctx.hidden is None else tuple(ctx.hidden),
            loss=ctx.loss,
        )

    def _check(self, tokens: int, state: State | None, segments: Tensor | None) -> None:
        if state is not None and not (self.sequential and self.scope.causal):
            raise ZooError("only a causal model of token sequences can go on from a state")
        if state is not None and segments is not None:
            raise ZooError("packed sequences (`segments`) and a state exclude each other")
        if state is not None and self._without_state:
            raise ZooError(f"{' and '.join(self._without_state)} cannot go on from a state")
        if segments is not None and self._without_packing:
            raise ZooError(f"{' and '.join(self._without_packing)} cannot keep packed sequences apart")
        if state is not None and state.past + tokens > state.capacity:
            raise ZooError(
                f"the state has room for {state.capacity} tokens: {state.past} are taken and {tokens} more came; "
                "ask `init_state` for more"
            )

    def init_state(self, batch: int, capacity: int | None = None) -> State:
        """The state before the first token, for `batch` sequences of up to `capacity` tokens (the spec's context)."""
        capacity = self.spec.context if capacity is None else capacity
        like = next(self.parameters())
        return State(0, capacity, empty_state(self.spec, self.scope, batch, capacity, like))

    def prefill(self, tokens: Tensor, state: State | None = None, *, chunk: int | None = None) -> Output:
        """Feed `tokens` `[batch, tokens]`, at most `chunk` at a time; the output is that of the last piece."""
        if chunk is not None and chunk < 1:
            raise ZooError(f"chunk must be at least 1; got {chunk}")
        state = self.init_state(tokens.shape[0]) if state is None else state
        pieces = tokens.split(chunk or max(1, tokens.shape[1]), dim=1)
        output: Output = self(pieces[0], state=state)
        for piece in pieces[1:]:
            output = self(piece, state=output.state)
        return output

    def step(self, tokens: Tensor, state: State) -> Output:
        """One more token for each sequence, `[batch]` or `[batch, 1]`."""
        return self(tokens.reshape(-1, 1), state=state)

    def generate(self, prompt: Tensor, max_tokens: int, **options: Any) -> Tensor:
        """Continue `prompt` `[batch, tokens]`; see `zoo.generate.generate` for the options."""
        return generate(self, prompt, max_tokens, **options)

    def example_inputs(self, batch: int, tokens: int) -> Tensor:
        """Inputs of the right shape and kind, on the model's device."""
        parameter = next(self.parameters())
        stem = self.spec.stem
        if getattr(stem, "inputs", "tokens") == "images":
            channels, (height, width) = getattr(stem, "channels", 3), getattr(stem, "image", (1, 1))
            return torch.zeros(batch, channels, height, width, dtype=parameter.dtype, device=parameter.device)
        vocab = getattr(stem, "vocab", 2)
        flat = torch.arange(batch * tokens, device=parameter.device) % vocab
        return flat.reshape(batch, tokens)

    def forward_case(self, batch: int, tokens: int) -> Callable[[], object]:
        """A call without arguments that runs one forward pass, for timing."""
        inputs = self.example_inputs(batch, tokens)
        return lambda: self(inputs)

    def decode_case(self, batch: int, past: int) -> Callable[[], object]:
        """A call without arguments that decodes one token behind `past` others, the same each time, for timing.

        What the model remembers of them is zeros, which take as long as anything else and need no prefill.
        """
        state = replace(self.init_state(batch, past + 1), past=past)
        token = self.example_inputs(batch, 1)
        return lambda: self(token, state=state)

    def save(self, path: str | Path) -> Path:
        """Write weights and spec into one safetensors file; `zoo.load_model` reads it. Returns the path.

        Raises `ZooError` where the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        from zoo.spec.document import dump

        path = Path(path)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        try:
            save_file(tensors, path, metadata={"spec": dump(self.spec)})
        except (OSError, SafetensorError) as error:
            if not path.parent.is_dir():
                raise ZooError(f"cannot write {path}: there is no folder {path.parent}; make it first") from None
            raise ZooError(f"cannot write {path}: {error}") from None
        return path


def build(
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """A model from a spec, a spec's name, or a file.

    On `meta` nothing is allocated. Elsewhere each parameter gets values that depend on `seed` and its name only.
    """
    from zoo.spec.document import as_spec

    spec = as_spec(spec)
    with torch.device("meta"):
        model = Model(spec)
    model = model.to(dtype)
    if torch.device(device).type == "meta":
        return model
    with memory_explained(f"building the model on {device}", BUILD_ADVICE):
        model = model.to_empty(device=device)
        initialize(model, dict(declared(model.spec, model.scope)), seed)
    return model


def load_model(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model that `Model.save` wrote. Only tensors and the spec's text are read: nothing in the file is executed."""
    from safetensors import SafetensorError, safe_open

    from zoo.spec.document import parse

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("spec")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{path}: not a readable safetensors file: {error}") from None
    if text is None:
        raise ZooError(f"{path}: holds weights but no spec; only files that `Model.save` wrote can be loaded")
    spec = parse(text, file=str(path))
    kind = next(iter(tensors.values())).dtype if tensors else torch.float32
    model = build(spec, device="meta", dtype=kind)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ZooError(f"{path}: the weights do not fit the spec in the same file: {error}") from None
    return model.to(device=device, dtype=dtype)


def _positions(tokens: int, past: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Positions from `past` on; in packed sequences each segment counts from zero."""
    positions = torch.arange(past, past + tokens, device=device)
    if segments is None:
        return positions
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return positions - torch.where(starts, positions, 0).cummax(dim=1).values
