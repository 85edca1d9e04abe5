"""Scorers: inner products of training gradients with fixed directions.

Sign: positive helps. Unit: nats by which a probe's loss falls for one unit of learning rate, to first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["COMBINED", "SampleLosses", "SampleScores", "SourceInfluence"]

Float64 = NDArray[np.float64]


COMBINED = "combined"
"""Name of the one direction that stands for all probes together."""


@dataclass(frozen=True)
class SampleLosses:
    """Losses of ``N`` units (samples or documents).

    Attributes:
        losses: float64 ``[N]``, nats summed over each unit's tokens; NaN where the scorer does not see them.
        tokens: int64 ``[N]``, loss-counting tokens of each unit.
    """

    losses: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class SampleScores:
    """What ``N`` units (samples or documents) do along ``K`` directions.

    Attributes:
        scores: float64 ``[N, K]``, ``<gradient of the unit's summed loss, direction>``.
        tokens: int64 ``[N]``, loss-counting tokens of each unit.
        losses: float64 ``[N]``, nats summed over each unit's tokens; NaN where the scorer does not see them.
        squared_norms: float64 ``[N]``, of the gradients of the units' summed losses, where they were asked for.
    """

    scores: torch.Tensor
    tokens: torch.Tensor
    losses: torch.Tensor
    squared_norms: torch.Tensor | None = None


@dataclass(frozen=True)
class SourceInfluence:
    """What training on each of ``K`` sources would do to ``P`` probes; the same numbers on every rank.

    Attributes:
        sources: names, ``[K]``.
        directions: names of the directions scored, ``[D]``: the probes, or ``(COMBINED,)``.
        scores: ``[D, K]``, ``<mean gradient of the source, direction>``.
        errors: ``[D, K]``, standard errors of the scores over the source's samples.
        samples: of each source, behind every score.
        probes: names, ``[P]``.
        probe_weights: ``[P]``, weight of each probe's loss in the objective, sum 1.
        probe_losses: ``[P]``, token-mean loss on the probe's window, nats.
        probe_changes: ``[P]``, change of the loss since the last measurement, over the samples common to both
            windows; NaN where there are none.
        seconds: wall time that the measurement took on this rank.
    """

    sources: tuple[str, ...]
    directions: tuple[str, ...]
    scores: Float64
    errors: Float64
    samples: int
    probes: tuple[str, ...]
    probe_weights: Float64
    probe_losses: Float64
    probe_changes: Float64
    seconds: float

    @property
    def direction_weights(self) -> Float64:
        """``[D]``, weight of each direction in the objective, sum 1."""
        return np.ones(1) if self.directions == (COMBINED,) else self.probe_weights

    @property
    def direction_changes(self) -> Float64:
        """``[D]``, ``probe_changes`` along the directions."""
        combined = self.directions == (COMBINED,)
        return np.array([self.probe_weights @ self.probe_changes]) if combined else self.probe_changes
