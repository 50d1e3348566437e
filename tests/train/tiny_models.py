"""Models with the interface that training asks for, as small as they can be."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn


@dataclass
class Output:
    logits: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None


class TinyLanguageModel(nn.Module):
    """Embedding, a causal mean of the past, a hidden layer with dropout, and a tied or separate head."""

    head_kind = "language_model"

    def __init__(
        self, vocab: int = 256, width: int = 16, *, dropout: float = 0.0, tied: bool = False, auxiliary: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spec = SimpleNamespace(hash=f"tiny-{vocab}-{width}")
        self.embedding = nn.Embedding(vocab, width)
        self.hidden = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.auxiliary = auxiliary
        self.no_decay = frozenset({"embedding.weight", "hidden.bias", "norm.weight", "norm.bias"})

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Output:
        x = self.embedding(inputs)
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = self.dropout(torch.tanh(self.hidden(torch.cat([x, past], -1))))
        losses = {"balance": 0.01 * x.square().mean()} if self.auxiliary else {}
        return Output(self.head(self.norm(x)), losses)


class TinyClassifier(nn.Module):
    """A linear classifier of images."""

    head_kind = "classifier"
    no_decay = frozenset({"layer.bias"})

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spec = SimpleNamespace(hash="classifier")
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Output:
        return Output(self.layer(inputs.flatten(1)))
