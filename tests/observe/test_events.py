"""A run that goes wrong: what is seen of it, where, and that the advice works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_real_run import wandb_names

from cheapertraining.config import load_run_config
from cheapertraining.observe.events import EVENTS, NONFINITE, SPIKES
from cheapertraining.training import train


def _run(tiny_run: Path, batches: int, lr: float) -> list[dict[str, Any]]:
    """Train or go on to ``batches`` with this rate; the log's lines."""
    keys = [f"max_duration={batches}ba", f"optimizer.lr={lr}", "autoresume=true", "save_interval=30ba"]
    keys += ["scheduler.decay=0ba", "save_num_checkpoints_to_keep=9", "eval_loader.first=false"]
    keys += ["eval_loader.interval=1000ba", "loggers.console.interval=10ba", "loggers.wandb.mode=offline"]
    train(load_run_config(tiny_run, [*keys, "loggers.jsonl={}"]))
    log = tiny_run.parent / "runs" / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def test_spikes_and_divergence_are_told_everywhere_and_the_advice_works(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run.parent / "runs" / "tiny"
    calm = _run(tiny_run, 30, 1e-2)
    assert calm[-1][SPIKES] == calm[-1][NONFINITE] == 0

    spiked = _run(tiny_run, 33, 3.0)
    (first,) = [line for line in spiked if line["step"] == 32]
    assert first["loss/train/total"] > 8
    assert first[SPIKES] == 1
    text = f"batch 32: loss spike: {first['loss/train/total']:.3f}, where the mean of late was"
    assert text in (said := capsys.readouterr().out)
    assert EVENTS[SPIKES].advice in said

    (folder / "checkpoints" / "latest-rank0.pt").unlink()
    (folder / "checkpoints" / "latest-rank0.pt").symlink_to("ep0-ba30-rank0.pt")
    spoilt = _run(tiny_run, 35, 1e38)
    bad = [line for line in spoilt[1:] if line["loss/train/total"] is None]
    assert bad
    assert [line["step"] for line in bad] == list(range(bad[0]["step"], 36))
    assert [line[NONFINITE] - bad[0][NONFINITE] for line in bad] == list(range(len(bad)))
    said = capsys.readouterr().out
    assert said.count("the loss is not finite") == 1
    assert "\033" not in said  # what is no terminal gets plain lines
    assert f"batch {bad[0]['step']}: the loss is not finite (nan). {EVENTS[NONFINITE].advice}" in said

    report = (folder / "report.html").read_text(encoding="utf-8")
    assert f"loss or gradient not finite. {EVENTS[NONFINITE].advice}" in report
    assert {SPIKES, NONFINITE} <= wandb_names(folder)

    (folder / "checkpoints" / "latest-rank0.pt").unlink()
    (folder / "checkpoints" / "latest-rank0.pt").symlink_to("ep0-ba30-rank0.pt")
    healed = _run(tiny_run, 40, 1e-3)
    after = [line for line in healed if line["step"] > 30]
    assert [line["loss/train/total"] < 7 for line in after] == [True] * 10
    assert after[-1]["event/nonfinite"] == 0
