"""The table at the end, and summary.json."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_trainer import GLOBAL_BATCH, ROW, ChangeWeights, tiny_loader, tiny_trainer

from cheapertraining.observe import MixtureSummary

CHANGED = {"code": 0.6, "docs": 0.3, "topics": 0.1}


def _run(sample: Path, runs: Path, batches: int, first: bool, **options: Any) -> tuple[dict[str, Any], str]:
    loader, stream = tiny_loader(sample), io.StringIO()
    callbacks = [ChangeWeights(loader, {3: CHANGED}), MixtureSummary(loader.mixture, runs / "{run_name}", stream)]
    trainer = tiny_trainer(loader, runs, batches, callbacks, **options)
    if first:
        trainer.eval()
    trainer.fit()
    trainer.close()
    return json.loads((runs / "tiny" / "summary.json").read_text()), stream.getvalue()


@pytest.mark.parametrize("batches", [6, 8])  # the last evaluation comes after FIT_END, and before it
def test_table_and_file(tiny_sample: Path, tmp_path: Path, batches: int) -> None:
    summary, text = _run(tiny_sample, tmp_path, batches, first=True)
    sources = summary["sources"]
    assert sum(source["tokens"] for source in sources.values()) == batches * GLOBAL_BATCH * ROW == summary["tokens"]
    assert sources["docs"]["weight_start"] == pytest.approx(1 / 3)
    assert {name: round(source["weight_end"], 6) for name, source in sources.items()} == CHANGED
    assert all(source["loss_after"] < source["loss_before"] for source in sources.values())
    evaluation = summary["evaluations"]["probe/code"]
    assert (evaluation["before_batch"], evaluation["after_batch"]) == (0, batches)
    lines = text.strip().splitlines()
    assert lines[0] == f"tiny: {batches} batches, {batches * GLOBAL_BATCH * ROW:,} tokens"
    assert [line.split()[0] for line in lines[1:]] == ["source", "code", "docs", "topics", "probe/code"]
    docs = sources["docs"]
    before, after = docs["loss_before"], docs["loss_after"]
    shown = f"docs 33.3% -> 30.0% {docs['tokens']:,} {docs['epochs']:.2f} {before:.3f} -> {after:.3f}"
    assert lines[3].split() == [*shown.split(), f"({after - before:+.3f})"]


def test_what_was_before_survives_resumption(tiny_sample: Path, tmp_path: Path) -> None:
    straight, _ = _run(tiny_sample, tmp_path / "straight", 8, first=True)
    checkpoint = tmp_path / "straight" / "tiny" / "checkpoints" / "ep0-ba6-rank0.pt"
    resumed, text = _run(tiny_sample, tmp_path, 8, first=False, load_path=str(checkpoint))
    assert resumed == straight
    assert text.count("held-out loss") == 1


def test_without_evaluation_and_mixture(tiny_sample: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    trainer = tiny_trainer(
        tiny_loader(tiny_sample), tmp_path, 2, [MixtureSummary(None, None, stream)], save_folder=None
    )
    trainer.state.evaluators = []
    trainer.fit()
    trainer.close()
    assert " ".join(stream.getvalue().split()) == (
        "tiny: 2 batches, 768 tokens source weight tokens epochs held-out loss"
    )
