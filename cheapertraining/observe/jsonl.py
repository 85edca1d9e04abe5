"""The log on disk: one line of JSON for each training step, and the run's settings beside it.

JsonlLogger(folder)      # Trainer(loggers=[...]); writes <folder>/metrics.jsonl and <folder>/run.json on rank 0
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, format_name_with_dist

from cheapertraining.observe.run_folder import LOG_VERSION

__all__ = ["JsonlLogger"]

log = logging.getLogger(__name__)

_COUNTERS = ("batch", "sample", "token", "batch_in_epoch", "sample_in_epoch", "token_in_epoch")


class JsonlLogger(LoggerDestination):
    """Write every logged number to ``<folder>/metrics.jsonl``, one object a step, readable while the run goes on.

    Line of step ``n``: ``{"step": n, "time": seconds since 1970, name: number, ...}`` with all that belongs to the
    ``n``-th batch (counted from 1): its training loss, what was decided and measured after it, and evaluations at that
    point. Step 0 is what was logged before training. (Composer itself numbers the loss of the ``n``-th batch
    ``n - 1`` and the rest ``n``; a checkpoint made after ``n`` batches would then fall in the middle of a line.) A
    number that is not finite becomes null, so that every JSON reader can take the file.

    A step's line is on disk before the checkpoint of that step is saved. A run that resumes behind batch ``n`` drops
    all lines after ``n``, and a torn last line, and continues: no step is missing and none appears twice. A run that
    starts anew replaces the file. Settings (hyperparameters) go to ``<folder>/run.json``.

    Args:
        folder: The run's folder; ``{run_name}`` in it is replaced. Made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder_format = str(folder)
        self._folder: Path | None = None
        self._settings: dict[str, Any] = {"log_version": LOG_VERSION}
        self._pending: dict[str, Any] = {}
        self._step = 0
        self._written = True
        self._batch_under_way: int | None = None
        self._file: BinaryIO | None = None  # unbuffered: a line is the operating system's when _write returns
        self._line_start = 0

    @property
    def path(self) -> Path:
        """``metrics.jsonl``. Known once the Trainer has been built."""
        assert self._folder is not None, "the folder is known only after Event.INIT"
        return self._folder / "metrics.jsonl"

    def init(self, state: State, logger: Logger) -> None:
        del logger
        if dist.get_global_rank() == 0:
            self._folder = Path(format_name_with_dist(self._folder_format, state.run_name))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_settings()

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        self._settings.update(hyperparameters)
        if self._folder is not None:
            self._write_settings()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Cut the file back to the batch that training continues from."""
        del logger
        # Not before: Composer refuses here to write into a folder of another run's checkpoints, whose log must stay.
        if self._folder is None or self._file is not None:
            return
        self._step = state.timestamp.batch.value
        record, self._line_start = _cut(self.path, self._step)
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (open until close)
        # What was logged so far belongs to this step, and so may what an evaluation is still to add.
        self._pending = record | self._pending
        self._write()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        del logger
        self._batch_under_way = state.timestamp.batch.value

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._folder is None:
            return
        step = self._step if step is None else step
        if step == self._batch_under_way:
            step += 1
        if step != self._step and self._file is not None:
            self._write()
            self._line_start = self._file.seek(0, os.SEEK_END)
            self._step, self._pending = step, {}
        self._pending.update((name, _number(value)) for name, value in metrics.items())
        self._written = False

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        for unit in _COUNTERS:
            # Composer logged these when the batch began; a line says how much has been trained on after it.
            if f"time/{unit}" in self._pending:
                self._pending[f"time/{unit}"] = getattr(state.timestamp, unit).value
        self._write()

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        if self._folder is not None and self._file is None and not self._written:  # a Trainer that only evaluated
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open until close)
            self._line_start = self._file.tell()
        self._write()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        """Put the pending step's line at the end of the file; a line of the same step there is replaced."""
        if self._written or self._file is None:
            return
        line = {"step": self._step, "time": round(time.time(), 3)} | self._pending
        try:
            self._file.seek(self._line_start)
            text = json.dumps(line).encode() + b"\n"
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._file.truncate()
        except OSError as error:
            log.warning("%s: step %d is not logged: %s", self.path, self._step, error)
            with contextlib.suppress(OSError):
                self._file.truncate(self._line_start)
        self._written = True

    def _write_settings(self) -> None:
        assert self._folder is not None
        new = self._folder / "run.json.tmp"
        new.write_text(json.dumps(self._settings, indent=2, default=str) + "\n")
        new.replace(self._folder / "run.json")


def _cut(path: Path, last_step: int) -> tuple[dict[str, Any], int]:
    """Remove lines beyond ``last_step``, or all if it is 0, and what a crash tore; make the file if it is not there.

    Returns:
        The metrics of the line of ``last_step`` ({} if there is none), and the offset where that line starts or will.
    """
    start = end = 0
    record: dict[str, Any] = {}
    with open(path, "r+b" if path.exists() else "w+b") as file:
        for line in file if last_step > 0 else ():
            try:
                found = json.loads(line)
                step = int(found.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            if step > last_step or not line.endswith(b"\n"):
                break
            end += len(line)
            if step == last_step:
                found.pop("time", None)
                record = found
                break
            start = end
        file.truncate(end)
    return record, start


def _number(value: Any) -> Any:
    """Return what JSON can hold of a logged value: a finite number, null, or a string."""
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_number(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _number(item) for name, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
