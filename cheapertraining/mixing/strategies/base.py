"""What strategies share: multiplicative updates, states by name, and having no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cheapertraining.data.plan import carried_over
from cheapertraining.mixing.signals import Array

__all__ = ["Stateless", "by_name", "exponentiated", "from_names", "weights_from_names"]

_VERSION = 1


class Stateless:
    """State of a strategy that decides from its settings and the signals alone: none."""

    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take over: the settings are the run's own."""


def exponentiated(weights: Array, exponents: Array) -> Array:
    """``w_k * exp(x_k) / sum_j w_j * exp(x_j)``; a weight of 0 stays 0, whatever its exponent."""
    alive = weights > 0
    scaled = np.where(alive, weights, 0.0) * np.exp(np.where(alive, exponents - exponents[alive].max(), -np.inf))
    return np.asarray(scaled / scaled.sum())


def by_name(names: Sequence[str], values: Array) -> dict[str, float | None]:
    """JSON-able; a number that is not finite becomes None."""
    return {name: float(value) if np.isfinite(value) else None for name, value in zip(names, values, strict=True)}


def from_names(names: Sequence[str], values: Mapping[str, float | None], *, new: float | None = None) -> Array:
    """The inverse of :func:`by_name`; None becomes NaN.

    Args:
        names: of the sources now.
        values: of the sources then.
        new: for a source that ``values`` does not have; default the mean over those that it has, which prefers none.
    """
    known = {name: np.nan if values[name] is None else float(values[name] or 0.0) for name in names if name in values}
    if len(known) < len(names) and new is None:
        finite = [value for value in known.values() if np.isfinite(value)]
        new = float(np.mean(finite)) if finite else 0.0
    return np.array([known.get(name, new) for name in names], np.float64)


def weights_from_names(names: Sequence[str], values: Mapping[str, float | None], prior: Array) -> Array:
    """Weights by name; a new source has its share of ``prior`` and the others the rest, see ``carried_over``."""
    saved = {name: float(value or 0.0) for name, value in values.items()}
    return np.array(list(carried_over(saved, dict(zip(names, prior.tolist(), strict=True))).values()))
