"""Kill a run with SIGKILL again and again, resume it each time, and hold it against the same run left in peace.

    python tests/end_to_end/kill_many.py SAMPLE --kills 10 --processes 1

SAMPLE is a folder with ``data.yaml`` and shards with rows of 32 tokens, such as the fixture ``tiny_sample`` makes.
Prints a line for each kill, then what differs, if anything. Exit code 0: nothing does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.end_to_end.real_runs import (
    ROOT,
    comparable_metrics,
    decisions,
    final_state,
    finish,
    launch,
    model_hash,
    segments_of,
    write_yaml,
)
from tests.processes import Started

BATCHES = 120
TRAIN = ROOT / "train.py"
MOMENTS = ("starting", "batch", "saving")


@dataclass
class Kill:
    """When to kill, and what was found there.

    Attributes:
        moment: ``starting``: while shards are being fetched and opened or the trainer is being built; ``batch``:
            anywhere in a step or between two; ``saving``: while a checkpoint is being written.
        batch: not before this many batches are trained (nothing for ``starting``).
        delay: seconds to wait further.
        whole: the launcher and all its processes, as when a machine is lost; or only one rank, as when it runs out of
            memory.
        found: what there was after the kill, for the table.
    """

    moment: str
    batch: int
    delay: float
    whole: bool = True
    found: str = ""

    def wait(self, process: subprocess.Popen[str] | Started, run: Path, cache: Path) -> None:
        """Return at the moment; fail where the run ends before."""
        began = time.time()
        while not self._come(run, cache, began):
            assert process.poll() is None, f"ended before {self}: {process.communicate()[0]}"
            assert time.time() < began + 600, f"{self} does not come"
            time.sleep(0.0005)
        time.sleep(self.delay)

    def _come(self, run: Path, cache: Path, began: float) -> bool:
        if self.moment == "starting":  # its own segments, not those of the one killed before
            with contextlib.suppress(FileNotFoundError):
                return any(file.stat().st_mtime >= began for file in segments_of(cache))
            return False
        if last_step(run) < self.batch:
            return False
        return self.moment == "batch" or any((run / "checkpoints").glob(".unfinished-ep*"))


def last_step(run: Path) -> int:
    """Number of the last batch that is logged in full; -1 before there is a log."""
    path = run / "metrics.jsonl"
    for line in reversed(path.read_bytes().splitlines() if path.exists() else []):
        with contextlib.suppress(ValueError, TypeError):  # being written
            return int(json.loads(line)["step"])
    return -1


def random_kills(count: int, seed: int, only_whole: bool = False) -> list[Kill]:
    """Kills in each of the moments by turns, at random batches that spread over the run, with random delays."""
    generator = random.Random(seed)
    kills = []
    for number in range(count):
        moment = MOMENTS[number % 3]
        low, high = 4 + 108 * number // count, 4 + 108 * (number + 1) // count
        delay = {"starting": 1.5, "batch": 0.03, "saving": 0.004}[moment] * generator.random()
        kills.append(Kill(moment, generator.randrange(low, high), delay, only_whole or generator.random() < 0.7))
    return kills


def write_run(sample: Path, folder: Path) -> Path:
    """A run whose shards are remote, with weights that training decides on."""
    data = folder / "remote.yaml"
    text = (sample / "data.yaml").read_text(encoding="utf-8")
    data.write_text(
        text.replace(f"local: {sample}", f"local: {folder}/cache\n  remote: {sample}\n  tokenizer: {sample}/tokenizer"),
        encoding="utf-8",
    )
    # No allowance for chance, so that the mixture moves in this short time.
    mixing = {"strategy": "influence", "interval": "5ba", "warmup": "5ba", "influence": {"ema": 0.7, "threshold": 0.0}}
    return write_yaml(
        folder / "kill.yaml",
        data,
        max_duration=f"{BATCHES}ba",
        save_interval="4ba",
        train_loader={"global_batch_size": 12, "lag": 8, "num_workers": 1},
        eval_loader={"batch_size": 16, "interval": "30ba", "subset_num_batches": 1},
        algorithms={"gradient_clipping": {"threshold": 1.0}, "online_mixing": mixing},
    )


def arguments_of(run_yaml: Path, name: str) -> tuple[str, ...]:
    """For ``train.py`` to start, or to go on with, the run of this name; its downloads go to ``cache-<name>``."""
    return str(run_yaml), f"run_name={name}", f"data.local={run_yaml.parent}/cache-{name}", "autoresume=true"


def disturb(begin: Callable[[str], subprocess.Popen[str] | Started], run_yaml: Path, kills: Sequence[Kill]) -> None:
    """Train the run ``disturbed`` to its end through all the kills; ``begin`` starts the run of a name, or goes on."""
    run, cache = run_yaml.parent / "runs" / "disturbed", run_yaml.parent / "cache-disturbed"
    for kill in kills:
        process = begin("disturbed")
        kill.wait(process, run, cache)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        kill.whole = kill.whole or not children  # the ranks are not there yet, or have ended
        if kill.whole:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(int(children[-1]), signal.SIGKILL)
        began = time.monotonic()
        process.communicate(timeout=120)
        took = time.monotonic() - began
        assert process.returncode != 0
        kill.found = f"{last_step(run):5d}  {_left(run, cache)}, launcher ended after {took:.1f} s"
    finish(begin("disturbed"))


def _left(run: Path, cache: Path) -> str:
    latest = run / "checkpoints" / "latest-rank0.pt"
    checkpoint = os.readlink(latest) if latest.is_symlink() else "none"
    half = len(list((run / "checkpoints").glob(".unfinished-*")))
    return f"checkpoint {checkpoint}, {half} half-written, {len(segments_of(cache))} dataset in shared memory"


def differences(folder: Path) -> list[str]:
    """What is not the same in ``runs/disturbed`` and ``runs/undisturbed``, or should not be there."""
    disturbed, undisturbed = folder / "runs" / "disturbed", folder / "runs" / "undisturbed"
    ours, theirs = final_state(disturbed), final_state(undisturbed)
    logs = comparable_metrics(disturbed), comparable_metrics(undisturbed)
    found = [f"{name} differ" for name, same in {
        "model weights": model_hash(ours) == model_hash(theirs),
        "mixture states": ours["dataset_state"] == theirs["dataset_state"],
        "mixing decisions": decisions(ours) == decisions(theirs),
        "logged steps": list(logs[0]) == list(logs[1]),
    }.items() if not same]  # fmt: skip
    for step in sorted(logs[0].keys() & logs[1].keys()):
        one, other = logs[0][step], logs[1][step]
        if names := [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]:
            found.append(f"step {step}: {', '.join(sorted(names))}")
    if segments := segments_of(folder / "cache-disturbed"):
        found.append(f"shared memory stayed: {segments}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run_yaml = write_run(arguments.sample.resolve(), Path(name))

        def begin(run: str) -> subprocess.Popen[str]:
            return launch(arguments.processes, TRAIN, *arguments_of(run_yaml, run), folder=run_yaml.parent)

        finish(begin("undisturbed"))
        kills = random_kills(arguments.kills, arguments.seed)
        disturb(begin, run_yaml, kills)
        print("kill  moment    not before  whole  last step")
        for number, kill in enumerate(kills):
            print(f"{number:4d}  {kill.moment:8s}  {kill.batch:10d}  {kill.whole!s:5s}  {kill.found}")
        found = differences(Path(name))
        print("\n".join(found) or "the disturbed run equals the undisturbed one")
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
