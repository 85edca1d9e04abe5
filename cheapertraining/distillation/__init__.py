"""A student learns from a teacher: losses from logits, hidden states and stored targets, without Composer."""

from cheapertraining.distillation.chunked import chunked_distillation_loss
from cheapertraining.distillation.divergences import DIVERGENCES, Divergence
from cheapertraining.distillation.losses import (
    DistillationLoss,
    Statistics,
    distillation_loss,
    divergence_of_logits,
    shifted_mask,
    token_mean,
)
from cheapertraining.distillation.sparse import renormalized, sample_targets, top_k_targets
from cheapertraining.distillation.targets import (
    DenseTargets,
    HiddenTargets,
    OutputHead,
    SampledTargets,
    Targets,
    TopKTargets,
)

__all__ = [
    "DIVERGENCES",
    "DenseTargets",
    "DistillationLoss",
    "Divergence",
    "HiddenTargets",
    "OutputHead",
    "SampledTargets",
    "Statistics",
    "Targets",
    "TopKTargets",
    "chunked_distillation_loss",
    "distillation_loss",
    "divergence_of_logits",
    "renormalized",
    "sample_targets",
    "shifted_mask",
    "token_mean",
    "top_k_targets",
]
