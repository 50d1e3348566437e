"""The loss of a language model without its logits, against cross entropy of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

import zoo
from zoo.kernels.dispatch import observed
from zoo.model import Model

VOCAB = 13


def built(head: dict[str, Any]) -> Model:
    layer = {"mixer": {"type": "attention", "heads": 2}, "channel": "glu"}
    spec = {"width": 16, "context": 8, "init_std": 0.4, "stem": {"type": "token", "vocab": VOCAB}, "head": head}
    return zoo.build({**spec, "body": {"layers": [layer]}}, dtype=torch.float64)


def tokens_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens, labels = torch.randint(VOCAB, (2, 8)), torch.randint(VOCAB, (2, 8))
    labels[0, :3] = -100
    return tokens, labels


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_is_that_of_the_logits(tied: bool, softcap: float | None) -> None:
    model = built({"type": "language_model", "tied": tied, "softcap": softcap})
    tokens, labels = tokens_and_labels()
    with observed() as notes:
        output = model(tokens, labels=labels)
    assert "linear_cross_entropy" in [primitive.name for primitive, _ in notes]
    assert output.logits.shape == (2, 0, VOCAB)
    expected = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
    assert output.loss is not None
    assert_close(output.loss, expected)
    found, wanted = gradients(model, output.loss), gradients(model, expected)
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], what=name)


def test_without_labels_there_is_no_loss() -> None:
    output = built({"type": "language_model"})(tokens_and_labels()[0])
    assert output.loss is None
    assert output.logits.shape == (2, 8, VOCAB)


def test_a_projection_of_another_kind_gives_its_logits() -> None:
    model = built({"type": "language_model", "tied": False})
    model.head.project = torch.nn.Linear(16, VOCAB).double()
    tokens, labels = tokens_and_labels()
    output = model(tokens, labels=labels)
    assert output.loss is None
    assert output.logits.shape == (2, 8, VOCAB)


def test_no_label_that_counts_is_no_loss() -> None:
    tokens, labels = tokens_and_labels()
    output = built({"type": "language_model"})(tokens, labels=torch.full_like(labels, -100))
    assert output.loss is not None
    assert output.loss.item() == 0
