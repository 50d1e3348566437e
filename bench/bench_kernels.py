"""Times the primitives on this CPU against step-by-step scans and the PyTorch paths of transformers.

    python -m bench.bench_kernels --json bench/results/kernels.json

Competitors run in one process, one thread, turn by turn, and are timed by the processor time of that
thread, so that what else the machine does meets all of them and counts for none; a figure is the median. Results are
compared before anything is timed. A ratio is the competitor's time over ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan

from bench.record import arguments, finish, publish
from zoo import kernels

LENGTH, WIDTH, HEAD_DIM, STATE_DIM = 2048, 512, 64, 64
SLOW_MS = 5e3
REPEATS = 9

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Contest:
    """Something to compute, our way and others', with the ratio required against each."""

    what: str
    ours: Run
    competitors: dict[str, tuple[Run, float | None]]
    same_result: bool = True
    forward_only: frozenset[str] = frozenset()


def linear_attention() -> Contest:
    q, k, v = (torch.randn(1, LENGTH, WIDTH // HEAD_DIM, HEAD_DIM, requires_grad=True) for _ in range(3))
    return Contest(
        f"linear attention, {WIDTH // HEAD_DIM} heads of {HEAD_DIM}",
        lambda: kernels.recurrence(q, k, v, scale=0.1)[0],
        {"step by step": (stepwise(lambda: kernels.recurrence(q, k, v, scale=0.1)[0]), 5.0)},
    )


def ssd() -> Contest:
    heads = 2 * WIDTH // HEAD_DIM
    x = torch.randn(1, LENGTH, heads, HEAD_DIM, requires_grad=True)
    B, C = (torch.randn(1, LENGTH, 1, STATE_DIM, requires_grad=True) for _ in range(2))
    dt, A = torch.rand(1, LENGTH, heads).mul_(0.1).requires_grad_(), -torch.arange(1.0, heads + 1)

    def ours() -> Tensor:
        return kernels.recurrence(C, B, x * dt[..., None], log_decay=dt * A)[0]

    return Contest(
        f"SSD, {heads} heads of {HEAD_DIM}, state {STATE_DIM}",
        ours,
        {
            "step by step": (stepwise(ours), 5.0),
            "transformers, chunk 256": (lambda: mamba2_chunk_scan(x, dt, A, B, C, 256), 1.0),
            "transformers, chunk 64": (lambda: mamba2_chunk_scan(x, dt, A, B, C, 64), 1.0),
        },
    )


def mamba2_mixer() -> Contest:
    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=2 * WIDTH // HEAD_DIM, head_dim=HEAD_DIM, state_size=STATE_DIM, n_groups=1
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    x = torch.randn(1, LENGTH, WIDTH, requires_grad=True)
    inner, state = mixer.intermediate_size, STATE_DIM

    def ours() -> Tensor:
        gate, conv, dt = mixer.in_proj(x).split([inner, inner + 2 * state, mixer.num_heads], -1)
        bias = mixer.conv1d.bias
        conv, _ = kernels.causal_convolution(conv, mixer.conv1d.weight[:, 0], bias, activation="silu")
        values, B, C = conv.split([inner, state, state], -1)
        values = values.unflatten(-1, (mixer.num_heads, HEAD_DIM))
        dt = nn.functional.softplus(dt + mixer.dt_bias)
        update, log_decay = values * dt[..., None], dt * -mixer.A_log.exp()
        out, _ = kernels.recurrence(C.unsqueeze(2), B.unsqueeze(2), update, log_decay=log_decay)
        out = (out + values * mixer.D[:, None]).flatten(2) * nn.functional.silu(gate)
        return mixer.out_proj(kernels.rms_norm(out, mixer.norm.weight, mixer.norm.variance_epsilon))

    return Contest("whole Mamba-2 mixer, same weights", ours, {"transformers": (lambda: mixer(x), 1.0)})


def selective_scan() -> Contest:
    channels, state_dim = 2 * WIDTH, 16
    x = torch.randn(1, LENGTH, channels, requires_grad=True)
    delta = torch.rand(1, LENGTH, channels).mul_(0.1).requires_grad_()
    A = (-torch.arange(1.0, state_dim + 1)).repeat(channels, 1)
    B, C = (torch.randn(1, LENGTH, state_dim, requires_grad=True) for _ in range(2))

    def theirs() -> Tensor:
        out = mamba_selective_scan(x.transpose(1, 2), delta.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def ours() -> Tensor:
        return kernels.selective_scan(x, delta, A, B, C)[0]

    return Contest(
        f"selective scan, {channels} channels, state {state_dim}",
        ours,
        {"step by step": (stepwise(ours), None), "transformers": (theirs, 5.0)},
        # Its backward fills a gradient of all states for every token, which takes minutes.
        forward_only=frozenset({"transformers"}),
    )


def window() -> Contest:
    q, k, v = (torch.randn(1, LENGTH, WIDTH // HEAD_DIM, HEAD_DIM, requires_grad=True) for _ in range(3))
    return Contest(
        "attention, window 256",
        lambda: kernels.attention(q, k, v, window=256),
        {"full causal attention": (lambda: kernels.attention(q, k, v), None)},
        same_result=False,
    )


def stepwise(run: Run) -> Run:
    def inner() -> Tensor:
        with kernels.use(recurrence="reference", selective_scan="reference"):
            return run()

    return inner


def timed(run: Run, backward: bool) -> float:
    with torch.set_grad_enabled(backward):
        start = time.thread_time()
        out = run()
        if backward:
            out.sum().backward()
        return (time.thread_time() - start) * 1e3


def compare(contest: Contest, baseline: Run, backward: bool) -> list[dict[str, Any]]:
    """Our time and each competitor's, and causal attention's at the same length and width, turn by turn."""
    chosen = {
        name: pair for name, pair in contest.competitors.items() if not (backward and name in contest.forward_only)
    }
    runs = {"ours": contest.ours, **{name: run for name, (run, _) in chosen.items()}}
    required = {name: need for name, (_, need) in chosen.items()}
    if "full causal attention" not in runs:
        runs["full causal attention"], required["full causal attention"] = baseline, None
    warm = {name: timed(run, backward) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(REPEATS):
        for name, run in runs.items():
            # What takes seconds needs no more than a turn or two.
            if turn < max(1, min(REPEATS, SLOW_MS / warm[name])):
                times[name].append(timed(run, backward))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("ours")
    mode = "forward and backward" if backward else "forward"
    return [
        {
            "what": contest.what,
            "mode": mode,
            "ms": ours,
            "competitor": name,
            "its ms": other,
            "ratio": other / ours,
            "at least": needed if (needed := required[name]) is not None else "",
            "met": needed is None or other / ours >= needed,
        }
        for name, other in medians.items()
    ]


def check(contest: Contest) -> None:
    """Refuse to time what does not compute the same thing."""
    if not contest.same_result:
        return
    with torch.no_grad():
        ours = contest.ours()
        for name, (run, _) in contest.competitors.items():
            difference = (run() - ours).square().mean().sqrt() / ours.square().mean().sqrt()
            if not difference < 1e-4:
                raise SystemExit(f"{contest.what}: {name} differs from ours by {difference:.1e} of the result")


if __name__ == "__main__":
    given = arguments("Primitives against step-by-step scans and the PyTorch paths of transformers.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, WIDTH // HEAD_DIM, HEAD_DIM, requires_grad=True) for _ in range(3))
    found: list[dict[str, Any]] = []
    for make in (linear_attention, ssd, mamba2_mixer, selective_scan, window):
        contest = make()
        check(contest)
        for backward in (False, True):
            found += compare(contest, lambda: kernels.attention(q, k, v), backward)
    title = f"kernels: length {LENGTH}, width {WIDTH}, batch 1, float32, one thread; medians of processor time"
    finish(publish(title, found, given.json))
