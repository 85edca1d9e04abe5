"""A small run of a real Trainer over real shards; as a script, one that can be signalled and resumed.

python tiny_trainer.py SAMPLE_FOLDER RUNS_FOLDER BATCHES [SECONDS_IN_BATCH_3]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator, State
from composer.loggers import Logger, LoggerDestination

from cheapertraining.config import ModelConfig, load_data_config
from cheapertraining.data import get_loader
from cheapertraining.data.mixing import MixtureLoader
from cheapertraining.models import build_causal_lm
from cheapertraining.observe import ConsoleLines, GracefulStop, JsonlLogger, MixtureSummary

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    max_position_embeddings=32,
)
GLOBAL_BATCH, LAG, ROW = 12, 2, 32


class ChangeWeights(Callback):
    """Set new weights after a batch."""

    def __init__(self, loader: MixtureLoader, changes: Mapping[int, Mapping[str, float]]) -> None:
        self.mixture, self.changes = loader.mixture, changes

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        if batch in self.changes:
            self.mixture.set_weights(self.changes[batch])


class Dawdle(Callback):
    """Say where training is, and take long over the third batch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before_forward(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value + 1
        print(f"in batch {batch}, process {os.getpid()}", flush=True)
        time.sleep(self.seconds if batch == 3 else 0.05)


def tiny_loader(sample: Path) -> MixtureLoader:
    return get_loader(load_data_config(sample / "data.yaml"), batch_size=GLOBAL_BATCH, lag=LAG, seed=5)


def tiny_trainer(
    loader: MixtureLoader,
    runs: Path,
    batches: int,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    **options: Any,
) -> Trainer:
    """A trainer of run ``tiny`` in ``runs``, evaluating ``heldout/<source>`` and ``probe/code`` every 4 batches."""
    torch.set_num_threads(1)
    model = build_causal_lm(MODEL, 512)
    heldout = {f"heldout/{name}": split for name, split in loader.heldout.items()}
    evaluators = [
        Evaluator(
            label=label,
            dataloader=split,
            metric_names=["TokenCrossEntropy"],
            subset_num_batches=1,
            eval_interval="4ba",
            device_eval_microbatch_size=GLOBAL_BATCH,
        )
        for label, split in (heldout | {"probe/code": loader.probes["code"]}).items()
    ]
    return Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader,
            get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
            get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel(),
        ),
        eval_dataloader=evaluators,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration=f"{batches}ba",
        device="cpu",
        device_train_microbatch_size=GLOBAL_BATCH,
        run_name="tiny",
        callbacks=list(callbacks),
        loggers=list(loggers),
        progress_bar=False,
        **{"save_folder": f"{runs}/tiny/checkpoints", "save_interval": "2ba"} | options,
    )


def main() -> None:
    sample, runs, batches = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    loader = tiny_loader(sample)
    trainer = tiny_trainer(
        loader,
        runs,
        batches,
        [
            GracefulStop(),
            Dawdle(float(sys.argv[4]) if len(sys.argv) > 4 else 0.05),
            ConsoleLines(loader.mixture, interval=1),
            MixtureSummary(loader.mixture, runs / "tiny"),
        ],
        [JsonlLogger(runs / "{run_name}")],
        save_interval="1000ba",
        autoresume=True,
    )
    try:
        trainer.fit()
    finally:
        trainer.close()


if __name__ == "__main__":
    main()
