"""DoGE: weight to the sources whose gradient is aligned with those of the others (Fan et al., arXiv 2310.15393).

Universal mode, as in the authors' code (``Olivia-fsm/DoGE: src/trainer.py``, ``update_domain_weights``): with ``g_k``
the mean gradient of source ``k``,

    s_k = sum_(j != k) <g_k, g_j> / mean_j |g_j|,     clipped to [0, max_score]
    w_k <- w_k * exp(m * lr * s_k / mu) / Z
    w   <- (1 - smoothing) * w + smoothing / K

A source that hurts the others (``s_k < 0``) is treated as one that does nothing to them. There the weights change at
every batch (``m = 1``); here one update stands for the ``m`` batches since the last one. Two further differences:
sources are sampled by their weights instead of weighting their gradients, and gradients are not clipped one by one
before their products are taken. The method's result is the average of the weights over a proxy run; online, the
weights themselves are used.

Out-of-domain mode (`DoGETargetStrategy`), for probes that are no sources: ``s_k = <g_k, g_T> / mean_j |g_j|`` with
``g_T`` the gradient of the probes' weighted loss.

Cost: a ``GRAM`` measurement a decision, a forward and backward pass over ``K * source_samples`` samples;
with probes, an ``INFLUENCE`` measurement of the same samples as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import GRAM, INFLUENCE, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import exponentiated

__all__ = ["DoGEStrategy", "DoGETargetStrategy"]

_VERSION = 1
_KEY = "algorithms.online_mixing.doge"


class DoGEStrategy:
    """Moves weight by the alignment of gradients.

    Args:
        mu: strength of the divergence that holds the weights back; smaller moves them faster.
        max_score: scores are clipped to it.
        smoothing: share of the uniform mixture that is mixed in.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "doge"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})

    def __init__(self, mu: float = 0.05, max_score: float = 5.0, smoothing: float = 0.0) -> None:
        for name, value in (("mu", mu), ("max_score", max_score)):
            if not value > 0:
                raise UserError(f"{_KEY}.{name}: expected a positive number, found {value}.")
        if not 0 <= smoothing <= 1:
            raise UserError(f"{_KEY}.smoothing: expected a number from 0 to 1, found {smoothing}.")
        self.mu = mu
        self.max_score = max_score
        self.smoothing = smoothing

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._last_batch: int | None = None

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.gradients
        if measured is None or not np.isfinite(measured.products).all():
            return None
        aligned = self._alignment(signals, measured.products)
        if aligned is None:
            return None
        batches = 1 if self._last_batch is None else signals.batch - self._last_batch
        self._last_batch = signals.batch
        norms = np.sqrt(np.diag(measured.products))
        scores = np.clip(aligned / max(float(norms.mean()), float(np.finfo(np.float64).tiny)), 0.0, self.max_score)
        rate = 1.0 if signals.learning_rate is None else signals.learning_rate
        wish = exponentiated(signals.sampling_weights, batches * rate * scores / self.mu)
        return (1 - self.smoothing) * wish + self.smoothing / len(wish)

    def _alignment(self, signals: Signals, products: Array) -> Array | None:
        """Products of each source's gradient with what it is to help, ``[K]``."""
        return np.asarray(products.sum(axis=1) - np.diag(products))

    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, "last_batch": self._last_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last_batch = None if state["last_batch"] is None else int(state["last_batch"])


class DoGETargetStrategy(DoGEStrategy):
    """Moves weight by the alignment with the probes; see the module's text. Arguments and errors are the same."""

    needs: ClassVar[frozenset[str]] = frozenset({GRAM, INFLUENCE})

    def _alignment(self, signals: Signals, products: Array) -> Array | None:
        measured = signals.influence
        if measured is None or not np.isfinite(measured.scores).all():
            return None
        return np.asarray(measured.direction_weights @ measured.scores)
