"""A run from a config (``train``), and small parts for training loops of one's own.

``train`` brings Composer with it, so it is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from cheapertraining.training.early_stopping import PlateauEarlyStopping
from cheapertraining.training.gradient_clipping import ZClip, ZClipStats

if TYPE_CHECKING:
    from cheapertraining.training.run import train

__all__ = ["PlateauEarlyStopping", "ZClip", "ZClipStats", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from cheapertraining.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
