"""What the tests that start real training processes share: run yamls, starting, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.processes import Started, start

__all__ = [
    "ROOT",
    "comparable_metrics",
    "decisions",
    "final_state",
    "finish",
    "launch",
    "model_hash",
    "read_metrics",
    "record",
    "recorded",
    "segments_of",
    "write_yaml",
]

ROOT = Path(__file__).parents[2]
RECORDER = Path(__file__).with_name("record_runs.py")
_TIMING = (
    "time",
    "time/data_wait",
    "mixture/overhead",
    "influence/overhead",
    "distillation/overhead",
    "memory/host_peak",
)
"""Logged numbers that are measured seconds or memory, so they differ between equal runs."""


def write_yaml(path: Path, compose_data: Path, **changes: Any) -> Path:
    """A run yaml in ``path``: one layer of 16, batches of 12 rows of 32 tokens, saved in ``runs`` beside it.

    Args:
        path: of the yaml.
        compose_data: data yaml to take in.
        changes: keys at the top of the yaml, over or beside those here.
    """
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2,
        "max_position_embeddings": 32,
    }  # fmt: skip
    run = {
        "compose": {"data": str(compose_data)},
        "seed": 3,
        "device": "cpu",
        "max_duration": "200ba",
        "save_folder": str(path.parent / "runs"),
        "save_interval": "1000ba",
        "model": small,
        "train_loader": {"global_batch_size": 12, "lag": 8},
        "eval_loader": {"batch_size": 16, "interval": "1000ba", "subset_num_batches": 1, "first": False},
        "optimizer": {"lr": 1.0e-2},
        "scheduler": {"name": "wsd", "warmup": "0.05dur", "decay": "0.2dur"},
        "loggers": {"jsonl": {}},
    }
    path.write_text(yaml.safe_dump(run | changes, sort_keys=False), encoding="utf-8")
    return path


def launch(processes: int, script: Path, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    """``composer -n <processes> script arguments``, in a session of its own so that all of it can be killed."""
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", str(processes)]
    # The other ranks' output; rank 0's comes through the pipe.
    command += ["--stdout", str(folder / "rank{rank}.out"), "--stderr", str(folder / "rank{rank}.err")]
    return subprocess.Popen(
        [*command, str(script), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str] | Started, timeout: float = 900) -> str:
    """Wait for a good end; returns what it printed."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {timeout} s; printed {process.communicate()[0]}") from None
    assert process.returncode == 0, f"{output}{errors or ''}"
    return output


def record(processes: int, runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Train the runs one after the other in that many processes; see ``record_runs.py`` for what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "runs.json"
    plan.write_text(json.dumps(list(runs)), encoding="utf-8")
    finish(start(RECORDER, str(plan), folder=folder, ranks=processes))


def recorded(folder: Path, label: str) -> list[dict[str, Any]]:
    """Batches of a recorded run in order, the ranks' parts put together: batch, source, sample, rows, weights."""
    ranks = [
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in sorted(folder.glob(f"{label}.rank*.jsonl"))
    ]
    assert ranks, f"no record '{label}' in {folder}"
    together = []
    for parts in zip(*ranks, strict=True):
        first = parts[0]
        assert all(part["batch"] == first["batch"] and part["weights"] == first["weights"] for part in parts)
        whole = {key: [item for part in parts for item in part[key]] for key in ("source", "sample", "rows")}
        together.append({"batch": first["batch"], "weights": first["weights"], **whole})
    return together


def read_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """``metrics.jsonl`` by step; each step must come once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    by_step = {line["step"]: line for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def comparable_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """All that a run logged but for measured times."""
    return {
        step: {name: value for name, value in line.items() if name not in _TIMING}
        for step, line in read_metrics(run).items()
    }


def final_state(run: Path) -> dict[str, Any]:
    """The ``state`` of a run's latest checkpoint."""
    content = torch.load(run / "checkpoints" / "latest-rank0.pt", map_location="cpu", weights_only=False)
    state: dict[str, Any] = content["state"]
    return state


def decisions(state: Mapping[str, Any]) -> Any:
    """Everything that the mixing algorithm has in a checkpoint."""
    return {name: value for name, value in state["algorithms"] if name == "OnlineMixing"}["OnlineMixing"]


def model_hash(state: Mapping[str, Any]) -> str:
    """SHA-256 over names and bytes of the model's parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state["model"].items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def segments_of(folder: Path) -> list[Path]:
    """Shared memory segments of datasets whose shards lie below ``folder``."""
    prefix, found = bytes(folder.resolve()), []
    for file in Path("/dev/shm").glob("*_locals"):
        with contextlib.suppress(FileNotFoundError):  # another process is just ending
            if prefix in file.read_bytes():
                found.append(file)
    return found
