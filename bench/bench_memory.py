"""Peak memory that is counted from specs, against what the allocator records on the CPU.

    python -m bench.bench_memory --json bench/results/memory.json

For each spec: the intermediate results of a forward pass without gradients (`activations`), and everything that a
training step holds, which is weights, gradients, the moments of AdamW and activations, without and with checkpointing
(`train_memory`, `train_memory_checkpointed`). A step is a forward pass, the loss, a backward pass and the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.record import arguments, finish, publish

TOLERANCE = 0.1
Case = tuple[Any, int, int]
"""A spec, sequences of a batch, and tokens of each."""

MODEL = """
width: {width}
context: 256
stem: {{type: token, vocab: {vocab}}}
head: {head}
body: {{layers: [{{repeat: 4, of: {layer}}}]}}
"""
DERIVED: dict[str, dict[str, Any]] = {
    "attention": {"layer": "{mixer: {type: attention, heads: 4}, channel: glu}"},
    "window": {"layer": "{mixer: {type: attention, heads: 8, kv_heads: 2, window: 32}, channel: mlp}"},
    "gated heads": {"layer": "{mixer: {type: attention, heads: 4, gate: head}, channel: glu}"},
    "linear attention": {"layer": "{mixer: linear_attention, channel: glu}"},
    "mamba": {"layer": "{mixer: mamba}"},
    "mamba2": {"layer": "{mixer: mamba2}"},
    "experts": {"layer": "{mixer: {type: attention, heads: 4}, channel: {type: moe, experts: 8, hidden: 256}}"},
    "pooling": {"layer": "{mixer: pooling, channel: mlp}"},
}
"""Layers 128 wide on which the memory of each component was looked at, tensor by tensor."""
HELD_OUT: dict[str, dict[str, Any]] = {
    "soft cap": {
        "layer": "{mixer: {type: attention, heads: 6, kv_heads: 3, softcap: 30.0, qk_norm: rmsnorm}, channel: glu, "
        "residual: sandwich}",
        "width": 96,
        "batch": 3,
        "tokens": 200,
    },
    "retention": {
        "layer": "{mixer: {type: linear_attention, decay: data, heads: 3, gate: true, position: none}, channel: mlp, "
        "norm: layernorm}",
        "width": 96,
        "head": "{type: language_model, tied: false}",
    },
    "wide states": {"layer": "{mixer: {type: mamba, expand: 1.5, state_dim: 32}, channel: glu}", "width": 192},
    "groups": {"layer": "{mixer: {type: mamba2, groups: 2, head_dim: 32, state_dim: 64}, channel: mlp}", "tokens": 250},
    "large vocabulary": {
        "layer": "{mixer: {type: attention, heads: 2, position: alibi}, channel: {type: glu, activation: gelu}}",
        "width": 64,
        "vocab": 8000,
        "batch": 8,
    },
}
"""Other settings, widths and lengths, which nothing was derived from, and neither from the shipped specs."""
SHIPPED = (
    "tiny-bytes",
    "gpt2",
    "mamba-130m",
    "mamba2-130m",
    "matformer-small",
    "mohd-small",
    "mixer-b16",
    "vit-b16",
    "pyramid-digits",
)


def small(table: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Case]]:
    """The cases of a table by name."""
    import zoo

    for name, given in table.items():
        each = {"width": 128, "vocab": 512, "head": "language_model", "batch": 4, "tokens": 256, **given}
        yield name, (zoo.parse(MODEL.format(**each)), each["batch"], each["tokens"])


def cases() -> Iterator[tuple[str, str, Case]]:
    """All cases with what they are for, and their names."""
    import zoo

    yield from (("derived", name, case) for name, case in small(DERIVED))
    yield from (("held out", name, case) for name, case in small(HELD_OUT))
    for name in SHIPPED:
        spec = zoo.load(name)
        yield "held out", name, (spec, 2, min(256, spec.context))


def measured(spec: Any, batch: int, tokens: int) -> dict[str, float]:
    """Bytes by figure."""
    import torch

    import zoo
    from zoo.blocks.matformer import set_granularity
    from zoo.hardware.memory import cold_peak_bytes
    from zoo.train.module import loss_sum
    from zoo.train.optimizer import adamw

    model = zoo.build(spec, seed=0)
    inputs = model.example_inputs(batch, tokens)
    model.eval()
    with torch.inference_mode():
        model(inputs)
        found = {"activations": float(cold_peak_bytes(lambda: model(inputs)))}
    # Training draws one of the nested networks; the widest is what has to fit.
    if widest := [len(part.widths) - 1 for part in nested(model)]:
        set_granularity(model, widest)
    model.train()
    labels = torch.zeros(inputs.shape if model.head_kind == "language_model" else batch, dtype=torch.long)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def forward() -> torch.Tensor:
        output = model(inputs, labels=labels)
        loss = output.loss
        if loss is None:
            total, count = loss_sum(output.logits, labels, model.head_kind)
            loss = total / count
        return loss + sum(output.losses.values())

    for name, checkpointing in (("train_memory", False), ("train_memory_checkpointed", True)):
        model.set_checkpointing(checkpointing)
        model.zero_grad(set_to_none=True)
        optimizer = adamw(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

        def step(optimizer: Any = optimizer) -> None:
            # In Lightning's order, in which the gradients of the step before live through the forward pass.
            loss = forward()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        def steps() -> None:
            step()
            step()

        found[name] = float(weights + cold_peak_bytes(steps))
    return found


def nested(model: Any) -> list[Any]:
    """The components that hold nested networks."""
    from zoo.blocks.matformer import MatFormer

    found = (getattr(module, "component", None) for module in model.modules())
    return [component for component in found if isinstance(component, MatFormer)]


def main() -> None:
    """Run all."""
    options = arguments(__doc__ or "")
    import zoo

    rows: list[dict[str, Any]] = []
    for use, name, (spec, batch, tokens) in cases():
        counted = zoo.metrics(spec, zoo.Workload(batch=batch, seq=tokens))
        for figure, found in measured(spec, batch, tokens).items():
            off = counted.get(figure, 0) / found - 1
            rows.append(
                {
                    "spec": name,
                    "use": use,
                    "figure": figure,
                    "measured": found,
                    "counted": counted.get(figure, 0),
                    "off": off,
                    "met": abs(off) <= TOLERANCE,
                }
            )
    finish(publish("Memory, counted against measured", rows, options.json))


if __name__ == "__main__":
    main()
