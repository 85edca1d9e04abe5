"""Aioli: measure what each source does to each probe by training on it, then move (Chen et al., arXiv 2411.05735).

Rounds of two parts, as in ``HazyResearch/aioli: trainer/aioli_trainer.py``. First a :mod:`sweep
<cheapertraining.mixing.strategies.sweep>` over mixtures that lean on one source each gives ``A``: over a stretch,
``L_i`` falls by ``sum_k A_ik w_k``. Then

    A   <- (A - min(A, 0)) / sum(A)                    shifted only where an entry is below 0
    A   <- ema * A_last + (1 - ema) * A                where ``ema`` is above 0, from the second round on
    w_k <- w_k * exp(eta * sum_i P v_i A_ik) / Z       of the last round's weights; with ema, of the initial ones

with ``v`` the probes' weights in the objective (``P v_i = 1`` in the paper), and the run trains on ``w`` for ``hold``
decisions. Differences: the start is the run's own mixture instead of the uniform one; ``A`` is solved for with the
shares that were drawn; losses are those of ``probe_samples`` fixed samples of each probe instead of a whole
validation set, so stretches must be long enough for the drops to stand out.

Cost of a round: ``rounds * K * stretch`` decisions' batches of training near one source, of ``rounds * K * stretch +
hold`` (plus the lag of new weights), and forward passes over ``P * probe_samples`` samples at each decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import PROBE_LOSSES, Array, ProbeReading, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, exponentiated, from_names, weights_from_names
from cheapertraining.mixing.strategies.sweep import Sweep, permuted

__all__ = ["AioliStrategy"]

_VERSION = 1
_KEY = "algorithms.online_mixing.aioli"


class AioliStrategy:
    """Alternates between measuring and training.

    Args:
        eta: size of an update.
        one_hot: share of the source that a stretch leans on.
        rounds: stretches of each source in a sweep.
        stretch: decisions that a stretch lasts.
        hold: decisions between two sweeps.
        ema: how much of the old ``A`` stays.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "aioli"
    needs: ClassVar[frozenset[str]] = frozenset({PROBE_LOSSES})

    def __init__(
        self,
        eta: float = 0.2,
        one_hot: float = 0.75,
        rounds: int = 1,
        stretch: int = 1,
        hold: int = 8,
        ema: float = 0.0,
    ) -> None:
        if not eta > 0:
            raise UserError(f"{_KEY}.eta: expected a positive number, found {eta}.")
        if not 0 < one_hot <= 1:
            raise UserError(f"{_KEY}.one_hot: expected a share above 0 and up to 1, found {one_hot}.")
        for name, value in (("rounds", rounds), ("stretch", stretch), ("hold", hold)):
            if value < 1:
                raise UserError(f"{_KEY}.{name}: expected at least 1, found {value}.")
        if not 0 <= ema < 1:
            raise UserError(f"{_KEY}.ema: expected a number from 0 to below 1, found {ema}.")
        self.eta, self.one_hot = eta, one_hot
        self.rounds, self.stretch, self.hold = rounds, stretch, hold
        self.ema = ema

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._start = prior
        self._weights = prior
        self._gains: Array | None = None  # The averaged ``sum_i P v_i A_ik``.
        self._sweeps = 0
        self._held = 0
        self._sweep: Sweep | None = None

    def propose(self, signals: Signals) -> Array | None:
        reading = signals.probe_losses
        if reading is None or not np.isfinite(reading.losses).all():
            return None
        if self._sweep is None:
            if self._sweeps and self._held < self.hold:
                self._held += 1
                return self._weights
            self._sweep = Sweep(permuted(len(self._names), self.rounds, self._sweeps), self.stretch)
            self._sweeps, self._held = self._sweeps + 1, 0
        self._sweep.observe(signals, reading)
        if self._sweep.done(signals):
            self._update(self._sweep, reading)
            self._sweep, self._held = None, 1
            return self._weights
        wish = self._sweep.wish(signals, self.one_hot)
        return self._weights if wish is None else wish

    def _update(self, sweep: Sweep, reading: ProbeReading) -> None:
        effects = sweep.solve()
        if effects is None:
            return
        effects = effects - min(float(effects.min()), 0.0)
        if not effects.sum() > 0:
            return
        gains = len(reading.probes) * reading.weights @ effects / effects.sum()
        if self.ema == 0:
            self._weights = exponentiated(self._weights, self.eta * gains)
            return
        self._gains = gains if self._gains is None else self.ema * self._gains + (1 - self.ema) * gains
        self._weights = exponentiated(self._start, self.eta * self._gains)

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "weights": by_name(self._names, self._weights),
            "gains": None if self._gains is None else by_name(self._names, self._gains),
            "sweeps": self._sweeps,
            "held": self._held,
            "sweep": None if self._sweep is None else self._sweep.state_dict(self._names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With other sources, a sweep begins at once: what was learnt says nothing of the new ones."""
        self._weights = weights_from_names(self._names, state["weights"], self._start)
        self._gains = None if state["gains"] is None else from_names(self._names, state["gains"])
        self._sweeps, self._held = int(state["sweeps"]), int(state["held"])
        if state["weights"].keys() != set(self._names):
            self._sweep, self._held = None, self.hold
            return
        self._sweep = None if state["sweep"] is None else Sweep.of(state["sweep"], self._names)
