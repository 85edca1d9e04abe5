"""DoReMi online: group DRO on the excess loss over a reference model (Xie et al., arXiv 2305.10429).

As in the authors' code (``sangmichaelxie/doremi: doremi/trainer.py``, ``update_domain_weights``): with ``l_k`` the
mean, over the tokens of source ``k``, of ``max(loss - reference loss, 0)``, and the last value where the source did
not come,

    w <- softmax(log w + step * l)
    w <- (1 - smoothing) * w + smoothing / K

Differences: there, a small proxy is trained so at every batch, its loss weighted by ``w`` under uniform sampling, and
the average of ``w`` serves a second run; here the model itself is trained, sampled by ``w``, and one update covers the
batches of an interval (``interval: 1ba`` is the paper's). A source counts 0 until it has come for the first time.

Cost: a forward pass of the reference over every training batch, a third of a step where it is as large as the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import REFERENCE, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, exponentiated, from_names

__all__ = ["DoReMiStrategy"]

_VERSION = 1
_KEY = "algorithms.online_mixing.doremi"


class DoReMiStrategy:
    """Moves weight to the sources that the model is furthest behind the reference on.

    Args:
        step: size of the update.
        smoothing: share of the uniform mixture that is mixed in.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "doremi"
    needs: ClassVar[frozenset[str]] = frozenset({REFERENCE})

    def __init__(self, step: float = 1.0, smoothing: float = 1e-3) -> None:
        if not step > 0:
            raise UserError(f"{_KEY}.step: expected a positive number, found {step}.")
        if not 0 <= smoothing <= 1:
            raise UserError(f"{_KEY}.smoothing: expected a number from 0 to 1, found {smoothing}.")
        self.step = step
        self.smoothing = smoothing

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._excess = np.zeros(len(sources))

    def propose(self, signals: Signals) -> Array | None:
        if signals.excess_losses is None:
            return None
        self._excess = np.where(np.isfinite(signals.excess_losses), signals.excess_losses, self._excess)
        wish = exponentiated(signals.sampling_weights, self.step * self._excess)
        return (1 - self.smoothing) * wish + self.smoothing / len(wish)

    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, "excess": by_name(self._names, self._excess)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._excess = from_names(self._names, state["excess"])
