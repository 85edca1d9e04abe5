"""metrics.jsonl: every step once, through resumption, crashes and a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from tiny_trainer import GLOBAL_BATCH, ROW, tiny_loader, tiny_trainer

from cheapertraining.observe import JsonlLogger


def _run(sample: Path, runs: Path, batches: int, *callbacks: Callback, **options: Any) -> list[dict[str, Any]]:
    logger = JsonlLogger(runs / "{run_name}")
    trainer = tiny_trainer(tiny_loader(sample), runs, batches, callbacks, [logger], **options)
    trainer.fit()
    trainer.close()
    assert logger.path == runs / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in logger.path.read_text().splitlines()]


class _LogOddThings(Callback):
    def fit_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"odd/nan": float("nan"), "odd/tensor": torch.tensor([1.5]), "odd/array": np.float32(2)})
        logger.log_hyperparameters({"lr": 0.01, "folder": Path("x")})


def test_one_line_a_step(tiny_sample: Path, tmp_path: Path) -> None:
    lines = _run(tiny_sample, tmp_path, 6, _LogOddThings())
    assert [line["step"] for line in lines] == list(range(7))
    assert all(line["loss/train/total"] > 0 for line in lines[1:])
    assert [line["time/token"] for line in lines[1:]] == [n * GLOBAL_BATCH * ROW for n in range(1, 7)]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    evaluated = [line["step"] for line in lines if "metrics/heldout/docs/TokenCrossEntropy" in line]
    assert evaluated == [4, 6]
    assert lines[0]["odd/nan"] is None
    assert (lines[0]["odd/tensor"], lines[0]["odd/array"]) == (1.5, 2.0)
    settings = json.loads((tmp_path / "tiny" / "run.json").read_text())
    assert (settings["lr"], settings["folder"]) == (0.01, "x")


def test_resume_leaves_each_step_once(tiny_sample: Path, tmp_path: Path) -> None:
    straight = _run(tiny_sample, tmp_path / "straight", 8)
    _run(tiny_sample, tmp_path, 6)
    path = tmp_path / "tiny" / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 7, "loss/train/to')  # what kill -9 may leave
    checkpoint = tmp_path / "tiny" / "checkpoints" / "ep0-ba4-rank0.pt"
    resumed = _run(tiny_sample, tmp_path, 8, load_path=str(checkpoint), save_overwrite=True)
    assert [line["step"] for line in resumed] == list(range(9))
    for name in ("loss/train/total", "metrics/heldout/docs/TokenCrossEntropy", "time/token"):
        assert [line.get(name) for line in resumed] == [line.get(name) for line in straight]


def test_new_run_replaces_and_refused_run_keeps(tiny_sample: Path, tmp_path: Path) -> None:
    _run(tiny_sample, tmp_path, 4)
    path = tmp_path / "tiny" / "metrics.jsonl"
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        _run(tiny_sample, tmp_path, 3)
    assert path.read_bytes() == before
    assert [line["step"] for line in _run(tiny_sample, tmp_path, 3, save_overwrite=True)] == [0, 1, 2, 3]


class _FillDisk(Callback):
    """Let no file of this process grow, from the third batch to the fifth."""

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value + 1
        if batch in (3, 5):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10 if batch == 3 else hard, hard))


def test_full_disk_loses_lines_but_not_the_run(tiny_sample: Path, tmp_path: Path) -> None:
    lines = _run(tiny_sample, tmp_path, 6, _FillDisk(), save_folder=None)
    assert [line["step"] for line in lines] == [0, 1, 2, 5, 6]


def test_an_evaluating_trainer_adds_a_line(tiny_sample: Path, tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "tiny")
    trainer = tiny_trainer(tiny_loader(tiny_sample), tmp_path, 4, (), [logger], save_folder=None)
    trainer.eval()
    trainer.close()
    (line,) = (json.loads(text) for text in logger.path.read_text().splitlines())
    assert isinstance(line, Mapping)
    assert line["step"] == 0
    assert line["metrics/probe/code/TokenCrossEntropy"] > 5
