"""Numbers that change during a run: the share of the divergence, the temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Ramp", "RampShape"]

RampShape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Ramp:
    """From one number to another, then constant.

    Attributes:
        first: at the beginning.
        last: at the end and afterwards.
        shape: linear, or half a cosine (slow at both ends).
    """

    first: float
    last: float
    shape: RampShape = "linear"

    def at(self, done: float) -> float:
        """The number when this share of the way is behind; more than 1 is the end."""
        share = min(1.0, max(0.0, done))
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.first + (self.last - self.first) * share
