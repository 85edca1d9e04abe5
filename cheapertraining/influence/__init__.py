"""What does training on a sample, or on a source, do to the loss on a probe? Positive scores help.

Names that live in ``cheapertraining.mixing``, which is built on this package, and the one that brings Composer with it
are loaded when they are asked for. Curvatures are in ``preconditioners``, scoring of whole shards in ``offline``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cheapertraining.influence.calculator import DataInfCalculator, InfluenceCalculator
from cheapertraining.influence.gradients import DiscriminativeGradientExtractor
from cheapertraining.influence.losses import per_sample_loss, token_losses
from cheapertraining.influence.optimizer import InfluenceAwareOptimizer
from cheapertraining.influence.probes import ProbeBank
from cheapertraining.influence.scorers import SampleScores, SourceInfluence
from cheapertraining.influence.scorers.forward import forward_scores
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.influence.scorers.hook import hook_gram, hook_norms, hook_scores
from cheapertraining.influence.scorers.loop import loop_scores
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer
from cheapertraining.influence.scorers.sources import SourceEstimator
from cheapertraining.influence.selection import above_threshold, greats, top_fraction
from cheapertraining.influence.settings import InfluenceConfig

if TYPE_CHECKING:
    from cheapertraining.influence.algorithm import InfluenceScores
    from cheapertraining.mixing import (
        InfluenceTracker,
        MixtureWeightCalculator,
        create_influence_tracker,
        create_mixture_calculator,
    )

_MIXING = "cheapertraining.mixing"
_HOMES = {
    "InfluenceScores": "cheapertraining.influence.algorithm",
    "InfluenceTracker": _MIXING,
    "MixtureWeightCalculator": _MIXING,
    "create_influence_tracker": _MIXING,
    "create_mixture_calculator": _MIXING,
}

__all__ = [
    "DataInfCalculator",
    "DiscriminativeGradientExtractor",
    "FusedScorer",
    "InfluenceAwareOptimizer",
    "InfluenceCalculator",
    "InfluenceConfig",
    "InfluenceScores",
    "InfluenceTracker",
    "MicrobatchScorer",
    "MixtureWeightCalculator",
    "ProbeBank",
    "SampleScores",
    "SourceEstimator",
    "SourceInfluence",
    "above_threshold",
    "create_influence_tracker",
    "create_mixture_calculator",
    "forward_scores",
    "greats",
    "hook_gram",
    "hook_norms",
    "hook_scores",
    "loop_scores",
    "per_sample_loss",
    "token_losses",
    "top_fraction",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
