"""What the mixture has come to, and whether its decisions did what they promised.

MixtureCourse(mixture, interval=10)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger

from cheapertraining.mixing.algorithm import OnlineMixing

if TYPE_CHECKING:
    from cheapertraining.data.mixing import MixedDataset

__all__ = ["MixtureCourse"]


class MixtureCourse(Callback):
    """Log ``mixture/share``, ``mixture/tokens_left`` by source, and ``fidelity/*`` by direction at each decision.

    Without online mixing it also logs weights, tokens and epochs, which else are that algorithm's to log.

    Args:
        mixture: of the training data.
        interval: batches between lines.
    """

    def __init__(self, mixture: MixedDataset, interval: int = 10) -> None:
        self.mixture = mixture
        self.interval = interval

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        mixing = next((each for each in state.algorithms if isinstance(each, OnlineMixing)), None)
        metrics: dict[str, float] = {}
        if batch % self.interval == 0:
            metrics |= self._shares()
            if mixing is None:
                metrics |= self._fixed(batch)
        if mixing is not None:
            metrics |= _fidelity(mixing, batch)
        if metrics:
            logger.log_metrics(metrics)

    def _shares(self) -> dict[str, float]:
        counts, mixture = self.mixture.counts(), self.mixture
        total = max(1, int(np.sum(counts.tokens)))
        metrics: dict[str, float] = {}
        for k, name in enumerate(mixture.source_names):
            tokens, epochs, cap = int(counts.tokens[k]), float(counts.epochs[k]), mixture.max_epochs.get(name)
            metrics[f"mixture/share/{name}"] = tokens / total
            end = math.floor(epochs) + 1 if cap is None else cap
            metrics[f"mixture/tokens_left/{name}"] = max(0.0, end - epochs) * mixture.available_tokens[name]
        return metrics

    def _fixed(self, batch: int) -> dict[str, float]:
        newest, sampled, counts = (
            self.mixture.get_current_weights(),
            self.mixture.weights_at(batch - 1),
            self.mixture.counts(),
        )
        metrics: dict[str, float] = {}
        for k, name in enumerate(self.mixture.source_names):
            metrics[f"mixture/weight/{name}"] = newest[name]
            metrics[f"mixture/sampled/{name}"] = sampled[name]
            metrics[f"mixture/tokens/{name}"] = float(counts.tokens[k])
            metrics[f"mixture/epochs/{name}"] = float(counts.epochs[k])
        return metrics


def _fidelity(mixing: OnlineMixing, batch: int) -> dict[str, float]:
    """What the decision before expected of the time until this one, and what came."""
    history = mixing.controller.history
    if len(history) < 2 or history[-1].batch != batch:
        return {}
    before = history[-2]
    told = {"predicted": before.predicted, "realized": before.realized or {}}
    return {
        f"fidelity/{what}/{direction}": value
        for what, changes in told.items()
        for direction, value in changes.items()
        if value is not None
    }
