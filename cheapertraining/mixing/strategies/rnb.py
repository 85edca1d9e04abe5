"""R&B's balance: a softmax of what each source does for a target mixture (Ge et al., arXiv 2505.00358).

With the Gram matrix ``G_kj = <g_k, g_j>`` of the sources' mean gradients and ``p`` the mixture that counts in the
end,

    w = softmax(G p / temperature)

so that the next weights do not depend on the last ones (the rule as remembered in our notes). The other half of the
paper, clustering the data into sources, is done before training or not at all. There ``G`` is averaged over the
gradients that training computes between two updates; here it is measured at the decision. Its diagonal is taken
without the bias that a finite sample gives it.

Cost: a ``GRAM`` measurement a decision, a forward and backward pass over ``K * source_samples`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.signals import GRAM, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless, exponentiated

__all__ = ["RnBStrategy"]

_KEY = "algorithms.online_mixing.rnb"


class RnBStrategy(Stateless):
    """Weights from the Gram matrix of the gradients.

    Args:
        temperature: in units of squared gradient norms; smaller is greedier.
        target: ``p`` by source, any scale, 0 for sources not named; default the weights at the start.

    Raises:
        UserError: a value out of range; at ``reset``, a target that does not fit the sources.
    """

    name: ClassVar[str] = "rnb"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})

    def __init__(self, temperature: float = 0.1, target: Mapping[str, float] | None = None) -> None:
        if not temperature > 0:
            raise UserError(f"{_KEY}.temperature: expected a positive number, found {temperature}.")
        for name, share in (target or {}).items():
            if not (math.isfinite(share) and share >= 0):
                raise UserError(f"{_KEY}.target.{name}: expected a number of at least 0, found {share}.")
        if target and math.fsum(target.values()) <= 0:
            raise UserError(f"{_KEY}.target: expected a positive share, found none.")
        self.temperature = temperature
        self.target = dict(target or {})

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        names = [source.name for source in sources]
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
        return exponentiated(np.full(len(gram), 1 / len(gram)), gram @ self._target / self.temperature)
