"""The trainer of `train.py`, handed to a benchmark that looks at it from inside."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger

from cheapertraining.config import RunConfig
from cheapertraining.training import run as training

__all__ = ["StepClock", "build_trainer", "close_quietly", "fit_quietly"]


class StepClock(Callback):
    """CPU time at the end of each batch; as the last callback, it sees the work of all others."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer's event."""
        self.ends.append(time.process_time())

    def steps(self) -> list[float]:
        """CPU-seconds of each step since the last call, but for the first, which includes the start of training."""
        steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        self.ends = []
        return steps


def build_trainer(config: RunConfig, *callbacks: Callback) -> Trainer:
    """What ``train(config)`` builds, with further callbacks behind its own, and not run yet."""
    build_callbacks = training.build_callbacks

    def with_more(*arguments: Any) -> list[Callback]:
        return [*build_callbacks(*arguments), *callbacks]

    with patch.object(training, "build_callbacks", with_more), patch.object(training, "_fit"):
        return training.train(config)


def fit_quietly(trainer: Trainer, batches: int) -> None:
    """Train for some batches more; what it prints goes nowhere."""
    with silence():
        trainer.fit(duration=f"{batches}ba")


def close_quietly(trainer: Trainer) -> None:
    """End the trainer's logs."""
    with silence():
        trainer.close()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send standard output to the null device, at the cost that writing has on a terminal's other side."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
