"""Weights in proportion to the size of the sources, flattened by a temperature.

``w_k = n_k**(1/T) / sum_j n_j**(1/T)`` with ``n_k`` the tokens in one pass over source ``k``: ``T = 1`` is
the natural mixture, a large ``T`` approaches the uniform one (multilingual pre-training: Conneau & Lample
2019, arXiv 1901.07291, with ``alpha = 1/T``; Xue et al. 2020, arXiv 2010.11934).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless

__all__ = ["ProportionalStrategy"]


class ProportionalStrategy(Stateless):
    """Constant weights from sizes.

    Args:
        temperature: ``T`` above.

    Raises:
        UserError: a temperature that is not positive.
    """

    name: ClassVar[str] = "proportional"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise UserError(
                f"algorithms.online_mixing.proportional.temperature: expected a number above 0, found {temperature}."
            )
        self.temperature = temperature
        self._weights: Array | None = None

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        sizes = np.log([float(source.available_tokens) for source in sources]) / self.temperature
        weights = np.exp(sizes - sizes.max())
        self._weights = weights / weights.sum()

    def propose(self, signals: Signals) -> Array | None:
        return self._weights
