"""What is shown on a terminal and elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from zoo.train.progress import Progress, live


def _progress(step: int, *, evaluated: bool = False) -> Progress:
    return Progress(
        step=step,
        steps=100,
        loss=2.5,
        learning_rate=1e-3,
        gradient_norm=1.0,
        metric="bits_per_byte",
        valid=3.25 if evaluated else None,
        best=3.25,
        evaluated=evaluated,
        tokens_per_second=12345.6,
        unit="tokens",
        seconds_left=3725.0,
    )


def test_plain_lines_now_and_then() -> None:
    stream = io.StringIO()
    with live("x", Console(file=stream, width=40)) as show:
        for step in range(1, 100):
            show(_progress(step))
        show(_progress(100, evaluated=True))
    lines = stream.getvalue().splitlines()
    assert lines == ["step 100/100  loss 2.5000  bits_per_byte 3.2500  lr 1.00e-03  12,346 tokens/s  1:02:05 left"]


def test_a_terminal_shows_it_in_place() -> None:
    stream = io.StringIO()
    with live("little", Console(file=stream, force_terminal=True, width=200)) as show:
        show(_progress(50))
        show(_progress(100, evaluated=True))
    assert "little" in stream.getvalue()
    assert "bits_per_byte 3.2500" in stream.getvalue()
