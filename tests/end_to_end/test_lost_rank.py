"""A rank that dies or falls silent: the others end within the bound that was set, say why, and the run goes on."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.end_to_end.kill_many import TRAIN
from tests.end_to_end.real_runs import read_metrics, write_yaml
from tests.processes import Started, start

pytestmark = pytest.mark.slow
TIMEOUT = 15.0
LATENCY = 60.0
"""Seconds for everything else, on a machine that is busy."""


def _begin(path: Path, run: str) -> Started:
    """Two ranks that train for ever, once they have saved."""
    settings = (f"run_name={run}", "max_duration=100000ba", f"parallelism.dist_timeout={TIMEOUT}")
    started = start(TRAIN, str(path), *settings, folder=path.parent, ranks=2)
    link = path.parent / "runs" / run / "checkpoints" / "latest-rank0.pt"
    end = time.monotonic() + 300
    while not link.exists():
        assert started.processes[0].exitcode is None, started.output(name="err")
        assert time.monotonic() < end
        time.sleep(0.1)
    return started


@pytest.mark.parametrize(
    ("how", "words"),
    [(signal.SIGKILL, "another rank has gone"), (signal.SIGSTOP, "another rank has not answered for 15 seconds")],
)
def test_the_other_rank_ends_in_time_and_says_why(
    how: signal.Signals, words: str, tiny_sample: Path, tmp_path: Path
) -> None:
    path = write_yaml(
        tmp_path / "run.yaml", tiny_sample / "data.yaml", save_interval="5ba", loggers={"jsonl": {}}, algorithms={}
    )
    started = _begin(path, "lost")
    first, second = started.processes
    assert second.pid is not None
    os.kill(second.pid, how)
    began = time.monotonic()
    first.join(TIMEOUT + LATENCY)
    waited = time.monotonic() - began
    second.kill()  # Where it was only stopped.
    second.join()
    assert first.exitcode == 2, f"not over after {waited:.0f} s"
    error = started.output(name="err")
    assert "rank 0 of 2: " + words in error
    assert "autoresume=true" in error
    if how == signal.SIGKILL:
        _goes_on_alone(path)


def _goes_on_alone(path: Path) -> None:
    folder = path.parent / "runs" / "lost"
    saved = int((folder / "checkpoints" / "latest-rank0.pt").resolve().name.split("-ba")[1].split("-")[0])
    last = f"max_duration={saved + 3}ba"
    alone = start(TRAIN, str(path), "run_name=lost", "autoresume=true", last, folder=path.parent)
    assert alone.wait() == 0
    assert sorted(read_metrics(folder))[-1] == saved + 3


def test_a_port_in_use_is_named(tiny_sample: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", tiny_sample / "data.yaml", algorithms={})
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
        started = start(TRAIN, str(path), folder=tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **ranks)
        assert started.wait(60) == 2
    assert f"MASTER_PORT {port}: another process of this machine listens there" in started.output(name="err")
