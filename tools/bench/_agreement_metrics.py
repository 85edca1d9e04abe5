"""How well scores agree with what retraining shows: rank correlations, areas under curves, and their errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = ["area_under_curve", "correlation", "mean_and_error", "spearman"]

Float64 = NDArray[np.float64]


def correlation(a: Float64, b: Float64) -> Float64:
    """Pearson's, of each column with the same column, `[Q]`; NaN where a column does not vary."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    with np.errstate(invalid="ignore"):
        result: Float64 = (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return result


def spearman(a: Float64, b: Float64) -> Float64:
    """Rank correlation of each column with the same column, `[Q]`."""
    return correlation(rankdata(a, axis=0), rankdata(b, axis=0))


def area_under_curve(scores: Float64, positive: NDArray[np.bool_]) -> float:
    """Chance that a positive has a larger score than a negative, ties counting half."""
    count = int(positive.sum())
    below = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return float(below / (count * (len(scores) - count)))


def mean_and_error(seeds: Sequence[Float64], draws: int = 1000) -> tuple[float, float | None]:
    """Mean over seeds of the means over queries, and its standard error.

    Over two seeds and more it comes from the differences between them, which hold all randomness there is: data,
    queries, initial weights, subsets. Of one seed it is that of a bootstrap over the queries; None for a single value.
    """
    means = np.array([values.mean() for values in seeds])
    if len(means) > 1:
        return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5)
    values = seeds[0]
    if len(values) == 1:
        return float(means[0]), None
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return float(means[0]), float(values[picks].mean(axis=1).std())
