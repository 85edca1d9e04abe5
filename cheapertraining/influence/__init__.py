"""What does training on a sample, or on a source, do to the loss on a probe? Positive scores help."""

from cheapertraining.influence.losses import per_sample_loss, token_losses
from cheapertraining.influence.probes import ProbeBank, adam_direction
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.forward import LookAheadEstimator, directional_derivatives

__all__ = [
    "LookAheadEstimator",
    "ProbeBank",
    "SourceInfluence",
    "adam_direction",
    "directional_derivatives",
    "per_sample_loss",
    "token_losses",
]
