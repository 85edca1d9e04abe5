"""From a table of runs to the mixture for the next one: by laws and their optimum, or by boosted trees as in RegMix.

What ``tools/fit_mixing_law.py`` reports and the strategies ``mixing_law`` and ``regmix`` train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.offline.boosting import BoostedTrees, best_simulated, fit_boosted_trees
from cheapertraining.mixing.offline.law import LogLinearLaw, fit_law
from cheapertraining.mixing.offline.optimum import optimal_mixture
from cheapertraining.mixing.offline.swarm import sample_mixtures
from cheapertraining.mixing.offline.table import RunTable
from cheapertraining.mixing.signals import Array

__all__ = ["ProposedMixture", "propose_by_laws", "propose_by_trees", "weighted_targets"]

_SIMULATED, _AVERAGED = 20_000, 100


@dataclass(frozen=True)
class ProposedMixture:
    """A fit and the mixture that it calls best.

    Attributes:
        weights: ``[K]``, they sum to 1.
        models: the fit of each target, ``[M]``.
        target_weights: ``[M]``, they sum to 1.
        candidates: ``[N, K]``, the simulated mixtures whose mean ``weights`` is; of trees alone.
    """

    weights: Array
    models: Sequence[LogLinearLaw] | Sequence[BoostedTrees]
    target_weights: Array
    candidates: Array | None = None

    def predict(self, mixture: Array) -> float:
        """Weighted mean of the targets' predicted losses at a mixture ``[K]``."""
        losses = [float(model.predict(mixture[None])[0]) for model in self.models]
        return float(np.average(losses, weights=self.target_weights))


def propose_by_laws(
    table: RunTable,
    prior: Array,
    bounds: tuple[Array, Array],
    *,
    kl: float = 0.1,
    target_weights: Array | None = None,
) -> ProposedMixture:
    """Log-linear laws and their optimum; see :mod:`~.optimum`.

    Args:
        table: of the targets that count.
        prior: ``[K]``, sums to 1.
        bounds: lower and upper, ``[K]``.
        kl: price of a nat from the prior, in loss.
        target_weights: ``[M]``, any scale; None: equal.
    """
    v = _normalized(target_weights, table)
    laws = [fit_law(table.weights, table.losses[:, m]) for m in range(len(table.targets))]
    return ProposedMixture(optimal_mixture(laws, prior, *bounds, kl=kl, target_weights=v).weights, laws, v)


def propose_by_trees(
    table: RunTable,
    prior: Array,
    bounds: tuple[Array, Array],
    *,
    target_weights: Array | None = None,
    seed: int = 0,
) -> ProposedMixture:
    """RegMix: boosted trees, and the mean of the best of many mixtures drawn around the prior. Arguments as above.

    Args:
        seed: of the trees and of the mixtures drawn.
    """
    v = _normalized(target_weights, table)
    models = [fit_boosted_trees(table.weights, table.losses[:, m], seed=seed) for m in range(len(table.targets))]
    lower, upper = bounds
    simulated = sample_mixtures(prior, _SIMULATED, lower=lower, upper=upper, seed=seed)
    weights, chosen = best_simulated(models, simulated, best=_AVERAGED, target_weights=v)
    return ProposedMixture(weights, models, v, chosen)


def weighted_targets(table: RunTable, targets: Mapping[str, float] | None) -> tuple[RunTable, Array]:
    """The table of the targets that are named, and their weights; None: all, equally.

    Raises:
        UserError: an unknown target, or a weight that is not positive.
    """
    if not targets:
        return table, np.ones(len(table.targets))
    for name, weight in targets.items():
        if not weight > 0:
            raise UserError(f"target '{name}': expected a positive weight, found {weight}.")
    return table.of_targets(list(targets)), np.array(list(targets.values()), np.float64)


def _normalized(target_weights: Array | None, table: RunTable) -> Array:
    v = np.ones(len(table.targets)) if target_weights is None else target_weights
    return np.asarray(v / v.sum())
