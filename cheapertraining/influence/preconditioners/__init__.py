"""Preconditioners: ``H^-1 u`` for a probe's direction ``u``.

``g_i^T H^-1 v = <g_i, H^-1 v>``: whatever curvature an estimator divides by, it changes the few directions of probes
and never the work done for each sample. What each of them takes for ``H`` is said in its module:

    adam        the square root of Adam's second moments
    datainf     per tensor, the mean over samples of damped rank-one inverses; and its limit, one scale per tensor
    kronecker   K-FAC and EK-FAC, per tensor
    krylov      the damped Gauss-Newton matrix itself, without forming it: slow references
"""

from cheapertraining.influence.preconditioners.adam import Adam
from cheapertraining.influence.preconditioners.base import Identity, Preconditioner
from cheapertraining.influence.preconditioners.datainf import DataInf, LayerScale
from cheapertraining.influence.preconditioners.fitted import FITTED, Fitted, make_fitted
from cheapertraining.influence.preconditioners.kronecker import EKFAC, KFAC
from cheapertraining.influence.preconditioners.krylov import GGNConjugateGradient, LiSSA
from cheapertraining.influence.preconditioners.upkeep import Schedule

__all__ = [
    "EKFAC",
    "FITTED",
    "KFAC",
    "Adam",
    "DataInf",
    "Fitted",
    "GGNConjugateGradient",
    "Identity",
    "LayerScale",
    "LiSSA",
    "Preconditioner",
    "Schedule",
    "make_fitted",
]
