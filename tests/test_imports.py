"""The arrows of the package hold, and its light parts start without Composer, Streaming, Transformers or OmegaConf."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("composer", "streaming", "transformers", "tokenizers", "omegaconf", "wandb")
PRINT_LOADED_HEAVY = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "module",
    [
        "cheapertraining",
        "cheapertraining.data",
        "cheapertraining.influence",
        "cheapertraining.mixing",
        "cheapertraining.training",
    ],
)
def test_light_parts_load_no_heavy_package(module: str) -> None:
    done = _run(sys.executable, "-c", f"import {module}; {PRINT_LOADED_HEAVY}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_probe_for_heavy_packages_sees_one_that_is_loaded() -> None:
    done = _run(sys.executable, "-c", f"import omegaconf; {PRINT_LOADED_HEAVY}")
    assert done.stdout.split() == ["omegaconf"]


def test_arrows_run_one_way() -> None:
    """The contracts of pyproject.toml: data <- influence <- mixing <- ..., and who may import Composer."""
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = _run(sys.executable, "-c", lint, "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
