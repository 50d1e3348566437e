"""Times the primitives on this CPU against step-by-step scans and the PyTorch paths of transformers.

    python -m bench.bench_kernels --json bench/results/kernels.json

Competitors run in one process, one thread, turn by turn, and are timed by the processor time of that
thread, so that what else the machine does meets all of them and counts for none; a figure is the median. Results are
compared before anything is timed. A ratio is the competitor's time over ours.

Memory is as the C library gives it: large tensors get fresh pages each time, which the kernel clears one by one at the
cost of this thread. How time grows with the length is also timed with what is freed kept by the process
(`zoo.latency.kept_memory`), since at twice the length more than twice as many pages are fresh; and so is the selective
scan, whose rivals clear most pages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from bench.record import arguments, finish, publish
from zoo import kernels
from zoo.latency import kept_memory

LENGTH, WIDTH, HEAD_DIM, STATE_DIM = 2048, 512, 64, 64
LENGTHS, LINEAR = (4096, 8192), 2.2
"""Lengths whose times are compared, and the most that the longer may take of the shorter's time."""
SLOW_MS = 5e3
REPEATS = 9
ATTENTION = "full causal attention"

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Rival:
    """Another way to the same, and how many times longer it has to take, forward and with the backward pass."""

    run: Run
    forward: float | None = None
    backward: float | None = None
    differentiated: bool = True


@dataclass(frozen=True)
class Contest:
    """Something to compute, our way and others'; `share` is the most that ours may take of causal attention's time."""

    what: str
    ours: Run
    rivals: dict[str, Rival]
    share: float | None = None


def heads_of(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[1, length, heads, head_dim]`."""
    q, k, v = (torch.randn(1, length, WIDTH // HEAD_DIM, HEAD_DIM, requires_grad=True) for _ in range(3))
    return q, k, v


def forgetting(*shape: int) -> Tensor:
    """Logarithms of decays near 1."""
    return nn.functional.logsigmoid(torch.randn(shape) + 4).requires_grad_()


def linear_attention(length: int = LENGTH) -> Contest:
    q, k, v = heads_of(length)
    return Contest(
        f"linear attention, {WIDTH // HEAD_DIM} heads of {HEAD_DIM}",
        lambda: kernels.recurrence(q, k, v, scale=0.1)[0],
        {"step by step": Rival(stepwise(lambda: kernels.recurrence(q, k, v, scale=0.1)[0]), 5.0, 5.0)},
    )


def scalar_decay(length: int = LENGTH) -> Contest:
    q, k, v = heads_of(length)
    decay = forgetting(1, length, WIDTH // HEAD_DIM)
    return Contest(
        f"scalar decay, {WIDTH // HEAD_DIM} heads of {HEAD_DIM}",
        lambda: kernels.recurrence(q, k, v, log_decay=decay)[0],
        {},
        share=0.30,
    )


def channel_decay(length: int = LENGTH) -> Contest:
    q, k, v = heads_of(length)
    decay = forgetting(1, length, WIDTH // HEAD_DIM, HEAD_DIM)
    return Contest(
        f"decay per channel, {WIDTH // HEAD_DIM} heads of {HEAD_DIM}",
        lambda: kernels.recurrence(q, k, v, log_decay=decay)[0],
        {},
        share=0.35,
    )


def delta_rule(length: int = LENGTH) -> Contest:
    q, k, v = heads_of(length)
    beta = torch.rand(1, length, WIDTH // HEAD_DIM, requires_grad=True)
    return Contest(
        f"delta rule, {WIDTH // HEAD_DIM} heads of {HEAD_DIM}",
        lambda: kernels.delta_rule(q, nn.functional.normalize(k, dim=-1), v, beta)[0],
        {},
        share=0.55,
    )


def gated_delta_rule(length: int = LENGTH) -> Contest:
    q, k, v = heads_of(length)
    beta, gate = torch.rand(1, length, WIDTH // HEAD_DIM, requires_grad=True), forgetting(1, length, WIDTH // HEAD_DIM)
    scale = HEAD_DIM**-0.5

    def keys() -> Tensor:
        return nn.functional.normalize(k, dim=-1)

    return Contest(
        f"gated delta rule, {WIDTH // HEAD_DIM} heads of {HEAD_DIM}, length {length}",
        lambda: kernels.delta_rule(q, keys(), v, beta, log_decay=gate, scale=scale)[0],
        {"transformers": Rival(lambda: torch_chunk_gated_delta_rule(q, keys(), v, gate, beta)[0], 1.2, 1.8)},
    )


def ssd(length: int = LENGTH) -> Contest:
    heads = 2 * WIDTH // HEAD_DIM
    x = torch.randn(1, length, heads, HEAD_DIM, requires_grad=True)
    B, C = (torch.randn(1, length, 1, STATE_DIM, requires_grad=True) for _ in range(2))
    dt, A = torch.rand(1, length, heads).mul_(0.1).requires_grad_(), -torch.arange(1.0, heads + 1)

    def ours() -> Tensor:
        return kernels.recurrence(C, B, x * dt[..., None], log_decay=dt * A)[0]

    return Contest(
        f"SSD, {heads} heads of {HEAD_DIM}, state {STATE_DIM}",
        ours,
        {
            "step by step": Rival(stepwise(ours), 5.0, 5.0),
            "transformers, chunk 256": Rival(lambda: mamba2_chunk_scan(x, dt, A, B, C, 256), 3.5, 3.0),
            "transformers, chunk 64": Rival(lambda: mamba2_chunk_scan(x, dt, A, B, C, 64), 1.0, 1.0),
        },
        share=0.55,
    )


def mamba2_mixer(length: int = LENGTH) -> Contest:
    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=2 * WIDTH // HEAD_DIM, head_dim=HEAD_DIM, state_size=STATE_DIM, n_groups=1
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    x = torch.randn(1, length, WIDTH, requires_grad=True)
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

    return Contest("whole Mamba-2 mixer, same weights", ours, {"transformers": Rival(lambda: mixer(x), 1.0, 1.0)})


def selective_scan(length: int = LENGTH) -> Contest:
    channels, state_dim = 2 * WIDTH, 16
    x = torch.randn(1, length, channels, requires_grad=True)
    delta = torch.rand(1, length, channels).mul_(0.1).requires_grad_()
    A = (-torch.arange(1.0, state_dim + 1)).repeat(channels, 1)
    B, C = (torch.randn(1, length, state_dim, requires_grad=True) for _ in range(2))

    def theirs() -> Tensor:
        out = mamba_selective_scan(x.transpose(1, 2), delta.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def ours() -> Tensor:
        return kernels.selective_scan(x, delta, A, B, C)[0]

    return Contest(
        f"selective scan, {channels} channels, state {state_dim}",
        ours,
        {
            "step by step": Rival(stepwise(ours)),
            # The sequential loop of the field. Its backward fills a gradient of all states for every token, which
            # takes minutes.
            "transformers": Rival(theirs, 6.0, differentiated=False),
        },
    )


def window(length: int = LENGTH) -> Contest:
    q, k, v = heads_of(length)
    return Contest(
        "attention, window 256",
        lambda: kernels.attention(q, k, v, window=256),
        {},
        share=0.5,
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
    chosen = {name: rival for name, rival in contest.rivals.items() if rival.differentiated or not backward}
    runs = {"ours": contest.ours, **{name: rival.run for name, rival in chosen.items()}, ATTENTION: baseline}
    required = {name: rival.backward if backward else rival.forward for name, rival in chosen.items()}
    required[ATTENTION] = 1 / contest.share if contest.share is not None and not backward else None
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


def linearity(make: Callable[[int], Contest]) -> dict[str, Any]:
    """How much longer forward and backward take at twice the length, turn by turn, by the least times."""
    short, long = LENGTHS
    runs = {length: make(length).ours for length in LENGTHS}
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(REPEATS):
        for length, run in runs.items():
            times[length].append(timed(run, True))
    ratio = min(times[long]) / min(times[short])
    return {
        "what": make(short).what,
        "mode": "forward and backward",
        "ms": min(times[long]),
        "competitor": f"itself, length {short:,} for {long:,}",
        "its ms": min(times[short]),
        "ratio": 1 / ratio,
        "at least": 1 / LINEAR,
        "met": ratio <= LINEAR,
    }


def check(contest: Contest) -> None:
    """Refuse to time what does not compute the same thing."""
    with torch.no_grad():
        ours = contest.ours()
        for name, rival in contest.rivals.items():
            difference = (rival.run() - ours).square().mean().sqrt() / ours.square().mean().sqrt()
            if not difference < 1e-4:
                raise SystemExit(f"{contest.what}: {name} differs from ours by {difference:.1e} of the result")


def main() -> None:
    """Run all."""
    options = arguments("Primitives against step-by-step scans and the PyTorch paths of transformers.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [*_contests(CONTESTS), *_linearities()]
    with kept_memory():
        rows += [_kept(row) for row in (*_contests([selective_scan]), *_linearities())]
    title = f"kernels: length {LENGTH}, width {WIDTH}, batch 1, float32, one thread; medians of processor time"
    finish(publish(title, rows, options.json))


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """A row that is told beside the figure that is asked for."""
    return {**row, "what": f"{row['what']}, memory kept", "at least": "", "met": True}


def _linearities() -> Iterator[dict[str, Any]]:
    return (linearity(make) for make in (channel_decay, delta_rule, ssd, selective_scan))


CONTESTS: Sequence[Callable[[], Contest]] = (
    *(linear_attention, scalar_decay, channel_decay, ssd, mamba2_mixer, delta_rule, gated_delta_rule),
    *(partial(gated_delta_rule, 2 * LENGTH), selective_scan, window),
)


def _contests(makes: Sequence[Callable[[], Contest]]) -> Iterator[dict[str, Any]]:
    q, k, v = heads_of()
    for make in makes:
        contest = make()
        check(contest)
        for backward in (False, True):
            yield from compare(contest, lambda: kernels.attention(q, k, v), backward)


if __name__ == "__main__":
    main()
