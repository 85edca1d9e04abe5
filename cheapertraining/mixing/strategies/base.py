"""What strategies share: multiplicative updates, states by name, and having no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cheapertraining.mixing.signals import Array

__all__ = ["Stateless", "by_name", "exponentiated", "from_names"]

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


def from_names(names: Sequence[str], values: Mapping[str, float | None]) -> Array:
    """The inverse of :func:`by_name`; None becomes NaN."""
    return np.array([np.nan if values[name] is None else float(values[name] or 0.0) for name in names])
