"""Measured memory against arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from zoo.device import Device, resolve_device
from zoo.hardware.memory import kept_bytes, peak_bytes

CPU = resolve_device("cpu", 1)
KIB = 1024


def one(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def several() -> None:
    a = one(3)
    b = one(5)
    del a
    c = one(4)
    del b, c
    one(2)


def views() -> torch.Tensor:
    a = one(8)
    return a.view(2, -1)[1].view(4, -1).T


class Holder:
    """Replaces what it holds: the old is released only when the new is there, or before."""

    def __init__(self, first: bool) -> None:
        self.held: torch.Tensor | None = one(6)
        self.first = first

    def __call__(self) -> None:
        if self.first:
            self.held = None
        self.held = one(6)


@pytest.mark.parametrize(
    ("case", "kib"),
    [
        (lambda: None, 0),
        (lambda: one(3), 3),
        (several, 9),
        (views, 8),
        (lambda: torch.cat([one(2)] * 4), 2 + 8),
        (Holder(first=False), 6),
        (Holder(first=True), 0),
    ],
    ids=["nothing", "one", "several", "views", "copies", "replaced", "released first"],
)
def test_peaks_are_those_of_arithmetic(case: Callable[[], object], kib: int) -> None:
    assert peak_bytes(case, CPU) == kib * KIB


def test_a_product_takes_its_result() -> None:
    a, b = torch.ones(64, 96), torch.ones(96, 32)
    assert peak_bytes(lambda: a @ b, CPU) == 4 * 64 * 32
    assert peak_bytes(lambda: torch.relu(a @ b), CPU) == 2 * 4 * 64 * 32


def test_what_an_operator_needs_inside_counts() -> None:
    rows = torch.ones(8, 512, 512)
    # Its result is five numbers; the sorted copy and its indices are alive inside.
    assert peak_bytes(lambda: rows[0].reshape(-1).median(), CPU) >= 4 * 512 * 512


def test_a_backward_pass_holds_what_it_needs() -> None:
    batch, width = 256, 128
    linears = [nn.Linear(width, width, bias=False) for _ in range(4)]
    layers = nn.Sequential(*linears)
    x = torch.ones(batch, width)
    weights = [linear.weight for linear in linears]
    rows, square = 4 * batch * width, 4 * width * width

    def step() -> None:
        y = layers(x)
        torch.autograd.grad(y, weights, x.expand(batch, width))

    with torch.inference_mode():
        # An input and an output of a layer in the middle.
        assert peak_bytes(lambda: layers(x), CPU) == 2 * rows
    # Four outputs are kept (the first input was there); then each gradient of an output is joined by the one before it.
    assert peak_bytes(step, CPU) >= 4 * rows + 4 * square
    assert peak_bytes(step, CPU) <= 6 * rows + 4 * square


def test_gradients_that_a_step_replaces_were_there_before() -> None:
    weight = nn.Parameter(torch.ones(64, 64))

    def step() -> None:
        weight.grad = None
        weight.sum().backward()

    # The sum, and the one that its gradient begins with; the gradient of the weight took the place of the last.
    assert peak_bytes(step, CPU) < 64
    assert peak_bytes(lambda: (weight * weight).sum().item(), CPU) >= 4 * 64 * 64


def test_what_is_kept() -> None:
    (held, view), kept = kept_bytes(lambda: (several(), one(7)[:3]), CPU)
    assert (held, view.numel(), kept) == (None, 3, 7 * KIB)
    model, kept = kept_bytes(lambda: nn.Linear(16, 8), CPU)
    assert kept == 4 * sum(p.numel() for p in model.parameters())


def test_errors_pass_and_leave_the_profiler_usable() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    for measure in (peak_bytes, kept_bytes):
        with pytest.raises(RuntimeError, match="broken"):
            measure(broken, CPU)
    assert peak_bytes(lambda: one(1), CPU) == KIB


def test_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    holder = Holder(first=True)
    peak_bytes(holder, CPU)
    assert capfd.readouterr() == ("", "")


def test_a_gpu_is_asked_for_its_own_books(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Device = replace(CPU, name="cuda:0", kind="cuda")
    books = {"now": 100, "peak": 900}

    def case() -> None:
        books["peak"] = max(books["peak"], books["now"] + 40)

    def make() -> str:
        books["now"] += 7
        return "made"

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: books["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: books["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: books.update(peak=books["now"]))
    assert peak_bytes(case, gpu) == 40
    assert kept_bytes(make, gpu) == ("made", 7)
