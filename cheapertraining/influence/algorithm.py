"""Influence of what a Composer trainer trains on, while it trains: scores fall out of the backward pass.

    Trainer(..., algorithms=[InfluenceScores(calculator, loader.mixture.source_names)])

Every sample of every batch is scored against the probes; the means by source and their standard errors are logged.
Nothing of the training changes: gradients, losses and random numbers are those without it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import GroupSums
from cheapertraining.influence.calculator import InfluenceCalculator
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.scorers.fused import FusedScorer

__all__ = ["FUSED_ESTIMATORS", "InfluenceScores"]

FUSED_ESTIMATORS = ("dot", "adam", "datainf")
"""Estimators that need nothing but what the training backward shows."""
_DATAINF_SCALE = 0.1
_STATE_VERSION = 1


class InfluenceScores(Algorithm):
    """Scores each training sample along the probes' directions, which are made anew every so many batches.

    Metrics, every ``log_interval`` batches, over the batches since the last such log:
    ``influence/score/<probe>/<source>``, the token-weighted mean (positive: training on the source lowers the probe's
    loss), and ``influence/score_se/<probe>/<source>``. Over the whole run, ``influence/total/<probe>/<source>``: the
    fall of the probe's loss, in nats, that the source's samples have brought to first order, each weighted as it
    entered its step and times the learning rate (TracIn, 2002.08484, over every step instead of checkpoints). At each
    refresh ``influence/probe_loss/<probe>``.

    ``datainf`` takes each microbatch as its own Fisher set. Composer saves the state of rank 0 alone, which after a
    resume therefore has lost what the other ranks had added to the totals since the last log.

    Args:
        calculator: by samples, its estimator one of :data:`FUSED_ESTIMATORS`; its ``refresh_every`` says how many
            batches directions serve.
        source_names: what the batches' ``source`` int64 ``[B]`` counts in.
        log_interval: batches between two logs.

    Raises:
        UserError: another estimator, or scores by document.
    """

    def __init__(self, calculator: InfluenceCalculator, source_names: Sequence[str], log_interval: int = 10) -> None:
        if calculator.estimator not in FUSED_ESTIMATORS or calculator.by != "sample":
            raise UserError(
                f"algorithms.influence_scores.estimator: expected one of {', '.join(FUSED_ESTIMATORS)} by sample, "
                f"found '{calculator.estimator}' by {calculator.by}. What needs more than the training pass, "
                "tools/score_influence.py gives."
            )
        self.calculator = calculator
        self.sources = tuple(source_names)
        self.log_interval = log_interval
        device = next(iter(calculator.parameters.values())).device
        shape = len(self.sources), len(calculator.columns)
        self._window = GroupSums(*shape, device)
        # float64 [G, K]: of all ranks up to the last log; of this rank since.
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._recent = torch.zeros_like(self._total)
        self._directions: Directions | None = None
        self._scorer: FusedScorer | None = None
        self._armed: contextlib.ExitStack | None = None
        self._factors: list[torch.Tensor] = []

    def __repr__(self) -> str:
        # Composer saves it; without an address it is the same on every rank and in every run.
        return f"{type(self).__name__}({self.calculator.estimator})"

    def match(self, event: Event, state: State) -> bool:
        del state
        return event in (
            Event.BATCH_START,
            Event.BEFORE_FORWARD,
            Event.AFTER_LOSS,
            Event.AFTER_BACKWARD,
            Event.BATCH_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BATCH_START:
            self._refresh(state, logger)
        elif event == Event.BEFORE_FORWARD:
            self._arm(state)
        elif event == Event.AFTER_LOSS:
            loss = state.loss if torch.is_tensor(state.loss) else next(iter(state.loss))
            loss.register_hook(self._factors.append)
        elif event == Event.AFTER_BACKWARD:
            self._read(state)
        elif int(state.timestamp.batch) % self.log_interval == 0:
            self._log(logger)

    def state_dict(self) -> dict[str, Any]:
        bank = self.calculator.bank
        return {
            **super().state_dict(),
            "version": _STATE_VERSION,
            "sources": list(self.sources),
            "columns": list(self.calculator.columns),
            "window": self._window.state_dict(),
            "total": self._total,
            "recent": self._recent,
            "probes": None if bank is None else bank.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Go on as :meth:`state_dict` left off; with other sources or probes, begin anew."""
        del strict
        if state["sources"] != list(self.sources) or state["columns"] != list(self.calculator.columns):
            return
        if dist.get_global_rank() == 0:
            self._window.load_state_dict(state["window"])
            self._recent.copy_(state["recent"])
        self._total.copy_(state["total"])
        if self.calculator.bank is not None:
            self.calculator.bank.load_state_dict(state["probes"])

    def _refresh(self, state: State, logger: Logger) -> None:
        """Make directions where they are due, and a scorer for them."""
        calculator, step = self.calculator, int(state.timestamp.batch)
        if calculator.estimator == "adam" and step == 0:
            return  # There are no moments yet.
        size = state.device_train_microbatch_size
        directions = calculator.refresh(step, size if isinstance(size, int) else None)
        if directions is self._directions:
            return
        scale = _DATAINF_SCALE if calculator.estimator == "datainf" else None
        self._directions, self._scorer = directions, FusedScorer(state.model, directions, datainf=scale)
        losses = calculator.probe_losses
        logger.log_metrics({f"influence/probe_loss/{name}": found.mean for name, found in losses.items()})

    def _arm(self, state: State) -> None:
        """Watch the microbatch that comes; one that ran out of memory is tried again with fewer samples."""
        if self._armed is not None:
            failed = RuntimeError("this microbatch was not finished")
            self._armed.__exit__(RuntimeError, failed, None)
        self._factors.clear()
        self._armed = contextlib.ExitStack()
        if self._scorer is not None:
            self._armed.enter_context(self._scorer.armed(state.batch))

    def _read(self, state: State) -> None:
        """Add the scores of a microbatch to its sources'."""
        if self._armed is None or self._scorer is None:
            return
        self._armed.close()
        self._armed = None
        outputs: Any = state.outputs
        tokens = outputs["sample_tokens"].sum().clamp_min(1)
        # The gradient of the mean loss is the factor with which the trainer lets this microbatch into the step.
        factor = self._factors.pop().double() / tokens
        found = self._scorer.collect(factor)
        source = state.batch["source"]
        self._window.add(found.scores, found.tokens, source)
        scaler = 1.0 if state.scaler is None or not state.scaler.is_enabled() else state.scaler.get_scale()
        step = float(state.optimizers[0].param_groups[0]["lr"]) / (scaler * dist.get_world_size())
        self._recent.index_add_(0, source, found.scores.double() * factor * step)

    def _log(self, logger: Logger) -> None:
        """Log by source what has come since the last log, over all ranks, and forget it."""
        if self._scorer is None:
            return
        means, errors = self._window.means(over_ranks=True)
        dist.all_reduce(self._recent)
        self._total += self._recent
        self._recent.zero_()
        self._window = GroupSums(len(self.sources), self._total.shape[1], self._total.device)
        values = {"score": means, "score_se": errors, "total": self._total}
        logger.log_metrics(
            {
                f"influence/{what}/{column}/{source}": float(table[row, place])
                for what, table in ((what, table.cpu()) for what, table in values.items())
                for row, source in enumerate(self.sources)
                for place, column in enumerate(self.calculator.columns)
                if not math.isnan(float(table[row, place]))
            }
        )
