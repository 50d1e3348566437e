"""Runs every benchmark in a process of its own: `python -m bench`; results go to `bench/results`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run all; exit with 1 if a required figure is not met anywhere."""
    failed: list[str] = []
    for file in sorted(HERE.glob("bench_*.py")):
        result = HERE / "results" / f"{file.stem.removeprefix('bench_')}.json"
        command = [sys.executable, "-m", f"bench.{file.stem}", "--json", str(result)]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(file.stem)
    if failed:
        print(f"a required figure is not met in: {', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
