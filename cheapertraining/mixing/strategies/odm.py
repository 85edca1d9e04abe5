"""ODM: a bandit that is rewarded with loss (EXP3; Albalak et al., arXiv 2312.02406, algorithm 1).

With ``L_k`` the training loss of source ``k`` and ``t`` the batches trained so far,

    R_k   <- b * R_k + (1 - b) * L_k / w_k                     for the sources that came
    eps_t  = min(1 / K, sqrt(log(K) / (K * t)))
    w_k    = (1 - K * eps_t) * exp(eps_last * R_k) / sum_j exp(eps_last * R_j) + eps_t

with ``eps_last`` that of the last decision, ``1 / K`` at first. Dividing by ``w_k`` makes up for a source's being drawn
less often. The rule rewards what is hard, noise that cannot be learnt included. Losses are means since the last
decision, where the authors' code (``alon-albalak/online-data-mixing``, which accumulates a tenth of the losses
instead of averaging) takes one batch.

Cost: none; the training losses are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import LOSSES, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, exponentiated, from_names

__all__ = ["ODMStrategy"]

_VERSION = 1
_SMALLEST = 1e-6  # A weight below it counts as this, or one late sample of a source would decide everything.


class ODMStrategy:
    """Draws most what the model finds hardest.

    Args:
        ema: ``b``, how much of the old reward stays at each decision.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "odm"
    needs: ClassVar[frozenset[str]] = frozenset({LOSSES})

    def __init__(self, ema: float = 0.9) -> None:
        if not 0 <= ema < 1:
            raise UserError(f"algorithms.online_mixing.odm.ema: expected a number from 0 to below 1, found {ema}.")
        self.ema = ema

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._rewards = np.zeros(len(sources))
        self._exploration = 1 / len(sources)

    def propose(self, signals: Signals) -> Array | None:
        came = np.isfinite(signals.losses)
        if not came.any():
            return None
        paid = np.where(came, signals.losses, 0.0) / np.maximum(signals.sampling_weights, _SMALLEST)
        self._rewards = np.where(came, self.ema * self._rewards + (1 - self.ema) * paid, self._rewards)
        count, last = len(self._rewards), self._exploration
        self._exploration = min(1 / count, math.sqrt(math.log(count) / (count * max(signals.batch, 1))))
        greedy = exponentiated(np.full(count, 1 / count), last * self._rewards)
        return (1 - count * self._exploration) * greedy + self._exploration

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "rewards": by_name(self._names, self._rewards),
            "exploration": self._exploration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rewards = from_names(self._names, state["rewards"])
        self._exploration = float(state["exploration"])
