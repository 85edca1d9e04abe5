"""Adam's second moments as a diagonal curvature (Kingma & Ba, arXiv 1412.6980; used so by LESS, arXiv 2402.04333)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.preconditioners.base import check_covered
from cheapertraining.influence.sharding import local

__all__ = ["Adam"]


class Adam:
    """``u / (sqrt(v / (1 - beta2**t)) + eps)`` with the optimizer's state as it is when directions are applied.

    With it, a score is what one unit of Adam's learning rate does to the probe (momentum and clipping aside). A
    parameter that the optimizer has no moments for has not been trained and gets the direction 0. State that is sharded
    over ranks is read on the spot, each rank its part; nothing is communicated.

    Args:
        parameters: by canonical name, as the optimizer has them.
        optimizer: Adam, AdamW or another that keeps ``exp_avg_sq`` (``max_exp_avg_sq`` with AMSGrad) and ``step``.
    """

    name: ClassVar[str] = "adam"

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters = dict(parameters)
        self._optimizer = optimizer

    def apply(self, directions: Directions) -> Directions:
        """See :class:`~cheapertraining.influence.preconditioners.Preconditioner`.

        Raises:
            UserError: the optimizer has no second moments for any of the parameters; directions over others.
        """
        check_covered("adam", directions, {name: local(p).shape for name, p in self._parameters.items()})
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        scaled, found = {}, False
        for name, direction in directions.tensors.items():
            parameter = self._parameters[name]
            state = self._optimizer.state.get(parameter, {})
            group = groups.get(id(parameter))
            # A rank may hold nothing of a sharded parameter, and then has nothing to miss.
            found = found or direction[0].numel() == 0
            if "exp_avg_sq" not in state or group is None:
                scaled[name] = torch.zeros_like(direction)
                continue
            found = True
            moment = local(state.get("max_exp_avg_sq", state["exp_avg_sq"])).to(direction.dtype)
            correction = 1.0 - group["betas"][1] ** float(state["step"])
            scaled[name] = direction / (moment / correction).sqrt_().add_(group["eps"])
        if not found:
            raise UserError(
                f"metric 'adam': expected an optimizer with Adam's second moments after at least one step, found "
                f"{type(self._optimizer).__name__} without. Use metric 'raw', or an Adam-like optimizer."
            )
        return Directions(directions.names, scaled)
