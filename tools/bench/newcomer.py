"""How long a newcomer waits, from the clone to the report: wall and CPU seconds of each step, in a folder of its own.

    python tools/bench/newcomer.py                     # everything, as the README says
    python tools/bench/newcomer.py max_duration=20ba   # a shorter run

Packages are fetched from the registry that pip is set up for, so `make install` depends on the network. The load of the
machine stands beside the figures: on one that does other work they say little.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place) / "clone"
        steps = {
            "git clone": (["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT),
            "make install": (["make", "install"], clone),
            "make sample": (["make", "sample"], clone),
            "make train": (["make", "train", f"ARGS=run_name=newcomer {shlex.join(sys.argv[1:])}".strip()], clone),
            "report again": ([".venv/bin/cheapertraining", "report", "runs/newcomer"], clone),
        }
        print(f"{os.cpu_count()} cores\n{'step':14}{'wall s':>8}{'CPU s':>8}{'load':>7}")
        for name, (command, folder) in steps.items():
            _timed(name, command, folder)


def _timed(name: str, command: list[str], folder: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name:14}{wall:8.1f}{spent:8.1f}{os.getloadavg()[0]:7.1f}", flush=True)


if __name__ == "__main__":
    main()
