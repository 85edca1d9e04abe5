"""Weights that follow a line drawn beforehand: piecewise linear over tokens (or batches) between given
points.

Between two knots ``(x_a, w_a)`` and ``(x_b, w_b)``: ``w(x) = w_a + (x - x_a) / (x_b - x_a) * (w_b - w_a)``.
At a knot the weights are the knot's to the last bit; before the first and behind the last knot they stay
constant. A curriculum in stages is two knots at nearly the same place.

A decision counts from its effective batch on, so the line is read there; between decisions the weights stand
still. Set ``interval: 1ba`` to follow the line batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.signals import Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless

__all__ = ["ScheduleStrategy"]

_KEY = "algorithms.online_mixing.schedule.points"
_UNITS = ("tokens", "batch")


class ScheduleStrategy(Stateless):
    """Follows given points.

    Args:
        points: each a mapping with ``weights`` (by source name, any scale; sources not named get 0) and
            either ``tokens`` (trained on so far) or ``batch``, the same one in all points, rising.

    Raises:
        UserError: no points, mixed units, places that do not rise; at ``reset``, weights that do not fit the
        sources.
    """

    name: ClassVar[str] = "schedule"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        if not points:
            raise UserError(f"{_KEY}: expected at least one point such as {{tokens: 0, weights: {{…}}}}, found none.")
        units = {unit for point in points for unit in _UNITS if point.get(unit) is not None}
        if len(units) != 1 or any(sum(point.get(unit) is not None for unit in _UNITS) != 1 for point in points):
            raise UserError(f"{_KEY}: expected either `tokens` in every point or `batch` in every point.")
        self.unit = units.pop()
        self._places = [float(point[self.unit]) for point in points]
        for before, after in zip(self._places, self._places[1:], strict=False):
            if not before < after:
                raise UserError(f"{_KEY}: expected rising {self.unit}, found {after:.0f} after {before:.0f}.")
        self._given = [dict(point["weights"]) for point in points]
        self._knots: Array = np.zeros((0, 0))

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        names = [source.name for source in sources]
        rows = []
        for place, given in zip(self._places, self._given, strict=True):
            where = f"{_KEY} ({self.unit} {place:.0f})"
            for name, weight in given.items():
                if name not in names:
                    raise UserError(f"{where}: no source is named '{name}' ({', '.join(names)}).{nearest(name, names)}")
                if not (math.isfinite(weight) and weight >= 0):
                    raise UserError(f"{where}: expected a weight of at least 0 for '{name}', found {weight}.")
            total = math.fsum(given.values())
            if not total > 0:
                raise UserError(f"{where}: expected a positive weight, found none.")
            rows.append([given.get(name, 0.0) / total for name in names])
        self._knots = np.array(rows)

    def propose(self, signals: Signals) -> Array | None:
        return self.weights_at(signals.effective_tokens if self.unit == "tokens" else signals.effective_batch)

    def weights_at(self, place: float) -> Array:
        """Weights ``[K]`` at so many tokens (or batches)."""
        after = int(np.searchsorted(self._places, place, side="right"))
        if after == 0:
            return np.array(self._knots[0])
        if after == len(self._places):
            return np.array(self._knots[-1])
        start, end = self._places[after - 1], self._places[after]
        share = (place - start) / (end - start)
        weights: Array = self._knots[after - 1] + share * (self._knots[after] - self._knots[after - 1])
        return weights
