"""The model in Composer's own Trainer: loss, metric, speed monitor, microbatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.core import DataSpec, Evaluator
from composer.loggers import InMemoryLogger
from torch.utils.data import DataLoader

from cheapertraining.config import ModelConfig
from cheapertraining.models import CausalLM, build_causal_lm


def _batches(pack: Any, count: int, seed: int) -> DataLoader[Any]:
    """Rows in which every token is its predecessor plus one: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        starts = torch.randint(0, 30, (8, 2), generator=generator).tolist()
        batches.append(pack([[list(range(a, a + 20)), list(range(b, b + 10))] for a, b in starts], 32))
    return DataLoader(batches, batch_size=None)


def _spec(loader: DataLoader[Any]) -> DataSpec:
    return DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch["input_ids"]))


def _train(tiny: ModelConfig, pack: Any, microbatch: int, evaluate: bool) -> tuple[CausalLM, InMemoryLogger]:
    model, memory = build_causal_lm(tiny, 64), InMemoryLogger()
    evaluator = Evaluator(
        label="heldout/counting",
        dataloader=_spec(_batches(pack, 2, 1)),
        metric_names=["TokenCrossEntropy"],
        eval_interval="10ba",
        device_eval_microbatch_size=8,
    )
    trainer = Trainer(
        model=model,
        train_dataloader=_spec(_batches(pack, 30, 0)),
        eval_dataloader=evaluator if evaluate else None,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration="20ba" if evaluate else "3ba",
        device="cpu",
        device_train_microbatch_size=microbatch,
        loggers=[memory],
        callbacks=[SpeedMonitor(window_size=2)],
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return model, memory


def test_trains_evaluates_and_reports_speed(tiny: ModelConfig, pack: Any) -> None:
    model, memory = _train(tiny, pack, 8, True)
    losses = [float(value) for _, value in memory.data["loss/train/total"]]
    heldout = {
        time.batch.value: float(value) for time, value in memory.data["metrics/heldout/counting/TokenCrossEntropy"]
    }
    assert losses[-1] < losses[0] / 2
    assert sorted(heldout) == [10, 20]
    assert memory.data["throughput/flops_per_sec"][-1][1] > 0

    model.eval()
    total, tokens = 0.0, 0
    for batch in _batches(pack, 2, 1):
        with torch.no_grad():
            outputs = model.eval_forward(batch)
        total += float(outputs["sample_loss_sum"].double().sum())
        tokens += int(outputs["sample_tokens"].sum())
    assert heldout[20] == pytest.approx(total / tokens, rel=1e-12)


def test_microbatches_give_the_same_training(tiny: ModelConfig, pack: Any) -> None:
    (whole, memory), (parts, other) = (_train(tiny, pack, size, False) for size in (8, 2))
    for (_, one), (_, two) in zip(memory.data["loss/train/total"], other.data["loss/train/total"], strict=True):
        assert float(one) == pytest.approx(float(two), rel=1e-5)
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)
