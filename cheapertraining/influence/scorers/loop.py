"""The slow reference: one backward pass for each unit, by autograd alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By, unit_index
from cheapertraining.influence.model_access import check_vocabulary, model_losses, no_trace
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.scorers.hook import directed_parameters
from cheapertraining.influence.sharding import is_sharded

__all__ = ["loop_gradients", "loop_scores"]

Batch = Mapping[str, torch.Tensor]


def loop_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, *, by: By = "sample"
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradient of each unit's summed loss, by parameter; ``.grad`` and the model are left as they were.

    The forward pass runs once for the whole batch, so only the units' isolation from each other is relied on.
    """
    for gradients, _, _ in _walk(model, parameters, batch, by):
        yield gradients


def loop_scores(model: nn.Module, directions: Directions, batch: Batch, *, by: By = "sample") -> SampleScores:
    """As :func:`~.hook.hook_scores`."""
    parameters = directed_parameters(model, directions)
    rows, losses, tokens = [], [], []
    for gradients, loss, count in _walk(model, parameters, batch, by):
        products = [
            (directions.tensors[name] * gradient).double().flatten(1).sum(1) for name, gradient in gradients.items()
        ]
        rows.append(torch.stack(products).sum(0))
        losses.append(loss)
        tokens.append(count)
    return SampleScores(torch.stack(rows), torch.stack(tokens), torch.stack(losses))


def _walk(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, by: By
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    if is_sharded(inner):
        raise UserError(
            "influence by loop: expected whole parameters on each rank, found them sharded, which only a backward pass "
            "of all ranks together gives gradients of. Score with the forward or the microbatch scorer."
        )
    index, count = unit_index(batch, by)
    check_vocabulary(inner, batch, "influence")
    with no_trace(inner), torch.set_grad_enabled(True):
        losses, counted = model_losses(inner, batch)
    for unit in range(count):
        mine = index.to(losses.device) == unit
        loss = (losses * mine).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
        }
        yield gradients, loss.detach().double(), (counted & mine).sum()
