"""GRAPE: several probes, those that improve least first (Fan et al., arXiv 2505.20380).

With ``<grad l_n, g_k>`` what source ``k`` does to the loss ``l_n`` of probe ``n``, and ``m`` batches since the last
decision,

    r_n  = sum_k w_k * <grad l_n, g_k> / l_n               relative improvement of the probe in a step of unit length
    z_n <- z_n * exp(-m * lr * r_n / mu_probes) / Z        probes that lag behind count more
    w_k <- w_k * exp(m * lr * sum_n z_n * <grad l_n, g_k> / mu_weights) / Z

the minimax of group DRO over the probes, by mirror descent on both sides. The rule as remembered in our notes; the
paper may take the improvement that was realized instead of the first-order one.

Cost: an ``INFLUENCE`` measurement with metric ``raw`` a decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import INFLUENCE, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, exponentiated

__all__ = ["GRAPEStrategy"]

_VERSION = 1


class GRAPEStrategy:
    """Moves weight to what helps the probes that improve least.

    Args:
        mu_weights: holds the sources' weights back; smaller moves them faster.
        mu_probes: likewise for the probes' weights.

    Raises:
        UserError: a value out of range; at ``propose``, a measurement of all probes combined.
    """

    name: ClassVar[str] = "grape"
    needs: ClassVar[frozenset[str]] = frozenset({INFLUENCE})

    def __init__(self, mu_weights: float = 0.05, mu_probes: float = 0.05) -> None:
        for name, value in (("mu_weights", mu_weights), ("mu_probes", mu_probes)):
            if not value > 0:
                raise UserError(f"algorithms.online_mixing.grape.{name}: expected a positive number, found {value}.")
        self.mu_weights = mu_weights
        self.mu_probes = mu_probes

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._last_batch: int | None = None
        self.probe_importance: dict[str, float] = {}
        self._probes: dict[str, float | None] = {}

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.influence
        if measured is None or not (np.isfinite(measured.scores).all() and np.isfinite(measured.probe_losses).all()):
            return None
        if measured.directions != measured.probes:
            raise UserError("strategy 'grape': expected one direction for each probe, found them combined.")
        batches = 1 if self._last_batch is None else signals.batch - self._last_batch
        self._last_batch = signals.batch
        step = batches * (1.0 if signals.learning_rate is None else signals.learning_rate)
        # Probes may come and go between runs.
        known = zip(measured.probes, measured.probe_weights, strict=True)
        urgency = np.array([self._probes.get(name) or weight for name, weight in known])
        improvement = measured.scores @ signals.sampling_weights / np.maximum(measured.probe_losses, 1e-12)
        urgency = exponentiated(urgency, -step * improvement / self.mu_probes)
        self._probes = by_name(measured.probes, urgency)
        self.probe_importance = dict(zip(measured.probes, urgency.tolist(), strict=True))
        return exponentiated(signals.sampling_weights, step * (urgency @ measured.scores) / self.mu_weights)

    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, "last_batch": self._last_batch, "probes": dict(self._probes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last_batch = None if state["last_batch"] is None else int(state["last_batch"])
        self._probes = dict(state["probes"])
