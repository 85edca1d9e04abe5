"""PiKE: norm of a source's gradient against its noise (Li et al., arXiv 2502.06244).

Where gradients of sources do not conflict, a bound on the average loss after a step of ``B`` samples falls with the
squared norm of each source's gradient and rises with the variance ``s_k**2`` of its samples' gradients:

    w_k <- w_k * exp(signal * |g_k|**2 - noise / (2 * B) * s_k**2) / Z

*Fair variant* (``tilt`` above 0). Instead of the mean loss, the tilted one ``log(mean_k exp(tilt * L_k)) / tilt`` goes
down, which approaches the worst source's as ``tilt`` grows. Its gradient is ``sum_k y_k g_k`` with ``y = softmax(tilt *
L)``, so each source's gradient enters the rule as ``K y_k g_k``: squared norms and variances are multiplied by
``(K y_k)**2``. ``L`` are the training losses; a source that did not come keeps its last one.

Rule and variant as remembered in our notes; the constants are the user's to tune. The squared norm is taken without
the bias that a finite sample gives it, and not below 0.

Cost: a ``GRAM`` measurement a decision, a forward and backward pass over ``K * source_samples`` samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import GRAM, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, exponentiated, from_names

__all__ = ["PiKEStrategy"]

_VERSION = 1


class PiKEStrategy:
    """Moves weight to the sources with large and consistent gradients.

    Args:
        signal: weight of the squared norm.
        noise: weight of the variance.
        tilt: of the fair variant; 0 is the plain rule.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "pike"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM})

    def __init__(self, signal: float = 0.1, noise: float = 0.1, tilt: float = 0.0) -> None:
        for name, value in (("signal", signal), ("noise", noise), ("tilt", tilt)):
            if not value >= 0:
                raise UserError(f"algorithms.online_mixing.pike.{name}: expected at least 0, found {value}.")
        self.signal = signal
        self.noise = noise
        self.tilt = tilt

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._losses = np.full(len(sources), np.nan)

    def propose(self, signals: Signals) -> Array | None:
        self._losses = np.where(np.isfinite(signals.losses), signals.losses, self._losses)
        measured = signals.gradients
        if measured is None or not np.isfinite(measured.products).all():
            return None
        strength = np.maximum(measured.squared_norms, 0.0)
        spread = measured.variances / (2 * signals.batch_size)
        scale = self._shares() ** 2
        return exponentiated(signals.sampling_weights, scale * (self.signal * strength - self.noise * spread))

    def _shares(self) -> Array:
        """``K y_k``, what each source counts in the tilted loss; ones where no loss is known."""
        known = np.isfinite(self._losses)
        if self.tilt == 0 or not known.any():
            return np.ones(len(self._losses))
        losses = np.where(known, self._losses, self._losses[known].mean())
        return len(losses) * exponentiated(np.full(len(losses), 1 / len(losses)), self.tilt * losses)

    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, "losses": by_name(self._names, self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Checkpoints from before the fair variant have none.
        self._losses = from_names(self._names, state.get("losses", dict.fromkeys(self._names)))
