"""Preconditioners that are fitted on training batches, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from cheapertraining.influence.preconditioners.base import Preconditioner
from cheapertraining.influence.preconditioners.datainf import DataInf, LayerScale
from cheapertraining.influence.preconditioners.kronecker import EKFAC, KFAC

__all__ = ["FITTED", "Fitted", "make_fitted"]

FITTED = ("layer_scale", "datainf", "kfac", "ekfac")


class Fitted(Preconditioner, Protocol):
    """A preconditioner that is fitted on training batches."""

    def fit(self, model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> Any: ...


def make_fitted(name: str, parameters: Mapping[str, nn.Parameter], damping: float = 0.1) -> Fitted:
    """The preconditioner of this name, one of :data:`FITTED`, not fitted yet.

    Args:
        name: which.
        parameters: by canonical name, all that directions may be over.
        damping: in the unit of each, relative to its own size.
    """
    if name in ("layer_scale", "datainf"):
        return (DataInf if name == "datainf" else LayerScale)(parameters, damping)
    return (EKFAC if name == "ekfac" else KFAC)(parameters, damping=damping)
