"""CheaperTraining: documents become token shards, a plan mixes them into batches, training changes the plan.

The names that other packages' training loops import from here are loaded when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cheapertraining.data import DatasetMixture, MixedDataset, PackedDataset, get_loader
    from cheapertraining.influence import (
        DataInfCalculator,
        DiscriminativeGradientExtractor,
        InfluenceAwareOptimizer,
        InfluenceConfig,
    )
    from cheapertraining.mixing import MixtureWeightCalculator, create_mixture_calculator

__version__ = "0.1.0"

_HOMES = {
    "DataInfCalculator": "cheapertraining.influence",
    "DatasetMixture": "cheapertraining.data",
    "DiscriminativeGradientExtractor": "cheapertraining.influence",
    "InfluenceAwareOptimizer": "cheapertraining.influence",
    "InfluenceConfig": "cheapertraining.influence",
    "MixedDataset": "cheapertraining.data",
    "MixtureWeightCalculator": "cheapertraining.mixing",
    "PackedDataset": "cheapertraining.data",
    "create_mixture_calculator": "cheapertraining.mixing",
    "get_loader": "cheapertraining.data",
}

__all__ = [
    "DataInfCalculator",
    "DatasetMixture",
    "DiscriminativeGradientExtractor",
    "InfluenceAwareOptimizer",
    "InfluenceConfig",
    "MixedDataset",
    "MixtureWeightCalculator",
    "PackedDataset",
    "create_mixture_calculator",
    "get_loader",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
