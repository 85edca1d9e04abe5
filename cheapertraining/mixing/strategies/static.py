"""Keep the weights that the run began with: the baseline that every other strategy is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cheapertraining.mixing.signals import Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless

__all__ = ["StaticStrategy"]


class StaticStrategy(Stateless):
    """Never wishes for anything, so the configured weights stay as they are, whatever the constraints say."""

    name: ClassVar[str] = "static"
    needs: ClassVar[frozenset[str]] = frozenset()

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        """Nothing to prepare."""

    def propose(self, signals: Signals) -> Array | None:
        return None
