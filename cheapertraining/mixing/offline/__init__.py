"""Mixtures from finished runs: a table of small runs, a law or a regressor fitted to it, the mixture it proposes.

Nothing here trains: ``swarm`` says which runs to make, ``collected`` reads them, ``table`` holds them, ``law`` and
``boosting`` predict losses from weights, ``fidelity`` says how far to believe them, ``optimum`` chooses the weights.
"""

from cheapertraining.mixing.offline.boosting import BoostedTrees, best_simulated, fit_boosted_trees
from cheapertraining.mixing.offline.fidelity import (
    Bootstrap,
    CrossValidation,
    bootstrap,
    cross_validate,
    pearson,
    spearman,
)
from cheapertraining.mixing.offline.law import LogLinearLaw, fit_law
from cheapertraining.mixing.offline.optimum import Optimum, mixture_bounds, optimal_mixture
from cheapertraining.mixing.offline.proposal import ProposedMixture, propose_by_laws, propose_by_trees
from cheapertraining.mixing.offline.swarm import sample_mixtures
from cheapertraining.mixing.offline.table import RunTable, read_table, read_two_tables

__all__ = [
    "BoostedTrees",
    "Bootstrap",
    "CrossValidation",
    "LogLinearLaw",
    "Optimum",
    "ProposedMixture",
    "RunTable",
    "best_simulated",
    "bootstrap",
    "cross_validate",
    "fit_boosted_trees",
    "fit_law",
    "mixture_bounds",
    "optimal_mixture",
    "pearson",
    "propose_by_laws",
    "propose_by_trees",
    "read_table",
    "read_two_tables",
    "sample_mixtures",
    "spearman",
]
