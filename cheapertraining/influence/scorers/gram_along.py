"""Products of samples' gradients with sums of them, where no layer is in one piece: under tensor parallelism.

Moments of sources need of a Gram matrix its diagonal and the sums of its columns over groups of samples. The diagonal
is the squared norm of a gradient that one backward pass of one sample leaves in shards; the gradients of a group add up
to a direction, along which forward passes differentiate the losses of all samples
(:mod:`~cheapertraining.influence.scorers.forward`). For ``N`` samples in ``M`` groups: ``N`` backward passes, in which
all ranks take part, and ``2 * N * M`` forward passes, spread over the ranks that read samples of their own. Memory:
twice the trainable parameters, sharded as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.model_access import check_vocabulary, sample_losses, to_device, unwrap
from cheapertraining.influence.parameters import Directions, wide, zeros_like
from cheapertraining.influence.ranks import rank_and_world, rank_rows, sum_over_ranks
from cheapertraining.influence.scorers.forward import forward_scores
from cheapertraining.influence.sharding import Shards, gradient_scale, gradients_set_aside, local, sample_copies

__all__ = ["gram_along"]

Float64 = NDArray[np.float64]
_GROUP = "group"


def gram_along(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Mapping[str, torch.Tensor],
    groups: Sequence[NDArray[np.int64]],
    microbatch_size: int | None,
) -> tuple[Float64, Float64]:
    """Products of the gradients of the samples' summed losses, the same on all ranks; a collective call.

    Args:
        model: sharded by FSDP2, in evaluation mode; parameters in float32.
        parameters: that count, by canonical name.
        rows: the samples, ``[N, S]`` each, the same on all ranks.
        groups: of the samples, int64; each sample is in one.
        microbatch_size: samples in a forward pass; default all that fall to this rank.

    Returns:
        float64 ``[N, N]`` whose columns hold, instead of a product with a single sample's gradient, the mean of those
        with the gradients of its group; and float64 ``[N]``, the squared norms.

    Raises:
        UserError: half precision, tokens outside the vocabulary, gradients that are not finite.
    """
    model = unwrap(model)
    check_vocabulary(model, rows, "influence")
    count, scale, shards = len(rows["labels"]), gradient_scale(model), Shards(model, parameters)
    gram, squares = np.empty((count, count)), np.empty(count)
    for group in groups:
        direction, squares[group] = _sum_of_gradients(model, parameters, rows, group, scale)
        gram[:, group] = _along(model, direction, rows, microbatch_size)[:, None] / len(group)
        # Of the group's own products the sum is known better than by differences.
        norm = shards.norm({name: part[0] for name, part in direction.tensors.items()})
        own = np.ix_(group, group)
        gram[own] += (norm**2 - gram[own].sum()) / len(group) ** 2
    return gram, squares


def _sum_of_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Mapping[str, torch.Tensor],
    group: NDArray[np.int64],
    scale: float,
) -> tuple[Directions, Float64]:
    """The sum of the gradients of a group's samples, and the squared norm of each."""
    shards, copies = Shards(model, parameters), sample_copies(model)
    rank, world = (each // copies for each in rank_and_world())
    device = next(iter(parameters.values())).device
    total, squares = zeros_like(parameters, (_GROUP,)), np.empty(len(group))
    with gradients_set_aside(model):
        for place, row in enumerate(group):
            sums, _ = sample_losses(model, _chosen(rows, [int(row)], device))
            # Of ranks that read samples of their own all must take part, and one counts.
            (sums.sum() * float(place % world == rank)).backward()  # type: ignore[no-untyped-call]
            found = _gradients(parameters, scale)
            squares[place] = shards.norm(found) ** 2
            for name, gradient in found.items():
                total.tensors[name][0] += gradient
            for parameter in model.parameters():
                parameter.grad = None
    if not np.isfinite(squares).all():
        raise UserError(
            f"influence: expected finite gradients, found NaN or infinity for sample {int(group[squares.argmax()])} of "
            f"{len(rows['labels'])}. Look at its tokens, and at the model's parameters."
        )
    return total, squares


def _along(
    model: nn.Module, direction: Directions, rows: Mapping[str, torch.Tensor], microbatch_size: int | None
) -> Float64:
    """Of each sample, the product of its gradient with a direction, ``[N]``."""
    copies, device = sample_copies(model), next(iter(direction.tensors.values())).device
    places = rank_rows(len(rows["labels"]), copies)
    size = microbatch_size or len(places)
    table = torch.zeros(len(rows["labels"]), dtype=torch.float64, device=device)
    for first in range(0, len(places), size):
        part = places[first : first + size]
        chosen = [row for row, _ in part]
        batch = _chosen(rows, chosen, device)
        found = forward_scores(model, direction, batch, method="central").scores[:, 0]
        counted = torch.tensor([counts for _, counts in part], dtype=torch.float64, device=device)
        table.index_add_(0, torch.tensor(chosen, device=device), found * counted)
    sum_over_ranks(table, copies)
    products: Float64 = table.cpu().numpy()
    return products


def _chosen(rows: Mapping[str, torch.Tensor], chosen: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    return to_device({name: part[torch.tensor(chosen, device=part.device)] for name, part in rows.items()}, device)


def _gradients(parameters: Mapping[str, nn.Parameter], scale: float) -> dict[str, torch.Tensor]:
    """What a backward pass has left, this rank's part, as a gradient of the sum over the ranks' losses."""
    found = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    return {name: gradient.to(wide(gradient)) / scale for name, gradient in found.items()}
