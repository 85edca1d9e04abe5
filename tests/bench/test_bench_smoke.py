"""The benchmarks run, with tiny arguments, and print their figures. What the figures are is not tested here."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

TINY_MODEL = ["model.hidden_size=16", "model.intermediate_size=32", "model.num_layers=1"]


def bench(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ModuleType:
    """The module of a benchmark, with a command line to run."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return importlib.import_module(f"tools.bench.{name}")


NAMES = [
    "adaptation",
    "conversion",
    "distillation_worth",
    "influence_agreement",
    "influence_cost",
    "loader",
    "mixing_law",
    "mixing_overhead",
    "plan",
    "startup",
    "step",
    "verify",
]


@pytest.mark.parametrize("name", NAMES)
def test_help_gives_the_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench(name, monkeypatch, "--help").main()
    assert f"python tools/bench/{name}.py" in capsys.readouterr().out


def test_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--sources", "3", "--samples", "20000", "--batch-size", "16", "--batches", "25", "--rounds", "1"]
    bench("plan", monkeypatch, *tiny).main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["3", "16"], ["1", "16"], ["6", "16"], ["3", "8"], ["3", "32"]]


def test_loader(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = bench("loader", monkeypatch, "--seq-len", "32", "--batch-size", "4", "--sources", "2", "--rounds", "1")
    monkeypatch.setattr(module, "SAMPLES", 512)
    module.main()
    assert "mixture/stock" in capsys.readouterr().out


def test_step_does_the_same_work_with_and_without_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = bench("step", monkeypatch, "--hidden", "16", "--steps", "2", "--rounds", "1")
    monkeypatch.setattr(module, "TEXT_BYTES", 100_000)
    monkeypatch.setattr(module, "LAYERS", 1)
    module.main()  # ends with an error if the losses differ
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("bare loop", *module.PARTS))


def test_mixing_overhead_and_lag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    interval = ["algorithms.online_mixing.interval=3ba", "algorithms.online_mixing.warmup=3ba"]
    module = bench("mixing_overhead", monkeypatch, *TINY_MODEL, *interval, "--rounds", "1")
    monkeypatch.setattr(module, "TEXT_BYTES", 300_000)
    monkeypatch.setattr(module, "VOCAB", 512)
    module.main()  # ends with an error if a lag is not the configured one
    printed = capsys.readouterr().out
    assert "share as logged" in printed
    assert "lag of 8 batches, 1 workers: [8, 8, 8, 8, 8, 8]" in printed


def test_startup_marks_every_part(monkeypatch: pytest.MonkeyPatch, tiny_run: Path, tmp_path: Path) -> None:
    module = bench("startup", monkeypatch)
    assert module.seconds_of([sys.executable, "-c", "pass"])[0] > 0
    monkeypatch.setitem(os.environ, module.BEGAN, repr(time.time()))
    monkeypatch.setitem(os.environ, module.ANSWER, str(tmp_path / "marks.json"))
    module.child(str(tiny_run), ["max_duration=1ba", "eval_loader.first=true"])
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert list(marks.values()) == sorted(marks.values())
    assert {"data", "model", "trainer", "first evaluation", "first step"} < marks.keys()


@pytest.mark.slow
def test_adaptation_runs_once_and_prints_each_seed(
    monkeypatch: pytest.MonkeyPatch, tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [
        f"compose.data={tiny_sample}/data.yaml",
        "max_duration=4ba",
        "train_loader.global_batch_size=8",
        *TINY_MODEL,
    ]
    module = bench("adaptation", monkeypatch, *keys, "--out", str(tmp_path), "--seeds", "3")
    module.main()
    first = capsys.readouterr().out
    assert first.count("training, see") == 2
    assert "target (code)" in first
    assert "sources that a run did not use: none" in first
    module.main()
    again = capsys.readouterr().out
    assert "training, see" not in again
    assert again.splitlines()[-1] == first.splitlines()[-1]


@pytest.mark.slow
def test_control_makes_its_shards_and_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["max_duration=6ba", "algorithms.online_mixing.warmup=3ba", *TINY_MODEL]
    for control, text in (("--null", "within 10%"), ("--rigged", "at the end")):
        options = [control, "--out", str(tmp_path), "--seeds", "3", "--text-bytes", "300000"]
        bench("adaptation", monkeypatch, *tiny, *options).main()
        assert text in capsys.readouterr().out
