"""Probes: small sets of text from a target, and the gradient of the loss on them.

A direction ``u`` is made from a probe's gradient. Everything downstream measures how training moves along
``u``, so a preconditioner changes ``u`` alone and never the work done for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.model_access import sample_losses, to_device, trainable_parameters

__all__ = ["ProbeBank", "ProbeLosses", "adam_direction", "rank_rows", "sum_over_ranks"]

Direction = list[torch.Tensor]
"""One tensor for each trainable parameter, of its shape, dtype and device."""

# A third of the window moves on at each update: directions come to see the whole probe, while the other two
# thirds are common to neighbouring updates and show the true change of the loss at no further cost.
_MOVES = 3


@dataclass(frozen=True)
class ProbeLosses:
    """Losses on one probe's window at one update, the same on all ranks.

    Attributes:
        indices: the window, as indices into the probe's dataset, ``[n]``.
        sums: float64 ``[n]``, nats summed over each sample's tokens.
        tokens: float64 ``[n]``, loss-counting tokens of each sample.
    """

    indices: tuple[int, ...]
    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean loss over the tokens of the window, nats."""
        return float(self.sums.sum() / max(self.tokens.sum(), 1.0))


class ProbeBank:
    """Named probes, each with a window of samples that slides over its split.

    The window of update ``i`` is a pure function of ``i``, so a resumed run measures what the undisturbed one
    does.

    Args:
        loaders: a finite loader for each probe; only its ``dataset`` and ``collate_fn`` are used.
        weights: weight of each probe's loss in the objective; any non-negative scale.
        samples: window size; the whole split where it is smaller.

    Raises:
        UserError: no probe, an empty probe, weights that are bad or name other probes.
    """

    def __init__(
        self,
        loaders: Mapping[str, DataLoader[Any]],
        weights: Mapping[str, float] | None = None,
        samples: int = 8,
    ) -> None:
        if not loaders:
            raise UserError("data.probes: expected at least one probe to measure against, found none. Add one.")
        if samples < 1:
            raise UserError(f"probe_samples: expected at least 1, found {samples}.")
        self.names = tuple(loaders)
        self._loaders = dict(loaders)
        self._sizes: dict[str, int] = {}
        for name, loader in loaders.items():
            self._sizes[name] = len(loader.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
            if self._sizes[name] == 0:
                raise UserError(f"data.probes.{name}: expected at least one sample, found an empty split.")
        self.samples = samples
        self.weights = _normalized(self.names, weights)

    def window(self, name: str, update_index: int) -> tuple[int, ...]:
        """Indices of the samples that update ``update_index`` looks at."""
        size = self._sizes[name]
        count = min(self.samples, size)
        start = update_index * max(1, count // _MOVES)
        return tuple((start + i) % size for i in range(count))

    def gradient(
        self, model: nn.Module, name: str, update_index: int, microbatch_size: int | None = None
    ) -> tuple[Direction, ProbeLosses]:
        """Gradient of the probe's token-mean loss, and the losses. Leaves ``.grad`` alone; the caller sets
        the mode.

        Args:
            model: unwrapped, replicated on all ranks.
            name: of the probe.
            update_index: says which samples.
            microbatch_size: samples in a pass; default all that fall to this rank.
        """
        indices = self.window(name, update_index)
        rows = rank_rows(len(indices))
        parameters = trainable_parameters(model)
        device = parameters[0].device
        totals = torch.zeros(2, len(indices), dtype=torch.float64, device=device)
        gradient = [torch.zeros_like(parameter) for parameter in parameters]
        size = microbatch_size or len(rows)
        for first in range(0, len(rows), size):
            positions = [position for position, _ in rows[first : first + size]]
            counted = torch.tensor(
                [counts for _, counts in rows[first : first + size]], dtype=torch.float64, device=device
            )
            batch = self._batch(name, [indices[position] for position in positions])
            sums, tokens = sample_losses(model, to_device(batch, device))
            # Not .backward(): it would write to .grad, and wake the hooks of DistributedDataParallel.
            grads = torch.autograd.grad((sums * counted).sum(), parameters, allow_unused=True)
            for accumulated, grad in zip(gradient, grads, strict=True):
                if grad is not None:
                    accumulated += grad
            totals.index_add_(1, torch.tensor(positions, device=device), torch.stack([sums.detach(), tokens]) * counted)
        sum_over_ranks(totals)
        losses = ProbeLosses(indices, *totals.cpu().numpy())
        for accumulated in gradient:
            sum_over_ranks(accumulated)
            accumulated /= max(float(losses.tokens.sum()), 1.0)
        return gradient, losses

    def _batch(self, name: str, samples: Sequence[int]) -> dict[str, Any]:
        """What the loader would yield for these samples, without touching its sampler or random state."""
        loader = self._loaders[name]
        dataset: Any = loader.dataset
        rows = dataset.__getitems__(samples) if hasattr(dataset, "__getitems__") else [dataset[i] for i in samples]
        batch: dict[str, Any] = loader.collate_fn(rows)
        return batch


def adam_direction(model: nn.Module, gradient: Direction, optimizer: torch.optim.Optimizer) -> Direction:
    """Precondition a gradient as Adam does: ``g / (sqrt(v / (1 - beta2**t)) + eps)``, in place (Kingma & Ba,
    1412.6980).

    With it, a score is what one unit of Adam's learning rate does to the probe (momentum and clipping aside).
    A parameter that the optimizer has no moments for has not been trained and gets no direction.

    Raises:
        UserError: the optimizer keeps no second moments (``exp_avg_sq``) for any trainable parameter.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    found = False
    for parameter, direction in zip(trainable_parameters(model), gradient, strict=True):
        state = optimizer.state.get(parameter, {})
        group = groups.get(id(parameter))
        if "exp_avg_sq" not in state or group is None:
            direction.zero_()
            continue
        found = True
        correction = 1.0 - group["betas"][1] ** float(state["step"])
        direction /= (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"])
    if not found:
        raise UserError(
            f"metric 'adam': expected an optimizer with Adam's second moments after at least one step, found "
            f"{type(optimizer).__name__} without. Use metric 'raw', or an Adam-like optimizer."
        )
    return gradient


def rank_rows(count: int) -> list[tuple[int, float]]:
    """Split ``count`` rows over the ranks: ``(row, 1.0)`` for this rank's, filled up with ``(0, 0.0)`` that
    do not count.

    All ranks get equally many, so that they make the same number of passes (a sharded model needs that).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    mine = [(row, 1.0) for row in range(rank, count, world)]
    return mine + [(0, 0.0)] * (math.ceil(count / world) - len(mine))


def sum_over_ranks(values: torch.Tensor) -> None:
    """Replace ``values`` by their sum over all ranks, where there are several."""
    if _distributed():
        dist.all_reduce(values)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _normalized(names: tuple[str, ...], weights: Mapping[str, float] | None) -> dict[str, float]:
    given = dict.fromkeys(names, 1.0) if weights is None else dict(weights)
    for name, weight in given.items():
        if name not in names:
            raise UserError(f"probe weights: no probe is named '{name}' ({', '.join(names)}).{nearest(name, names)}")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"data.probes.{name}.weight: expected a finite number of at least 0, found {weight}.")
    if missing := [name for name in names if name not in given]:
        raise UserError(f"probe weights: expected one for each probe, found none for {', '.join(missing)}.")
    total = math.fsum(given.values())
    if total == 0:
        raise UserError("data.probes: expected a probe with a positive weight, found only zeros.")
    return {name: given[name] / total for name in names}
