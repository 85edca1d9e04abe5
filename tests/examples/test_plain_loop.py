"""The example as a user runs it: the two controls, whole processes, short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def final_weights(*options: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "examples/plain_loop.py", "--steps", "60", "--update-interval", "6", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *course, last = done.stdout.splitlines()
    assert len(course) == 10
    weights: dict[str, float] = json.loads(last.removeprefix("final weights: "))
    assert sum(weights.values()) == pytest.approx(1.0)
    return weights


@pytest.mark.slow
def test_rigged_control_weight_moves_to_the_source_that_helps() -> None:
    weights = final_weights("--rigged")
    assert weights["a"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
def test_null_control_weights_stay_near_uniform(seed: str) -> None:
    weights = final_weights("--null", "--seed", seed)
    assert all(abs(weight - 1 / 3) < 0.1 / 3 for weight in weights.values())
