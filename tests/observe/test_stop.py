"""SIGTERM in the middle of a run, and the run that goes on from there."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.process
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_trainer

from tests.processes import start

SCRIPT = Path(__file__).with_name("tiny_trainer.py")
REPOSITORY = Path(__file__).parents[2]
Forked = multiprocessing.process.BaseProcess


def _run(folder: Path, arguments: list[str]) -> None:
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(SCRIPT), *arguments]
    tiny_trainer.main()


@contextlib.contextmanager
def _forked(folder: Path, *arguments: object) -> Iterator[Forked]:
    """The script in a process of its own, which need not import everything anew; its output in ``folder/output``."""
    (folder / "output").unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, [str(item) for item in arguments]))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _exit_code(process: Forked) -> int | None:
    process.join(60)
    return process.exitcode


@contextlib.contextmanager
def _launched(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """The script on two ranks under Composer's launcher; output of rank 0 in ``folder/output``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", "--master_port", str(port)]
    command += ["--stdout", str(folder / "rank{rank}.out"), "--stderr", str(folder / "rank{rank}.err")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [*command, str(SCRIPT), *(str(item) for item in arguments)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await(output: Path, pattern: str, seconds: float = 60) -> re.Match[str]:
    end = time.monotonic() + seconds
    text = ""
    while time.monotonic() < end:
        text = output.read_text() if output.exists() else ""
        if found := re.search(pattern, text):
            return found
        time.sleep(0.05)
    raise AssertionError(f"no '{pattern}' in:\n{text}")


def _steps(runs: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (runs / "tiny" / "metrics.jsonl").read_text().splitlines()]


def _losses(runs: Path) -> list[float]:
    lines = (runs / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/train/total"] for line in lines[1:]]


def test_sigterm_saves_and_the_same_command_goes_on(tiny_sample: Path, tmp_path: Path) -> None:
    output, straight = tmp_path / "output", tmp_path / "straight"
    with _forked(tmp_path, tiny_sample, tmp_path, 10_000) as process:
        _await(output, "in batch 6,")
        os.kill(process.pid or 0, signal.SIGTERM)
        assert _exit_code(process) == 143
    assert "SIGTERM: stopping after this batch" in output.read_text()
    stopped = int(_await(output, r"SIGTERM: stopped after batch (\d+), saved a checkpoint", 1)[1])
    assert _steps(tmp_path) == list(range(stopped + 1))
    assert (tmp_path / "tiny" / "checkpoints" / "latest-rank0.pt").exists()

    with _forked(tmp_path, tiny_sample, tmp_path, stopped + 3) as process:
        assert _exit_code(process) == 0
    assert f"from batch {stopped + 1} to {stopped + 3}ba" in output.read_text()
    assert _steps(tmp_path) == list(range(stopped + 4))

    straight.mkdir()
    with _forked(straight, tiny_sample, straight, stopped + 3) as process:
        assert _exit_code(process) == 0
    assert _losses(tmp_path) == _losses(straight)


def test_second_signal_ends_at_once(tiny_sample: Path, tmp_path: Path) -> None:
    with _forked(tmp_path, tiny_sample, tmp_path, 10_000, 300) as process:
        _await(tmp_path / "output", "in batch 3,")
        os.kill(process.pid or 0, signal.SIGTERM)
        _await(tmp_path / "output", "SIGTERM: stopping after this batch", 10)
        assert process.is_alive()
        os.kill(process.pid or 0, signal.SIGTERM)
        assert _exit_code(process) == -signal.SIGTERM


def test_a_signal_in_the_last_batch_changes_nothing(tiny_sample: Path, tmp_path: Path) -> None:
    with _forked(tmp_path, tiny_sample, tmp_path, 3, 2) as process:
        _await(tmp_path / "output", "in batch 3,")
        os.kill(process.pid or 0, signal.SIGTERM)
        assert _exit_code(process) == 0
    assert (tmp_path / "tiny" / "summary.json").exists()


STOPPED = r"(.*): stopped after batch (\d+), saved a checkpoint"


@pytest.mark.slow
def test_two_ranks_stop_together(tiny_sample: Path, tmp_path: Path) -> None:
    ranks = start(SCRIPT, str(tiny_sample), str(tmp_path), "10000", folder=tmp_path, ranks=2)
    try:
        _await(ranks.outputs / "1.out", r"in batch 4, process (\d+)", 180)
        os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
        assert ranks.wait(60) == 143
    finally:
        ranks.kill()
    message = _await(ranks.outputs / "0.err", STOPPED, 1)
    assert message[1] == "signal on another rank"
    assert _steps(tmp_path) == list(range(int(message[2]) + 1))


@pytest.mark.slow
def test_two_ranks_stop_with_their_launcher(tiny_sample: Path, tmp_path: Path) -> None:
    with _launched(tmp_path, tiny_sample, tmp_path, 10_000) as process:
        _await(tmp_path / "rank1.out", "in batch 4,", 180)
        process.terminate()
        process.wait(60)
        # Rank 0 shares the launcher's output, and outlives it.
        message = _await(tmp_path / "output", STOPPED)
        assert message[1] == "SIGTERM"
    assert _steps(tmp_path) == list(range(int(message[2]) + 1))
