"""Peak memory that is counted from specs, against what the allocator records on the CPU.

    python -m bench.bench_memory --json bench/results/memory.json

For each spec: the intermediate results of a forward pass without gradients (`activations`), and everything that a
training step holds, which is weights, gradients, the moments of AdamW and activations, without and with checkpointing
(`train_memory`, `train_memory_checkpointed`). A step is a forward pass, the loss, a backward pass and the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.record import arguments, finish, publish

TOLERANCE = 0.1
TEXT = "width: 128\ncontext: 256\nstem: {{type: token, vocab: 512}}\nhead: language_model\nbody: {{layers: [{}]}}\n"
LAYER = "{{repeat: 4, of: {{mixer: {}, channel: {}}}}}"
SMALL = {
    "attention": ("{type: attention, heads: 4}", "glu"),
    "window": ("{type: attention, heads: 8, kv_heads: 2, window: 32}", "mlp"),
    "gated heads": ("{type: attention, heads: 4, gate: head}", "glu"),
    "linear attention": ("linear_attention", "glu"),
    "mamba": ("mamba", "null"),
    "mamba2": ("mamba2", "null"),
    "experts": ("{type: attention, heads: 4}", "{type: moe, experts: 8, top_k: 2, hidden: 256}"),
    "pooling": ("pooling", "mlp"),
}
SHIPPED = ("tiny-bytes", "mamba-130m", "matformer-small", "mohd-small", "mixer-b16", "pyramid-digits")


def specs() -> Iterator[tuple[str, Any, int, int]]:
    """Names, specs, batches and tokens."""
    import zoo

    for name, (mixer, channel) in SMALL.items():
        yield name, zoo.parse(TEXT.format(LAYER.format(mixer, channel))), 4, 256
    for name in SHIPPED:
        spec = zoo.load(name)
        yield name, spec, 2, min(256, spec.context)


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
    for name, spec, batch, tokens in specs():
        counted = zoo.metrics(spec, zoo.Workload(batch=batch, seq=tokens))
        for figure, found in measured(spec, batch, tokens).items():
            off = counted.get(figure, 0) / found - 1
            rows.append(
                {
                    "spec": name,
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
