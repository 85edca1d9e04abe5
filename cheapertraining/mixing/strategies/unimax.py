"""UniMax: as uniform as the sources' sizes allow (Chung et al. 2023, arXiv 2304.09151, algorithm 1).

A budget of tokens is shared out, smallest source first: each gets an equal share of what is left, but no more
than ``max_epochs`` passes over it. So small sources are capped and the others are exactly uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless

__all__ = ["UniMaxStrategy", "unimax_budgets"]


def unimax_budgets(limits: Array, budget: float) -> Array:
    """Tokens for each source: ``min(limit, level)`` with the level at which they sum to the budget.

    Args:
        limits: ``[K]``, most tokens that each source may give.
        budget: tokens to share out.

    Returns:
        ``[K]``; sums to the budget, or to less where all limits together are below it.
    """
    budgets = np.zeros(len(limits))
    left = float(budget)
    for place, source in enumerate(np.argsort(limits, kind="stable")):
        budgets[source] = min(float(limits[source]), left / (len(limits) - place))
        left -= budgets[source]
    return budgets


class UniMaxStrategy(Stateless):
    """Constant weights from sizes, the run's length and a cap on epochs.

    Args:
        max_epochs: passes over a source at most; a source's own limit holds where it is lower.

    Raises:
        UserError: a limit that is not positive.
    """

    name: ClassVar[str] = "unimax"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, max_epochs: float = 4.0) -> None:
        if not max_epochs > 0:
            raise UserError(
                f"algorithms.online_mixing.unimax.max_epochs: expected a positive number, found {max_epochs}."
            )
        self.max_epochs = max_epochs
        self._weights: Array | None = None

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        limits = np.array([min(self.max_epochs * s.available_tokens, s.allowed_tokens) for s in sources])
        budgets = unimax_budgets(limits, horizon_tokens)
        self._weights = budgets / budgets.sum()

    def propose(self, signals: Signals) -> Array | None:
        return self._weights
