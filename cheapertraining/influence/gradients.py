"""Gradients of single samples as a dense matrix, for comparisons and small models.

No estimator of this package needs one: they score along directions, and a matrix of samples by parameters of a real
model fits nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.model_access import to_device
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.scorers.hook import per_unit_gradients
from cheapertraining.influence.settings import InfluenceConfig

__all__ = ["DiscriminativeGradientExtractor"]


class DiscriminativeGradientExtractor:
    """Gradients of each sample's summed loss with respect to the embedding and the output layer.

    Args:
        model: what is trained.
        config: taken for the sake of callers that pass one; nothing in it matters here.

    Raises:
        UserError: no module, or one without trainable embedding and output layer.
    """

    def __init__(self, model: nn.Module, config: InfluenceConfig | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"DiscriminativeGradientExtractor: expected a torch.nn.Module, found {type(model)}.")
        self.model = model
        self.config = config
        self.parameters = select_parameters(model, "embedding_and_output")

    @property
    def gradient_dim(self) -> int:
        """Columns of the matrix, ``D``."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def compute_per_sample_gradients(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[N, D]`` on the model's device, for a batch with ``input_ids`` and ``labels`` of ``N`` rows.

        Leaves no trace: ``.grad``, ``requires_grad``, modes and random generators are as before.

        Raises:
            UserError: layers of an unknown kind, tokens outside the vocabulary.
        """
        parts: dict[str, torch.Tensor] = {}

        def keep(name: str, gradients: torch.Tensor) -> None:
            parts[name] = gradients.flatten(1).clone()

        placed = to_device(batch, next(iter(self.parameters.values())).device)
        per_unit_gradients(self.model, self.parameters, placed, keep)
        return torch.cat([parts[name] for name in self.parameters], dim=1)
