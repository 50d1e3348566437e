"""How long the quick commands take as whole processes, and whether they leave torch alone.

    python -m bench.bench_command_line --json bench/results/command_line.json

Rivals in the same run: an empty Python process, and `import torch`, which every command would pay for otherwise.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from bench.record import arguments, finish, publish

REPEATS = 9
IMPORTS_TORCH = "import sys; sys.argv = ['zoo', {arguments}]\ntry:\n    from zoo.cli import main; main()\n\
except SystemExit: pass\nsys.exit('torch' in sys.modules)"

COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "zoo --help": (["--help"], 0.3),
    "zoo validate (all shipped specs)": (["validate"], 1.0),
    "zoo list": (["list"], None),
    "zoo cost gpt3-175b": (["cost", "gpt3-175b"], None),
}


def timed(command: list[str]) -> list[float]:
    """Wall seconds of repeated runs of a process, after one to warm the disk's cache."""
    subprocess.run(command, check=False, capture_output=True)
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(command, check=False, capture_output=True)
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    """Time all commands; the figure is the median, `least` the fastest of the runs."""
    options = arguments(__doc__ or "")
    python = [sys.executable, "-c"]
    torch = statistics.median(timed([*python, "import torch"]))
    rows: list[dict[str, Any]] = []
    for name, (given, required) in COMMANDS.items():
        runs = timed([*python, "from zoo.cli import main; main()", *given])
        program = IMPORTS_TORCH.format(arguments=", ".join(map(repr, given)))
        untouched = subprocess.run([*python, program], check=False, capture_output=True).returncode == 0
        median = statistics.median(runs)
        met = untouched and (required is None or median <= required)
        rows.append(
            {
                "command": name,
                "seconds": median,
                "least": min(runs),
                "required": required or "",
                "without torch": untouched,
                "import torch / this": torch / median,
                "met": met,
            }
        )
    for name, program in {"python -c pass": "pass", "import torch": "import torch"}.items():
        runs = timed([*python, program])
        row = {"command": name, "seconds": statistics.median(runs), "least": min(runs), "required": ""}
        rows.append({**row, "without torch": name != "import torch", "import torch / this": 0.0, "met": True})
    finish(publish("Commands as whole processes, seconds", rows, options.json))


if __name__ == "__main__":
    main()
