"""Whether a model fits a data set, known before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zoo.errors import Problem, SpecError

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.train.data.base import Description

STEMS = {"tokens": "tokens", "image": "images"}


def check_fits(spec: Spec, data: Description) -> None:
    """Raise a `SpecError` with everything about `spec` that `data` cannot feed or does not ask for."""
    problems = [Problem(path, message) for path, message in _misfits(spec, data)]
    if problems:
        raise SpecError(problems)


def _misfits(spec: Spec, data: Description) -> Iterator[tuple[str, str]]:
    head = getattr(spec.head, "kind", "other")
    if head != data.head_kind:
        yield "head", f"data set {data.name!r} needs a {data.head_kind}; the spec's head is a {head}"
    inputs = getattr(spec.stem, "inputs", "tokens")
    if inputs != STEMS[data.input_kind]:
        yield "stem", f"data set {data.name!r} delivers {STEMS[data.input_kind]}; the stem takes {inputs}"
        return
    if data.input_kind == "image":
        channels, height, width = data.input_shape
        image = getattr(spec.stem, "image", (height, width))
        if image != (height, width):
            yield "stem.image", f"images of {data.name!r} are {height}x{width}; the stem takes {image[0]}x{image[1]}"
        if getattr(spec.stem, "channels", channels) != channels:
            yield "stem.channels", f"images of {data.name!r} have {channels} channels; set `channels: {channels}`"
    else:
        vocab = getattr(spec.stem, "vocab", None)
        if data.vocab is not None and vocab is not None and vocab < data.vocab:
            yield "stem.vocab", f"data set {data.name!r} has {data.vocab} different tokens; the spec's vocab is {vocab}"
        if data.input_shape[0] > spec.context:
            tokens = data.input_shape[0]
            yield "context", f"samples of {data.name!r} are {tokens} tokens long; the spec's context is {spec.context}"
    classes = getattr(spec.head, "classes", data.classes)
    if data.classes is not None and classes != data.classes:
        yield "head.classes", f"data set {data.name!r} has {data.classes} classes; the head tells {classes} apart"
