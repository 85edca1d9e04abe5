"""A student learns from a teacher: losses from logits, hidden states and stored targets, without Composer.

Teachers and the algorithm need Transformers or Composer; they are loaded when first asked for.
"""

from importlib import import_module
from typing import Any

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

_HOMES = {
    name: f"cheapertraining.distillation.{home}"
    for home, names in {
        "teacher": ("TeacherWrapper",),
        "cached": ("CachedTeacher",),
        "own_teacher": ("AdapterOffTeacher", "AverageTeacher"),
        "algorithm": ("Distillation", "OnPolicy"),
        "cache_job": ("CacheJob",),
        "caching": ("cache_teacher",),
        "layers": ("HiddenMatch", "LayerLosses", "RelationMatch"),
        "schedules": ("Ramp",),
    }.items()
    for name in names
}
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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
