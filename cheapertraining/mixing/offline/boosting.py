"""RegMix's way: gradient-boosted trees from weights to loss, and the average of the best simulated mixtures.

Liu et al. 2024, arXiv 2407.01492: LightGBM with 1,000 trees at learning rate 0.01, a model a target; many mixtures are
drawn around the prior, and the proposal is the mean of those with the least predicted loss. Here the trees are
scikit-learn's (histogram-based, as LightGBM's are). They are the baseline for the law. On RegMix's tables they rank
runs of the size they were fitted to better from 128 runs on, and runs of 1B parameters worse for Pile-CC (0.90 against
0.98 from 64 runs) but slightly better on average over all 13 targets (0.912 against 0.905): see
``tools/bench/mixing_law.py``.

A leaf holds ``clip(N / 12, 5, 20)`` runs at least: 20 is LightGBM's default, with which 34 runs give no tree at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import Array

__all__ = ["BoostedTrees", "best_simulated", "fit_boosted_trees"]

_TREES, _LEARNING_RATE = 1000, 0.01


@dataclass(frozen=True)
class BoostedTrees:
    """A fitted scikit-learn regressor of one target."""

    model: Any

    def predict(self, weights: Array) -> Array:
        """Losses ``[N]`` of mixtures ``[N, K]``."""
        return np.asarray(self.model.predict(weights), dtype=np.float64)


def fit_boosted_trees(weights: Array, losses: Array, *, seed: int = 0) -> BoostedTrees:
    """Fit the trees of one target.

    Args:
        weights: ``[N, K]``.
        losses: ``[N]``.
        seed: of scikit-learn's binning, which draws only beyond 200,000 runs.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        ensemble = importlib.import_module("sklearn.ensemble")
    except ImportError as error:
        raise UserError(
            "method regmix: needs scikit-learn, which is not installed. `pip install scikit-learn`, or use method law."
        ) from error
    model = ensemble.HistGradientBoostingRegressor(
        max_iter=_TREES,
        learning_rate=_LEARNING_RATE,
        min_samples_leaf=int(np.clip(len(losses) // 12, 5, 20)),
        early_stopping=False,
        random_state=seed,
    )
    return BoostedTrees(model.fit(weights, losses))


def best_simulated(
    models: Sequence[BoostedTrees], simulated: Array, *, best: int = 100, target_weights: Array | None = None
) -> tuple[Array, Array]:
    """The mean of the simulated mixtures with the least predicted loss.

    Args:
        models: one a target, ``[M]``.
        simulated: ``[S, K]``, all of them allowed; so is their mean, as bounds are convex.
        best: how many to average.
        target_weights: ``[M]``, any scale; None: equal.

    Returns:
        The mean ``[K]`` and those averaged ``[best, K]``, best first.
    """
    v = np.ones(len(models)) if target_weights is None else target_weights
    predicted = np.average([model.predict(simulated) for model in models], axis=0, weights=v)
    chosen = simulated[np.argsort(predicted, kind="stable")[:best]]
    mean: Array = chosen.mean(axis=0)
    return mean / mean.sum(), chosen
