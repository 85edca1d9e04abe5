"""Train runs one after the other and write down every batch that the model was given.

``record_runs.py RUNS.json`` on each rank, a list of ``{"label": …, "yaml": …, "overrides": [...], "stop": batch}``.
Beside RUNS.json, ``<label>.rank<r>.jsonl`` gets a line for each batch of that rank: its number, each row's source,
sample id and CRC of the tokens, and the weights that the batch was drawn with. With ``stop``, the last rank gets a
SIGTERM in that batch (counted from 0), so the run saves a checkpoint and ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheapertraining.config import load_run_config
from cheapertraining.data import MixedDataset
from cheapertraining.training import run as training


class Recorder(Callback):
    """Writes the record of one run, and sends the signal in batch ``stop``."""

    def __init__(self, mixture: MixedDataset, path: Path, stop: int | None) -> None:
        self.mixture = mixture
        self.file = path.open("w", encoding="utf-8")
        self.stop = stop

    def after_dataloader(self, state: State, logger: Logger) -> None:
        number = int(state.timestamp.batch)
        line = {
            "batch": number,
            "weights": self.mixture.weights_at(number),
            "source": state.batch["source"].tolist(),
            "sample": state.batch["sample_id"].tolist(),
            "rows": [zlib.crc32(row.numpy().tobytes()) for row in state.batch["input_ids"]],
        }
        self.file.write(json.dumps(line) + "\n")
        if number == self.stop and dist.get_global_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self, state: State, logger: Logger) -> None:
        self.file.close()


def train(label: str, yaml: str, overrides: list[str], stop: int | None, folder: Path) -> None:
    """One run, through the same door as ``train.py``, with the recorder among its callbacks."""
    path = folder / f"{label}.rank{os.environ.get('RANK', '0')}.jsonl"
    build = training.build_callbacks

    def with_recorder(config: Any, loader: Any, *more: Any) -> list[Callback]:
        return [*build(config, loader, *more), Recorder(loader.mixture, path, stop)]

    training.build_callbacks = with_recorder
    try:
        training.train(load_run_config(yaml, [f"run_name={label}", *overrides]))
    except SystemExit as end:
        if stop is None or end.code != 143:
            raise
    else:
        assert stop is None, "the run did not end at the signal"
    finally:
        training.build_callbacks = build


if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = Path(sys.argv[1])
    for run in json.loads(plan.read_text(encoding="utf-8")):
        train(run["label"], run["yaml"], run.get("overrides", []), run.get("stop"), plan.parent)
