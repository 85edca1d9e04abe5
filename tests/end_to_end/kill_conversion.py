"""Kill a conversion with SIGKILL at random moments, resume it each time, and hold it against one left in peace.

    python tests/end_to_end/kill_conversion.py [--kills 20]

The input is made from the interpreter's own library. A kill hits the main process with all its workers, the main
process alone (its workers must notice), or one worker. Prints a line for each kill; exit code 0: the shards are the
same bytes as those of the undisturbed conversion.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cheapertraining.data import train_bpe

ROOT = Path(__file__).parents[2]
TARGETS = ("all processes", "the main process", "a worker")


@dataclass
class Kill:
    """What was hit, and what was there then."""

    target: str
    found: str


def write_input(folder: Path, files: int = 4, megabytes: float = 4.0) -> Path:
    """JSON lines of the standard library's modules, repeated until there is enough; and a tokenizer."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in modules]
    train_bpe(texts[:40], 1000, folder / "tokenizer")
    (folder / "input").mkdir()
    for number in range(files):
        size, copy = 0, 0
        with (folder / "input" / f"{number}.jsonl").open("w", encoding="utf-8") as handle:
            while size < megabytes * 1e6 / files:
                for text in texts[number::files]:
                    handle.write(json.dumps({"text": f"# copy {copy}\n{text[:20_000]}"}) + "\n")
                    size += min(len(text), 20_000)
                copy += 1
    return folder / "input"


def command(folder: Path, out: str) -> list[str]:
    """Convert with two processes, in many small steps."""
    options = {"--tokenizer": str(folder / "tokenizer"), "--seq-len": "128", "--source": "s", "--workers": "2"}
    options |= {"--split-by-hash": "train:0.9,heldout:0.1", "--shard-size": "500kb", "--window-tokens": "100000"}
    flat = [word for pair in options.items() for word in pair]
    return [sys.executable, str(ROOT / "tools/convert_text.py"), str(folder / "input"), *flat,
            "--deduplicate", "--out", str(folder / out)]  # fmt: skip


def start(folder: Path, out: str, *more: str) -> subprocess.Popen[str]:
    """Start a conversion in a process group of its own."""
    return subprocess.Popen(
        [*command(folder, out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a conversion that must end well."""
    out, error = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"the conversion failed ({process.returncode}):\n{out}\n{error}")


def kill(process: subprocess.Popen[str], target: str) -> str:
    """Send SIGKILL; returns what was really hit: the workers may not be there yet."""
    children = _descendants(process.pid)
    if target == "a worker" and len(children) > 2:  # besides the workers: the fork server and the resource tracker
        os.kill(children[-1], signal.SIGKILL)
    elif target == "the main process":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        target = "all processes"
    process.communicate(timeout=120)
    return target


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def disturb(folder: Path, count: int, seed: int) -> tuple[list[Kill], list[Path]]:
    """Kill conversions ``count`` times; one that finishes is followed by another.

    A kill comes up to half a second after a random number of windows and shards were added. Returns the kills and the
    folders of the conversions, the last of which is left in peace after the last kill.
    """
    generator = random.Random(seed)
    kills: list[Kill] = []
    outs = ["disturbed-0"]
    while len(kills) < count:
        out = folder / outs[-1]
        wanted = done(out) + generator.randrange(12)
        process = start(folder, outs[-1], "--resume")
        while process.poll() is None and done(out) < wanted:
            time.sleep(0.005)
        delay = generator.uniform(0, 0.5 if done(out) else 6)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        if process.poll() is not None:
            finish(process)
            outs.append(f"disturbed-{len(outs)}")
            continue
        hit = kill(process, TARGETS[len(kills) % 3])
        kills.append(Kill(hit, found(out)))
    finish(start(folder, outs[-1], "--resume"))
    return kills, [folder / out for out in outs]


def done(out: Path) -> int:
    """Windows and shards that are there."""
    windows = [file for file in out.glob(".conversion/windows/*") if file.is_dir() and not file.name.startswith(".")]
    return len(windows) + len(list(out.glob("*/*.mds")))


def found(out: Path) -> str:
    """What is there of a conversion."""
    windows = out / ".conversion" / "windows"
    counts = {
        "windows": len([f for f in windows.glob("*") if f.is_dir() and not f.name.startswith(".")]),
        "half windows": len(list(windows.glob(".*"))),
        "shards": len(list(out.glob("*/*.mds"))),
        "indexes": len(list(out.glob("*/index.json"))),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def differences(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same bytes in both folders, or in one only."""
    names = [{p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} for root in (one, other)]
    common = sorted(names[0] & names[1])
    return sorted(names[0] ^ names[1]) + filecmp.cmpfiles(one, other, common, shallow=False)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=24.0, help="of input (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder, megabytes=given.megabytes)
        finish(start(folder, "undisturbed"))
        kills, outs = disturb(folder, given.kills, given.seed)
        print("kill  hit                what was there")
        for number, one in enumerate(kills):
            print(f"{number:4d}  {one.target:17s}  {one.found}")
        different = [f"{out.name}/{name}" for out in outs for name in differences(folder / "undisturbed", out)]
        print("\n".join(different) or f"{len(outs)} conversions, each the same bytes as the undisturbed one")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
