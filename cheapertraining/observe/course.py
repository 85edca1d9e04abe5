"""What the mixture has come to, and whether its decisions did what they promised.

MixtureCourse(mixture, interval=10)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheapertraining.mixing.algorithm import OnlineMixing
from cheapertraining.mixing.by_source import sums_by_source

if TYPE_CHECKING:
    from cheapertraining.data.mixing import MixedDataset

__all__ = ["MixtureCourse"]


class MixtureCourse(Callback):
    """Log ``mixture/share``, ``mixture/tokens_left`` by source, and ``fidelity/*`` by direction at each decision.

    Without online mixing it also logs losses, weights, tokens and epochs, which else are that algorithm's to log; the
    losses of models whose outputs have ``sample_loss_sum`` and ``sample_tokens``, such as ours.

    Args:
        mixture: of the training data.
        interval: batches between lines.
    """

    def __init__(self, mixture: MixedDataset, interval: int = 10) -> None:
        self.mixture = mixture
        self.interval = interval
        # float64 [2, K], losses and tokens by source: of the batch at hand (this rank), and since the line before (all
        # ranks). On the device, so that no step waits for them.
        self._batch_sums: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """What the next line will tell, by source; JSON-able."""
        if self._sums is None:
            return {}
        return {"sums": dict(zip(self.mixture.source_names, self._sums.T.tolist(), strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off."""
        sums = state.get("sums", {})
        columns = [sums.get(name, [0.0, 0.0]) for name in self.mixture.source_names]
        self._sums = torch.tensor(columns, dtype=torch.float64).T if sums else None

    def before_train_batch(self, state: State, logger: Logger) -> None:
        del state, logger
        self._batch_sums = None  # A batch is tried again with smaller microbatches when memory ran out.

    def after_loss(self, state: State, logger: Logger) -> None:
        del logger
        outputs: Any = state.outputs
        if _mixing(state) is not None or "sample_loss_sum" not in outputs:
            return
        rows = [outputs["sample_loss_sum"], outputs["sample_tokens"]]
        added = sums_by_source(rows, state.batch["source"], len(self.mixture.source_names))
        self._batch_sums = added if self._batch_sums is None else self._batch_sums + added

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        mixing = _mixing(state)
        if self._batch_sums is not None:
            dist.all_reduce(self._batch_sums)
            self._sums = self._batch_sums if self._sums is None else self._sums.to(self._batch_sums) + self._batch_sums
            self._batch_sums = None
        metrics: dict[str, float] = {}
        if batch % self.interval == 0:
            metrics |= self._shares()
            if mixing is None:
                metrics |= self._fixed(batch) | self._losses()
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

    def _losses(self) -> dict[str, float]:
        """Mean loss of each source since the line before, and its share in the mean over all."""
        if self._sums is None:
            return {}
        losses, tokens = self._sums.tolist()
        self._sums = None
        metrics: dict[str, float] = {}
        for name, loss, count in zip(self.mixture.source_names, losses, tokens, strict=True):
            metrics[f"mixture/objective/{name}"] = count / max(1.0, sum(tokens))
            if count:
                metrics[f"loss/train/{name}"] = loss / count
        return metrics


def _mixing(state: State) -> OnlineMixing | None:
    return next((each for each in state.algorithms if isinstance(each, OnlineMixing)), None)


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
