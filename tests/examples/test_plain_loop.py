"""The example as a user runs it: the two controls, whole processes, short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import start

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plain_loop.py"


def final_weights(folder: Path, *options: str) -> dict[str, float]:
    process = start(EXAMPLE, "--steps", "60", "--update-interval", "6", *options, folder=folder)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    *course, last = output.splitlines()
    assert len(course) == 10
    weights: dict[str, float] = json.loads(last.removeprefix("final weights: "))
    assert sum(weights.values()) == pytest.approx(1.0)
    return weights


@pytest.mark.slow
def test_rigged_control_weight_moves_to_the_source_that_helps(tmp_path: Path) -> None:
    weights = final_weights(tmp_path, "--rigged")
    assert weights["a"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
def test_null_control_weights_stay_near_uniform(tmp_path: Path, seed: str) -> None:
    weights = final_weights(tmp_path, "--null", "--seed", seed)
    assert all(abs(weight - 1 / 3) < 0.1 / 3 for weight in weights.values())
