"""PiKE: norm of a source's gradient against its noise (Li et al., arXiv 2502.06244).

Where gradients of sources do not conflict, a bound on the average loss after a step of ``B`` samples falls with the
squared norm of each source's gradient and rises with the variance ``s_k**2`` of its samples' gradients:

    w_k <- w_k * exp(signal * |g_k|**2 - noise / (2 * B) * s_k**2) / Z

The rule as remembered in our notes; its constants are the user's to tune, and the fair variant is not here. The squared
norm is taken without the bias that a finite sample gives it, and not below 0.

Cost: a ``GRAM`` measurement a decision, a forward and backward pass over ``K * source_samples`` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import GRAM, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless, exponentiated

__all__ = ["PiKEStrategy"]


class PiKEStrategy(Stateless):
    """Moves weight to the sources with large and consistent gradients.

    Args:
        signal: weight of the squared norm.
        noise: weight of the variance.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "pike"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})

    def __init__(self, signal: float = 0.1, noise: float = 0.1) -> None:
        for name, value in (("signal", signal), ("noise", noise)):
            if not value >= 0:
                raise UserError(f"algorithms.online_mixing.pike.{name}: expected at least 0, found {value}.")
        self.signal = signal
        self.noise = noise

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        """Nothing to prepare."""

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.gradients
        if measured is None or not np.isfinite(measured.products).all():
            return None
        strength = np.maximum(measured.squared_norms, 0.0)
        spread = measured.variances / (2 * signals.batch_size)
        return exponentiated(signals.sampling_weights, self.signal * strength - self.noise * spread)
