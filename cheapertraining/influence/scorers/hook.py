"""A pass of its own over data that is not trained on: forward, and backward without the gradients of weights.

Nothing stays behind: ``.grad``, ``requires_grad``, modes, random generators and ``forward`` methods are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, overload

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By
from cheapertraining.influence.model_access import check_vocabulary, model_losses, no_trace
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers import SampleLosses, SampleScores
from cheapertraining.influence.scorers.backward import Consumer, Watch, refuse_unwatchable, watched
from cheapertraining.influence.scorers.consumers import Dense, Moments, Products, Projected, Projection
from cheapertraining.influence.scorers.sites import find_sites
from cheapertraining.influence.scorers.units import Units
from cheapertraining.influence.sharding import Gathered, Shards, gradients_set_aside, is_sharded, local

__all__ = [
    "directed_parameters",
    "hook_gram",
    "hook_norms",
    "hook_projected",
    "hook_scores",
    "per_unit_gradients",
    "run_pass",
    "whole",
]

Batch = Mapping[str, torch.Tensor]
Parameters = Mapping[str, nn.Parameter]


def hook_scores(
    model: nn.Module, directions: Directions, batch: Batch, *, by: By = "sample", norms: bool = False
) -> SampleScores:
    """Products of each unit's gradient with directions.

    Args:
        model: wrapped or not; scored in evaluation mode.
        directions: of any of its parameters; layers that none is given for are not touched.
        batch: ``input_ids``, ``labels`` and, for packed rows, ``position_ids``, on the model's device.
        by: what a unit is.
        norms: squared norms of the units' gradients as well, over the same parameters.

    Raises:
        UserError: a compiled model, layers of an unknown kind, tokens outside the vocabulary, gradients that are not
            finite, no ``position_ids`` for documents.
    """
    parameters = directed_parameters(model, directions)
    units = _units(batch, by, parameters)
    tensors = whole(model, parameters, directions)
    if norms:
        moments = Moments(tensors, gram=False)
        found = run_pass(model, parameters, batch, units, moments)
        each = moments.found.values()
        scores = torch.stack([moment.products.double() for moment in each]).sum(0)
        squares = torch.stack([moment.gram.double() for moment in each]).sum(0)
        _check_finite(squares, found)
        return SampleScores(scores, found.tokens, found.losses, squares)
    consumer = Products(tensors, units)
    found = run_pass(model, parameters, batch, units, consumer)
    _check_finite(consumer.scores, found)
    return SampleScores(consumer.scores, found.tokens, found.losses)


def hook_norms(model: nn.Module, parameters: Parameters, batch: Batch, *, by: By = "sample") -> torch.Tensor:
    """Squared norm of each unit's gradient over ``parameters``, float64 ``[N]``; arguments and errors as of
    :func:`hook_scores`."""
    found = _moments(model, parameters, batch, by, gram=False)
    return torch.stack(list(found.values())).sum(0)


@overload
def hook_gram(
    model: nn.Module,
    parameters: Parameters,
    batch: Batch,
    other: Batch | None = None,
    *,
    by: By = "sample",
    per_parameter: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def hook_gram(
    model: nn.Module,
    parameters: Parameters,
    batch: Batch,
    other: Batch | None = None,
    *,
    by: By = "sample",
    per_parameter: Literal[True],
) -> dict[str, torch.Tensor]: ...


def hook_gram(
    model: nn.Module,
    parameters: Parameters,
    batch: Batch,
    other: Batch | None = None,
    *,
    by: By = "sample",
    per_parameter: bool = False,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Products of the units' gradients with each other.

    Args:
        model: as of :func:`hook_scores`.
        parameters: which.
        batch: rows of the matrix.
        other: columns, ``batch`` itself by default; rows of the same length, the same keys.
        by: what a unit is.
        per_parameter: one matrix for each parameter.

    Returns:
        float64 ``[N, M]``, over all parameters; or one by parameter.
    """
    if other is None:
        found = _moments(model, parameters, batch, by, gram=True)
    else:
        both = _joined(batch, other)
        count = _units(batch, by, parameters).count
        found = {name: gram[:count, count:] for name, gram in _moments(model, parameters, both, by, gram=True).items()}
    return found if per_parameter else torch.stack(list(found.values())).sum(0)


def _joined(batch: Batch, other: Batch) -> Batch:
    if batch["labels"].shape[1] != other["labels"].shape[1]:
        raise UserError(
            f"influence between two batches: expected rows of one length, found {batch['labels'].shape[1]} and "
            f"{other['labels'].shape[1]} tokens. Pad the shorter ones."
        )
    return {key: torch.cat([batch[key], other[key]]) for key in _INPUTS if key in batch}


def hook_projected(
    model: nn.Module, projection: Projection, batch: Batch, *, by: By = "sample"
) -> dict[str, torch.Tensor]:
    """Projected gradients of the units, ``[N, rank * rank]`` by matrix parameter; a gradient itself is never formed."""
    parameters = _named(model, list(projection.left))
    consumer = Projected(projection)
    units = _units(batch, by, parameters)
    found = run_pass(model, parameters, batch, units, consumer)
    for values in consumer.found.values():
        _check_finite(values, found)
    return consumer.found


def per_unit_gradients(
    model: nn.Module,
    parameters: Parameters,
    batch: Batch,
    consume: Callable[[str, torch.Tensor], None],
    *,
    by: By = "sample",
) -> SampleLosses:
    """Hand the units' gradients to ``consume(name, [N, *shape])``, one parameter at a time, in a backward's order.

    At any time the gradients of one parameter exist; ``consume`` must not keep them, and must not run a backward pass.
    """
    shards = Shards(model, parameters)
    shapes = {name: shards.shape(name) for name in parameters}
    return run_pass(model, parameters, batch, _units(batch, by, parameters), Dense(shapes, consume))


_INPUTS = ("input_ids", "labels", "position_ids")


def _moments(model: nn.Module, parameters: Parameters, batch: Batch, by: By, *, gram: bool) -> dict[str, torch.Tensor]:
    shards = Shards(model, parameters)
    nothing = {
        name: local(p).new_empty((0, *shards.shape(name)), dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in parameters.items()
    }
    consumer = Moments(nothing, gram=gram)
    found = run_pass(model, parameters, batch, _units(batch, by, parameters), consumer)
    for moment in consumer.found.values():
        _check_finite(moment.gram, found)
    return {name: moment.gram.double() for name, moment in consumer.found.items()}


def _units(batch: Batch, by: By, parameters: Parameters) -> Units:
    return Units(batch, by, next(iter(parameters.values())).device)


def run_pass(model: nn.Module, parameters: Parameters, batch: Batch, units: Units, consumer: Consumer) -> SampleLosses:
    """Hand to ``consumer`` what passes by at the sites of ``parameters`` for the batch that ``units`` was made of."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    refuse_unwatchable(inner)
    check_vocabulary(inner, batch, "influence")
    anchor = torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
    watch = Watch(find_sites(inner, parameters), consumer, units, anchor)
    # FSDP has its own copies of parameters: it forms and reduces their gradients in any case, and they are dropped.
    untouched = gradients_set_aside(inner) if is_sharded(inner) else _frozen(inner)
    with no_trace(inner), untouched, torch.set_grad_enabled(True), watched(watch):
        losses, counted = model_losses(inner, batch)
        torch.autograd.backward(losses.sum())
    watch.flush()
    return SampleLosses(units.sum(losses.detach().double().reshape(-1)), units.sum_counts(counted))


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires grad: autograd forms no gradient of weights, and writes to no ``.grad``."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def whole(model: nn.Module, parameters: Parameters, directions: Directions) -> Mapping[str, torch.Tensor]:
    """Directions ``[K, *shape]`` by parameter, gathered where the model is sharded."""
    shards = Shards(model, parameters)
    return Gathered(shards, directions.tensors) if shards.sharded else directions.tensors


def directed_parameters(model: nn.Module, directions: Directions) -> dict[str, nn.Parameter]:
    """The parameters that directions are given for.

    Raises:
        UserError: one is not a trainable parameter of the model, or of another shape.
    """
    parameters = _named(model, list(directions.tensors))
    for name, parameter in parameters.items():
        shape = tuple(directions.tensors[name].shape[1:])
        held = tuple(local(parameter).shape)
        if shape != held:
            raise UserError(
                f"influence: expected directions of '{name}' with the shape {held}, found {shape}. They belong to "
                "another model."
            )
    return parameters


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    trainable = select_parameters(model)
    unknown = [name for name in names if name not in trainable]
    if unknown or not names:
        raise UserError(
            f"influence: expected directions of the model's trainable parameters, found "
            f"{repr(unknown[0]) if unknown else 'none'}. Make them with the same model and `layers`."
        )
    return {name: trainable[name] for name in names}


def _check_finite(values: torch.Tensor, found: SampleLosses) -> None:
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        unit = int(bad.nonzero()[0])
        raise UserError(
            f"influence: expected finite gradients, found NaN or infinity for unit {unit} of the batch (its loss is "
            f"{float(found.losses[unit]):.4g}). Look at its tokens, and at the model's parameters."
        )
