"""Start-up: seconds from `composer train.py RUN.yaml` to the first step, by part; and what importing the package costs.

    python tools/bench/startup.py [--run yamls/mixed_pretrain.yaml] [--rounds 5] [--first-line] [key=value ...]

Every measurement is a fresh process, files are in the disk cache, and printed are medians. Importing
`cheapertraining.data` is compared with importing torch and numpy alone, in CPU time; wanted is less than 1.5 times.
Then comes the first line that a start prints, in wall time; wanted: below two seconds for `python train.py RUN.yaml`.
The run is the one that users start (make its data first: `make sample`), up to the end of its first step, in wall time;
the baseline is a process that imports torch, transformers and Composer, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = ("import torch, numpy", "import cheapertraining", "import cheapertraining.data")
BASELINE = "import torch, composer; from transformers import LlamaForCausalLM"
# Set by the process that measures for the one it starts: when it began, and where the answer goes.
BEGAN, ANSWER = "BENCH_STARTUP_BEGAN", "BENCH_STARTUP_ANSWER"


def seconds_of(command: list[str], **environment: str) -> tuple[float, float]:
    """Wall seconds and CPU-seconds of a process and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    finished = subprocess.run(
        command, env=os.environ | environment | {BEGAN: repr(start)}, cwd=ROOT, capture_output=True, text=True
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.time() - start
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare_imports(rounds: int) -> None:
    """Print CPU-seconds of the imports, and their ratio to the first."""
    times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for number in range(rounds + 1):
        for statement, values in times.items():
            cpu = seconds_of([sys.executable, "-c", statement])[1]
            if number:  # the first round fills the disk cache
                values.append(cpu)
    print("CPU-seconds of a fresh process, ratio")
    for statement, values in times.items():
        ratio = statistics.median(mine / base for mine, base in zip(values, times[IMPORTS[0]], strict=True))
        print(f"  {statement:32s} {statistics.median(values):7.2f} {ratio:7.2f}")


def first_lines(run: str, overrides: list[str], rounds: int) -> None:
    """Print the seconds until the first line, and until all that is said before training, of each way to start."""
    composer = str(Path(sys.executable).with_name("composer"))
    print("seconds to the first line, and to the last that says what will run")
    for start in ([sys.executable, "train.py"], [composer, "-n", "1", "train.py"]):
        times: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                command = [*start, run, f"save_folder={folder}/runs", *overrides]
                began = time.perf_counter()
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
                assert process.stdout is not None
                first = process.stdout.readline()
                seconds = time.perf_counter() - began
                for line in process.stdout:
                    if b"  sources " in line:
                        break
                times.append((seconds, time.perf_counter() - began))
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()
        told, all_told = (statistics.median(column) for column in zip(*times[1:], strict=True))
        shown = " ".join([Path(start[0]).name, *start[1:]])
        print(f"  {shown:32s} {told:7.2f} {all_told:7.2f}   {first.decode().strip()}")


def compare_starts(run: str, overrides: list[str], rounds: int) -> None:
    """Print the parts of the way to the first step."""
    parts: dict[str, list[float]] = {}
    totals, baseline = [], []
    for number in range(rounds + 1):
        imports = seconds_of([sys.executable, "-c", BASELINE])[0]
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "marks.json"
            child = [str(Path(sys.executable).with_name("composer")), "-n", "1", __file__, "--child", "--run", run]
            run_overrides = ["max_duration=1ba", f"save_folder={folder}/runs", *overrides]
            seconds_of([*child, *run_overrides], **{ANSWER: str(answer)})
            marks: dict[str, float] = json.loads(answer.read_text())
        if number:
            baseline.append(imports)
            times = [marks["began"], *list(marks.values())[1:]]
            totals.append(times[-1] - times[0])
            for name, start, end in zip(list(marks)[1:], times, times[1:], strict=False):
                parts.setdefault(name, []).append(end - start)
    print(f"seconds to the end of the first step of `composer train.py {' '.join([run, *overrides])}`")
    for name, values in parts.items():
        print(f"  {name:32s} {statistics.median(values):7.2f}")
    ratio = statistics.median(total / base for total, base in zip(totals, baseline, strict=True))
    print(f"  {'total':32s} {statistics.median(totals):7.2f}")
    print(f"  {'importing the libraries alone':32s} {statistics.median(baseline):7.2f}   total to this {ratio:.2f}")


class Marks:
    """When each part had ended, in seconds since 1970."""

    def __init__(self) -> None:
        self.times = {"began": float(os.environ[BEGAN]), "Composer's launcher": time.time()}

    def mark(self, part: str) -> None:
        """``part`` ends now."""
        self.times[part] = time.time()

    def after(self, module: Any, function: str, part: str) -> Any:
        """Let ``part`` end whenever ``module.function`` returns."""
        original = getattr(module, function)

        def marked(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            self.mark(part)
            return result

        return patch.object(module, function, marked)


def child(run: str, overrides: list[str]) -> None:
    """Do what train.py does, and note when each part had ended."""
    marks = Marks()
    from cheapertraining.config import check_prepared, load_run_config

    config = load_run_config(run, overrides)
    check_prepared(config.data)
    marks.mark("config")
    import torch

    del torch
    marks.mark("import torch")
    import composer

    marks.mark("import composer")
    from cheapertraining.training import run as training

    marks.mark("import the rest")

    class FirstStep(composer.Callback):
        def fit_start(self, state: composer.State, logger: composer.Logger) -> None:
            marks.mark("first evaluation")

        def batch_end(self, state: composer.State, logger: composer.Logger) -> None:
            marks.mark("first step")
            state.evaluators = []  # what comes at the end is not start-up

    build_callbacks = training.build_callbacks
    with (
        marks.after(training, "build_loader", "data"),
        marks.after(training, "build_spread_model", "model"),
        marks.after(training, "Trainer", "trainer"),
        patch.object(training, "build_callbacks", lambda *arguments: [*build_callbacks(*arguments), FirstStep()]),
    ):
        training.train(config)
    Path(os.environ[ANSWER]).write_text(json.dumps(marks.times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="yamls/mixed_pretrain.yaml", help="run yaml (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-line", action="store_true", help="nothing but the first lines")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.run, given.overrides)
    else:
        if not given.first_line:
            compare_imports(given.rounds)
        first_lines(given.run, given.overrides, given.rounds)
        if not given.first_line:
            compare_starts(given.run, given.overrides, given.rounds)


if __name__ == "__main__":
    main()
