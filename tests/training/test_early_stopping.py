"""PlateauEarlyStopping: stops when it should, not before, and goes on after a resume as if nothing had been."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.training import PlateauEarlyStopping


def first_stop(stopping: PlateauEarlyStopping, metrics: list[float]) -> int | None:
    return next((step for step, metric in enumerate(metrics) if stopping.check(metric, step)), None)


@pytest.mark.parametrize(
    ("settings", "metrics", "expected"),
    [
        ({"patience": 3, "min_evals": 2}, [2.0, 1.9, 1.8, 1.795, 1.795, 1.795], 5),
        ({"patience": 1, "min_evals": 5}, [1.0] * 9, 4),
        ({"patience": 3, "min_evals": 1}, [2.0, 1.995, 1.995, 1.5, 1.5, 1.5], None),
        ({"patience": 2, "min_evals": 1, "mode": "max"}, [0.5, 0.6, 0.59, 0.605], 3),
        ({"patience": 3, "min_evals": 5}, [3.0, 2.5, 2.2, 2.0, 1.9, 1.895, 1.894, 1.893], 7),
        ({"patience": 2, "min_evals": 1}, [1.0, math.nan, math.nan], 2),
        ({"patience": 2, "min_evals": 1}, [math.nan, math.nan], 1),
        ({"patience": 1, "min_evals": 1, "min_delta": 0.0}, [1.0, 0.999, 0.999], 2),
        ({"patience": 1, "min_evals": 1, "enabled": False}, [1.0] * 50, None),
        ({}, [2 - 0.02 * step for step in range(100)], None),
    ],
)
def test_when_it_stops(settings: dict[str, Any], metrics: list[float], expected: int | None) -> None:
    stopping = PlateauEarlyStopping(**{"min_delta": 0.01, "rank": 0, **settings})
    assert first_stop(stopping, metrics) == expected
    assert (stopping.stopped_early, stopping.stopped_step) == (expected is not None, expected)


def test_best_wait_and_counts() -> None:
    stopping = PlateauEarlyStopping(patience=5, min_delta=0.01)
    for step, metric in enumerate([2.0, 1.5, 1.495, math.nan]):
        stopping.check(torch.tensor(metric), step)
    assert (stopping.best, stopping.best_step, stopping.wait, stopping.eval_count) == (1.5, 1, 2, 4)


@pytest.mark.parametrize("at", [0, 2, 4, 5])
def test_resumed_it_stops_at_the_same_step(at: int) -> None:
    metrics = [2.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    whole = PlateauEarlyStopping(patience=3, min_evals=2)
    for step, metric in enumerate(metrics[:at]):
        whole.check(metric, step)
    resumed = PlateauEarlyStopping(patience=3, min_evals=2)
    resumed.load_state_dict(whole.state_dict())
    for step in range(at, len(metrics)):
        assert whole.check(metrics[step], step) == resumed.check(metrics[step], step) == (step == 6)
    assert whole.state_dict() == resumed.state_dict()


def test_report(tmp_path: Path) -> None:
    stopping = PlateauEarlyStopping(patience=1, min_delta=0.05, min_evals=2)
    for step, metric in enumerate([2.0, 1.5, 1.5]):
        stopping.check(metric, step)
    stopping.save_json(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "early_stopping.json").read_text())
    assert (report["best_metric"], report["best_step"], report["total_evals"]) == (1.5, 1, 3)
    assert (report["stopped_early"], report["stopped_step"]) == (True, 2)
    settings = {"patience": 1, "min_delta": 0.05, "mode": "min", "min_evals": 2, "enabled": True}
    assert report["config"] == settings
    PlateauEarlyStopping(rank=1).save_json(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    PlateauEarlyStopping().save_json(str(tmp_path))
    assert json.loads((tmp_path / "early_stopping.json").read_text())["best_metric"] is None


def test_rank_zero_alone_says_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cheapertraining.training.early_stopping"):
        for rank in (0, 1):
            first_stop(PlateauEarlyStopping(patience=1, min_evals=1, rank=rank), [1.0, 1.0])
    assert [record.getMessage() for record in caplog.records] == ["step 1: no better than 1 (step 0): stop"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lowest"}, "mode: expected 'min' or 'max', found 'lowest'"),
        ({"patience": 0}, "patience: expected at least 1"),
        ({"min_delta": -0.1}, "min_delta: expected at least 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlateauEarlyStopping(**settings)
