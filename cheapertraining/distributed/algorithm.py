"""Gradient clipping for Composer's Trainer under every layout."""

from __future__ import annotations

import torch
from composer.algorithms import GradientClipping as ComposerGradientClipping
from composer.core import Event, State
from composer.loggers import Logger

from cheapertraining.distributed.clipping import clip_gradient_norm

__all__ = ["GradientClipping"]


class GradientClipping(ComposerGradientClipping):
    """Composer's by norm, where the norm is that of all ranks' gradients together.

    Composer looks at its own configuration to tell whether a model is sharded, which a model that comes sharded to it
    has not; the name is Composer's, as it is what checkpoints know the algorithm by.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__(clipping_type="norm", clipping_threshold=threshold)
        self.norm: torch.Tensor | None = None
        """Of the batch at hand, before clipping; on the device, so that nothing waits for it."""

    def __repr__(self) -> str:
        # Composer saves it; without an address it is the same on every rank and in every run.
        return f"{type(self).__name__}({self.clipping_threshold})"

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip, after the backward passes of a batch."""
        if event == Event.AFTER_TRAIN_BATCH:
            self.norm = clip_gradient_norm(state.model, self.clipping_threshold)
