"""R&B's balance: a softmax of what each source does for a target mixture (Ge et al., arXiv 2505.00358).

With the Gram matrix ``G_kj = <g_k, g_j>`` of the sources' mean gradients and ``p`` the mixture that counts in the
end,

    w = softmax(G p / temperature)

so that the next weights do not depend on the last ones (the rule as remembered in our notes). The other half of the
paper, clustering the data into sources, is done before training or not at all. There ``G`` is averaged over the
gradients that training computes between two updates; here it is measured at the decision, and averaged over decisions
with ``ema``: a moving average, corrected for its start. Its diagonal is taken without the bias that a finite sample
gives it.

Cost: a ``GRAM`` measurement a decision, a forward and backward pass over ``K * source_samples`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.signals import GRAM, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, exponentiated, from_names

__all__ = ["RnBStrategy"]

_VERSION = 1
_KEY = "algorithms.online_mixing.rnb"


class RnBStrategy:
    """Weights from the Gram matrix of the gradients.

    Args:
        temperature: in units of squared gradient norms; smaller is greedier.
        target: ``p`` by source, any scale, 0 for sources not named; default the weights at the start.
        ema: share of the old matrix that is kept at each decision.

    Raises:
        UserError: a value out of range; at ``reset``, a target that does not fit the sources.
    """

    name: ClassVar[str] = "rnb"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})

    def __init__(self, temperature: float = 0.1, target: Mapping[str, float] | None = None, ema: float = 0.0) -> None:
        if not 0 <= ema < 1:
            raise UserError(f"{_KEY}.ema: expected a number from 0 to below 1, found {ema}.")
        if not temperature > 0:
            raise UserError(f"{_KEY}.temperature: expected a positive number, found {temperature}.")
        for name, share in (target or {}).items():
            if not (math.isfinite(share) and share >= 0):
                raise UserError(f"{_KEY}.target.{name}: expected a number of at least 0, found {share}.")
        if target and math.fsum(target.values()) <= 0:
            raise UserError(f"{_KEY}.target: expected a positive share, found none.")
        self.temperature = temperature
        self.target = dict(target or {})
        self.ema = ema

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        names = self._names = tuple(source.name for source in sources)
        self._gram, self._total = np.zeros((len(names), len(names))), 0.0
        for name in self.target:
            if name not in names:
                raise UserError(f"{_KEY}.target.{name}: no such source.{nearest(name, names)}")
        wanted = np.array([self.target.get(name, 0.0) for name in names]) if self.target else prior
        self._target = wanted / wanted.sum()

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.gradients
        if measured is None or not np.isfinite(measured.products).all():
            return None
        gram = measured.products.copy()
        np.fill_diagonal(gram, measured.squared_norms)
        self._gram = self.ema * self._gram + (1 - self.ema) * gram
        self._total = self.ema * self._total + (1 - self.ema)
        pulls = self._gram @ self._target / (self._total * self.temperature)
        return exponentiated(np.full(len(gram), 1 / len(gram)), pulls)

    def state_dict(self) -> dict[str, Any]:
        rows = zip(self._names, self._gram, strict=True)
        return {
            "version": _VERSION,
            "gram": {name: by_name(self._names, row) for name, row in rows},
            "total": self._total,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With other sources, or from before averages, the average begins anew."""
        saved = state.get("gram", {})
        if saved.keys() == set(self._names):
            self._gram = np.stack([from_names(self._names, saved[name]) for name in self._names])
            self._total = float(state["total"])
