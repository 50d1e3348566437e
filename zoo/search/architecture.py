"""What an architecture looks like, in a few words for each layer: what tables and pictures of a search show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zoo.component import Component, defaults
from zoo.memo import memoized

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

BRANCHES = ("mixer", "channel")


def architecture(spec: Spec) -> dict[str, Any]:
    """Width and context of a spec, and `[mixer, its fields, channel mixer, its fields, width, hidden]` for each layer.

    `hidden` is the inner width of the channel mixer, None where it has none.
    """
    layers = [list(_row(layer, width)) for layer, width in _layers(spec.body, spec.width)]
    return {"width": spec.width, "context": spec.context, "layers": layers}


def _layers(body: Component, width: int) -> Iterator[tuple[Component, int]]:
    """Every layer from the input to the output, with its width; containers of other kinds are looked through."""
    for field in ("layers", "stages"):
        for item in getattr(body, field, ()):
            inside = getattr(item, "width", None) or width
            if getattr(item, "layers", None):
                yield from _layers(item, inside)
            else:
                yield item, inside


@memoized()
def _row(layer: Component, width: int) -> tuple[Any, ...]:
    """What is said of a layer."""
    texts = (text for branch in BRANCHES for text in _named(getattr(layer, branch, None), layer, branch))
    return (*texts, width, _hidden(getattr(layer, "channel", None), width))


def _hidden(channel: Component | None, width: int) -> int | None:
    given: int | None = getattr(channel, "hidden", None)
    widened: Any = getattr(channel, "widened", None)
    return int(widened(width)) if given is None and widened is not None else given


def _named(part: Component | None, layer: Component, branch: str) -> tuple[str, str]:
    if part is None:
        # A layer without branches of its own is shown in the place of its mixer.
        bare = branch == "mixer" and not any(getattr(layer, name, None) for name in BRANCHES)
        return (layer.type, "") if bare else ("", "")
    fields = []
    usual = defaults(type(part))
    for name in type(part).model_fields:
        value = getattr(part, name)
        if (name not in usual or value != usual[name]) and not isinstance(value, tuple):
            fields.append(f"{name}={value.type if isinstance(value, Component) else value}")
    return part.type, " ".join(fields)
