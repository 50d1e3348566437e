"""Sampling continuations from a language model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.model import Model


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    pad: int = 0,
    chunk: int | None = 512,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each prompt by up to `max_tokens` tokens: `[batch, tokens]` to `[batch, tokens + new]`.

    `temperature` divides the scores; 0 takes the best token. `top_k` keeps the k best tokens, `top_p` the fewest whose
    probabilities reach p (Holtzman et al. 2019); with both, both hold. A sequence that draws a token of `stop` ends
    with it and is filled up with `pad`; generation ends when all have. `on_token` sees each new column `[batch]`.
    Prompts are read in pieces of `chunk` tokens.
    """
    if model.head_kind != "language_model":
        raise ZooError(f"only a language model generates; this model's head is {model.spec.head.type!r}")
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ZooError(f"expected a prompt [batch, tokens] with at least one token; got {tuple(prompt.shape)}")
    if not temperature >= 0:
        raise ZooError(f"temperature must be at least 0; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ZooError(f"top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ZooError(f"top_p must be above 0 and at most 1; got {top_p}")
    if max_tokens <= 0:
        return prompt
    stops = torch.tensor(sorted(stop), device=prompt.device, dtype=prompt.dtype)
    state = model.init_state(prompt.shape[0], prompt.shape[1] + max_tokens)
    output = model.prefill(prompt, state, chunk=chunk)
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    columns = [prompt]
    for index in range(max_tokens):
        token = choose(output.logits[:, -1], temperature, top_k, top_p, generator).to(prompt.dtype)
        token = torch.where(done, pad, token)
        columns.append(token[:, None])
        if on_token is not None:
            on_token(token)
        done = done | torch.isin(token, stops)
        if index == max_tokens - 1 or bool(done.all()):
            break
        assert output.state is not None
        # What goes on behind the end of a sequence is of no interest, and `pad` may be no token of the vocabulary.
        output = model.step(token.masked_fill(done, 0), output.state)
    return torch.cat(columns, dim=1)


def choose(
    scores: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of `scores` `[batch, vocab]`."""
    if temperature == 0:
        return scores.argmax(dim=-1)
    scores = scores.float() / temperature
    ordered, order = scores.sort(dim=-1, descending=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        dropped[:, top_k:] = True
    if top_p is not None:
        probabilities = ordered.masked_fill(dropped, float("-inf")).softmax(dim=-1)
        dropped |= probabilities.cumsum(dim=-1) - probabilities >= top_p
    probabilities = ordered.masked_fill(dropped, float("-inf")).softmax(dim=-1)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]
