"""What does training on a sample, or on a source, do to the loss on a probe? Positive scores help.

Names that live in ``cheapertraining.mixing``, which is built on this package, are handed on when they are asked for.
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
from cheapertraining.influence.scorers.hook import hook_scores
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer
from cheapertraining.influence.scorers.sources import SourceEstimator
from cheapertraining.influence.settings import InfluenceConfig

if TYPE_CHECKING:
    from cheapertraining.mixing import (
        InfluenceTracker,
        MixtureWeightCalculator,
        create_influence_tracker,
        create_mixture_calculator,
    )

_OF_MIXING = ("InfluenceTracker", "MixtureWeightCalculator", "create_influence_tracker", "create_mixture_calculator")

__all__ = [
    "DataInfCalculator",
    "DiscriminativeGradientExtractor",
    "FusedScorer",
    "InfluenceAwareOptimizer",
    "InfluenceCalculator",
    "InfluenceConfig",
    "InfluenceTracker",
    "MicrobatchScorer",
    "MixtureWeightCalculator",
    "ProbeBank",
    "SampleScores",
    "SourceEstimator",
    "SourceInfluence",
    "create_influence_tracker",
    "create_mixture_calculator",
    "forward_scores",
    "hook_scores",
    "per_sample_loss",
    "token_losses",
]


def __getattr__(name: str) -> Any:
    if name in _OF_MIXING:
        return getattr(import_module("cheapertraining.mixing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
