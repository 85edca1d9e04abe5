"""The notebook-style example, run as a user runs it, on the tiny sample."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from cheapertraining.observe.run_folder import read_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "composer_notebook.py"


@pytest.mark.slow
def test_it_trains_decides_and_leaves_a_report(
    tiny_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notebook"
    data = str(tiny_sample / "data.yaml")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--data", data, "--batches", "20", "--folder", str(folder)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "decisions: [(10, " in capsys.readouterr().out
    run = read_run(folder)
    assert run.metrics["loss/train/total"].values[-1] < run.metrics["loss/train/total"].values[0]
    assert (folder / "report.html").is_file()
