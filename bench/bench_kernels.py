"""Times the primitives on this CPU against step-by-step scans and the PyTorch paths of transformers.

    python -m bench.bench_kernels --json bench/results/kernels.json

Competitors run in one process, one thread, turn by turn, and are timed by the processor time of that
thread, so that what else the machine does meets all of them and counts for none; a figure is the median. Results are
compared before anything is timed. A ratio is the competitor's time over ours.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan

from zoo import kernels

LENGTH, WIDTH, HEAD_DIM, STATE_DIM = 2048, 512, 64, 64
SLOW_MS = 5e3

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One competitor of one of our primitives: milliseconds of both, and the ratio that the project asks for."""

    what: str
    mode: str
    ours_ms: float
    competitor: str
    competitor_ms: float
    ratio: float
    required: float | None

    @property
    def met(self) -> bool:
        return self.required is None or self.ratio >= self.required


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


def compare(contest: Contest, baseline: Run, backward: bool, repeats: int) -> list[Comparison]:
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
    for turn in range(repeats):
        for name, run in runs.items():
            # What takes seconds needs no more than a turn or two.
            if turn < max(1, min(repeats, SLOW_MS / warm[name])):
                times[name].append(timed(run, backward))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("ours")
    mode = "forward and backward" if backward else "forward"
    return [
        Comparison(contest.what, mode, round(ours, 3), name, round(other, 3), round(other / ours, 3), required[name])
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


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--repeats", type=int, default=9, help="turns for each competitor (default 9)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, WIDTH // HEAD_DIM, HEAD_DIM, requires_grad=True) for _ in range(3))
    results: list[Comparison] = []
    for make in (linear_attention, ssd, mamba2_mixer, selective_scan, window):
        contest = make()
        check(contest)
        for backward in (False, True):
            results += compare(contest, lambda: kernels.attention(q, k, v), backward, arguments.repeats)

    table = Table(title=f"length {LENGTH}, width {WIDTH}, batch 1, float32, one thread; medians of processor time")
    for column in ("what", "mode", "ours", "competitor", "its time", "ratio", "required"):
        table.add_column(column, justify="left" if column in ("what", "mode", "competitor") else "right")
    for row in results:
        need = "" if row.required is None else f"{row.required:g} " + ("met" if row.met else "MISSED")
        times = f"{row.ours_ms:.1f} ms", row.competitor, f"{row.competitor_ms:.1f} ms"
        table.add_row(row.what, row.mode, *times, f"{row.ratio:.2f}", need)
    Console(width=150).print(table)
    if arguments.json is not None:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu": cpu(),
            "threads": torch.get_num_threads(),
            "clock": "processor time of the thread",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "length": LENGTH,
            "width": WIDTH,
            "repeats": arguments.repeats,
            "geometric_mean_ratio_to_transformers": round(
                math.exp(
                    statistics.fmean(math.log(r.ratio) for r in results if r.competitor.startswith("transformers"))
                ),
                3,
            ),
            "results": [{**asdict(row), "met": row.met} for row in results],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
