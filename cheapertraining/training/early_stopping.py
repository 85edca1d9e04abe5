"""Ends a run whose metric no longer gets better."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cheapertraining.errors import UserError

__all__ = ["PlateauEarlyStopping"]

log = logging.getLogger(__name__)

_FILE = "early_stopping.json"


class PlateauEarlyStopping:
    """Says to stop once ``patience`` evaluations in a row were no better than the best by ``min_delta``.

    With several processes, call :meth:`check` on all of them: it looks at the mean over the ranks, so that all of them
    stop together.

    Args:
        patience: evaluations without improvement after which to stop.
        min_delta: what counts as an improvement, in the metric's unit.
        mode: ``min`` or ``max``: which way is better.
        min_evals: never stop before so many evaluations.
        enabled: false makes :meth:`check` always say no.
        rank: of this process; rank 0 alone logs and writes.

    Attributes:
        best: the best metric so far; infinite before the first.
        best_step: the step it was seen at.
        wait: evaluations since then.
        eval_count: evaluations so far.
        stopped_early: whether it has said to stop.
        stopped_step: the step at which it first did.

    Raises:
        UserError: a setting out of range.
    """

    def __init__(
        self,
        patience: int = 5,
        min_delta: float = 0.01,
        mode: str = "min",
        min_evals: int = 10,
        enabled: bool = True,
        rank: int = 0,
    ) -> None:
        if mode not in ("min", "max"):
            raise UserError(f"early stopping: mode: expected 'min' or 'max', found {mode!r}.")
        if patience < 1:
            raise UserError(f"early stopping: patience: expected at least 1 evaluation, found {patience}.")
        if not min_delta >= 0:
            raise UserError(f"early stopping: min_delta: expected at least 0, found {min_delta}.")
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.min_evals = min_evals
        self.enabled = enabled
        self.rank = rank
        self.best = math.inf if mode == "min" else -math.inf
        self.best_step = 0
        self.wait = 0
        self.eval_count = 0
        self.stopped_early = False
        self.stopped_step: int | None = None

    def check(self, metric: float, step: int) -> bool:
        """Take in an evaluation; whether to stop now. A metric that is not a number is no improvement."""
        if not self.enabled:
            return False
        metric = _mean_over_ranks(float(metric))
        self.eval_count += 1
        gain = self.best - metric if self.mode == "min" else metric - self.best
        if gain > self.min_delta:
            self.best, self.best_step, self.wait = metric, step, 0
        else:
            self.wait += 1
        stop = self.wait >= self.patience and self.eval_count >= self.min_evals
        if stop and not self.stopped_early:
            self.stopped_early, self.stopped_step = True, step
            if self.rank == 0:
                log.info("step %d: no better than %.6g (step %d): stop", step, self.best, self.best_step)
        return stop

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON-able but for an infinite ``best`` before the first evaluation."""
        names = ("best", "best_step", "wait", "eval_count", "stopped_early", "stopped_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off."""
        for name in self.state_dict():
            setattr(self, name, state[name])

    def save_json(self, folder: str | Path) -> None:
        """Write ``early_stopping.json`` in ``folder``: best, when, and the settings. On rank 0 only."""
        if self.rank != 0:
            return
        settings = ("patience", "min_delta", "mode", "min_evals", "enabled")
        report = {
            "stopped_early": self.stopped_early,
            "stopped_step": self.stopped_step,
            "best_metric": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "wait": self.wait,
            "total_evals": self.eval_count,
            "config": {name: getattr(self, name) for name in settings},
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _mean_over_ranks(value: float) -> float:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
