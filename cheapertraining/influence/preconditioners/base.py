"""What a preconditioner is, the one that does nothing, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.aggregation import By, units_with_loss
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.ranks import sum_over_ranks

__all__ = ["Identity", "Preconditioner", "check_covered", "check_finite", "check_same_parameters", "count_units"]


class Preconditioner(Protocol):
    """A linear map of directions."""

    name: ClassVar[str]

    def apply(self, directions: Directions) -> Directions:
        """Return ``H^-1 u`` for each direction ``u``: new tensors, of the same shapes and dtypes.

        Call it on all ranks, where there are several.
        """
        ...


class Identity:
    """Leaves directions as they are: a plain dot product of gradients."""

    name: ClassVar[str] = "identity"

    def apply(self, directions: Directions) -> Directions:
        """Return a copy of ``directions``."""
        return Directions(directions.names, {name: tensor.clone() for name, tensor in directions.tensors.items()})


def check_covered(
    preconditioner: str, directions: Directions, shapes: Mapping[str, torch.Size | tuple[int, ...]]
) -> None:
    """Refuse directions over parameters that ``shapes`` (of one direction's parts) does not have, or has otherwise.

    Raises:
        UserError: naming the first such parameter.
    """
    for name, tensor in directions.tensors.items():
        if name not in shapes:
            raise UserError(
                f"{preconditioner}: expected directions over the {len(shapes)} parameters that it was made for, found "
                f"one over '{name}'. Make both with the same `layers`.{nearest(name, shapes)}"
            )
        if tuple(tensor.shape[1:]) != tuple(shapes[name]):
            raise UserError(
                f"{preconditioner}: expected directions of shape {tuple(shapes[name])} for '{name}', found "
                f"{tuple(tensor.shape[1:])}. Make both from the same model."
            )


def check_same_parameters(preconditioner: str, directions: Directions, names: Sequence[str]) -> None:
    """Refuse directions that leave out parameters: for an ``H`` that couples all of them.

    Raises:
        UserError: naming the first parameter that is missing.
    """
    for name in names:
        if name not in directions.tensors:
            raise UserError(
                f"{preconditioner}: expected directions over all of its {len(names)} parameters, found none over "
                f"'{name}'. Make both with the same `layers`."
            )


def count_units(
    preconditioner: str, batches: Sequence[Mapping[str, torch.Tensor]], by: By, device: torch.device
) -> int:
    """Number of units (samples or documents) with at least one token that a loss counts for, over all ranks.

    Args:
        preconditioner: name, for errors.
        batches: this rank's.
        by: what a unit is.
        device: that ranks communicate on.

    Raises:
        UserError: on all ranks alike: no batch, or only masked labels.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        counts += torch.tensor([1, int(units_with_loss(batch, by).sum())], device=device)
    sum_over_ranks(counts)
    if not counts[0]:
        raise UserError(f"{preconditioner}: expected at least one batch to fit on, found none.")
    if not counts[1]:
        raise UserError(
            f"{preconditioner}: expected batches with tokens that a loss counts for, found every label masked "
            f"({IGNORED}). Pick other samples, or put the mask right."
        )
    return int(counts[1])


def check_finite(preconditioner: str, name: str, values: torch.Tensor) -> None:
    """Refuse sums of gradients that are NaN or infinite.

    Raises:
        UserError: naming the parameter.
    """
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"{preconditioner}: expected finite gradients, found NaN or infinity in those of '{name}'. Fit on a model "
            "whose loss is finite."
        )
