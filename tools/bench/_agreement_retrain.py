"""Training: one model with all that estimators look at, and stacks of models on subsets and mixtures of the data."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from cheapertraining.influence.model_access import model_losses, unit_losses
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.preconditioners import EKFAC
from cheapertraining.influence.preconditioners.upkeep import Schedule
from tools.bench._agreement_tasks import Batch, Recipe, Task, rows

__all__ = ["Ensemble", "Trained", "Weights", "load", "mixtures", "retrain", "subsets", "train", "train_stack"]

Weights = dict[str, Tensor]
STACK = 16  # models at once: more do not train faster, and take more memory
CHECKPOINTS = 5
OBSERVATIONS = 20


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Models of one task, each trained on its own weighting of the training samples.

    Attributes:
        weights: `[M, N]`, weight of each training sample in each model's loss; rows sum to 1.
        losses: float64 `[M, Q]`, token-mean loss of each model on each query, nats.
    """

    weights: Tensor
    losses: Tensor


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model trained on all of a task's data, with what was kept of the run.

    Attributes:
        task: data as float64, as are all models here: agreement is not to be a matter of rounding.
        model: at the end.
        optimizer: at the end.
        checkpoints: learning rate and model in the middle of each fifth of the run.
        observed: EK-FAC whose factors were gathered during training, on some rows of one step in twenty.
    """

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    checkpoints: tuple[tuple[float, nn.Module], ...]
    observed: EKFAC


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of an update."""
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _optimizer(parameters: list[Tensor], recipe: Recipe) -> torch.optim.Adam:
    """Adam whose weight decay is a part of the gradient, as in the objective that influence is about."""
    return torch.optim.Adam(parameters, lr=recipe.rate, weight_decay=recipe.decay, foreach=True)


def train(task: Task) -> Trained:
    """Train on all samples alike."""
    recipe, model = task.recipe, copy.deepcopy(task.model)
    optimizer = _optimizer(list(model.parameters()), recipe)
    every = max(1, recipe.steps // OBSERVATIONS)
    schedule = Schedule(every=every, fraction=0.25, decay=0.8, first=2, refresh=2, lag=1)
    observed = EKFAC(select_parameters(model), schedule=schedule)
    kept = {(2 * part + 1) * recipe.steps // (2 * CHECKPOINTS) for part in range(CHECKPOINTS)}
    checkpoints = []
    tokens = int(task.train["labels"][:, 1:].ge(0).sum())
    for step in range(recipe.steps):
        if step in kept:
            checkpoints.append((rate_at(recipe, step), copy.deepcopy(model).double()))
        optimizer.zero_grad()
        if observed.wants(step):
            with observed.observing(model, task.train, loss_scale=1 / tokens):
                (model_losses(model, task.train)[0].sum() / tokens).backward()
        else:
            (model_losses(model, task.train)[0].sum() / tokens).backward()
        optimizer.param_groups[0]["lr"] = rate_at(recipe, step)
        optimizer.step()
    optimizer.zero_grad()
    wide = dataclasses.replace(task, train=_double(task.train), query=_double(task.query))
    return Trained(wide, model.double(), optimizer, tuple(checkpoints), observed)


def _double(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def subsets(task: Task, count: int) -> Tensor:
    """Weights `[M, N]` of `count` random halves of the training samples."""
    total = len(task.source)
    generator = torch.Generator().manual_seed(2000 + task.seed)
    weights = torch.zeros(count, total)
    for row in weights:
        row[torch.randperm(total, generator=generator)[: total // 2]] = 1 / (total // 2)
    return weights


def mixtures(task: Task, count: int) -> Tensor:
    """Weights `[M, N]` of `count` random mixtures of the sources, uniform on the simplex."""
    sizes = torch.bincount(task.source)
    rng = np.random.default_rng(3000 + task.seed)
    shares = torch.tensor(rng.dirichlet(np.ones(len(sizes)), size=count), dtype=torch.float32)
    return (shares / sizes)[:, task.source]


def stacked_losses(model: nn.Module) -> Callable[[Weights, Batch], Tensor]:
    """Token-mean loss `[M, n]` of each sample under each model, from stacked weights and a stacked batch `[M, ...]`."""

    def one(weights: Weights, batch: Batch) -> Tensor:
        sums, tokens = unit_losses(model, batch, "sample", weights)
        return sums / tokens

    return vmap(one, randomness="error")


def train_stack(task: Task, weights: Tensor) -> Weights:
    """Train one model for each row of `weights`, all from the task's initial weights.

    Args:
        task: what to train on; its recipe is followed.
        weights: `[M, N]`; every row has equally many samples that count.

    Returns:
        Weights by name, `[M, *shape]`.
    """
    index = weights.ne(0).nonzero()[:, 1].view(len(weights), -1)
    batch, share = rows(task.train, index), weights.gather(1, index)
    losses = stacked_losses(task.model)
    values = {
        name: p.detach()[None].repeat(len(weights), *[1] * p.dim()).requires_grad_()
        for name, p in task.model.named_parameters()
    }
    optimizer = _optimizer(list(values.values()), task.recipe)
    for step in range(task.recipe.steps):
        optimizer.zero_grad()
        (losses(values, batch) * share).sum().backward()
        optimizer.param_groups[0]["lr"] = rate_at(task.recipe, step)
        optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def query_losses(task: Task, values: Weights) -> Tensor:
    """Token-mean loss of each model on each query, `[M, Q]`."""
    count = len(next(iter(values.values())))
    batch = {name: value.expand(count, *value.shape) for name, value in task.query.items()}
    with torch.no_grad():
        return stacked_losses(task.model)(values, batch)


def retrain(task: Task, weights: Tensor) -> Ensemble:
    """Train a model for each row of `weights` and measure it on the queries."""
    return Ensemble(weights, torch.cat([query_losses(task, train_stack(task, part)) for part in weights.split(STACK)]))


def load(task: Task, weights: Tensor, folder: Path | None) -> Ensemble:
    """`retrain`, or what it gave when it was last asked for the same in this folder."""
    if folder is None:
        return retrain(task, weights)
    path = folder / f"{task.name.replace(' ', '-')}-{len(weights)}-{_fingerprint(task, weights)}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return Ensemble(weights, torch.from_numpy(stored["losses"]))
    ensemble = retrain(task, weights)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, losses=ensemble.losses.numpy())
    return ensemble


def _fingerprint(task: Task, weights: Tensor) -> str:
    """Of all data that the losses follow from; not of the code."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(task.recipe)).encode())
    tensors = {**task.train, **{f"query {name}": value for name, value in task.query.items()}, "weights": weights}
    for name, tensor in (tensors | dict(task.model.named_parameters())).items():
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()[:16]
