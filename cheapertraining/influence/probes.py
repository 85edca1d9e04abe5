"""Probes: small sets of text from a target, and the gradient of the loss on them.

A direction ``u`` is made from a probe's gradient. Everything downstream measures how training moves along
``u``, so a preconditioner changes ``u`` alone and never the work done for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.model_access import check_vocabulary, no_trace, sample_losses, to_device, unwrap
from cheapertraining.influence.parameters import Directions, select_parameters, wide, zeros_like
from cheapertraining.influence.ranks import check_equal_counts, rank_rows, sum_over_ranks
from cheapertraining.influence.scorers import COMBINED
from cheapertraining.influence.sharding import (
    Shards,
    gradient_scale,
    gradients_set_aside,
    is_sharded,
    local,
    reshard,
    sample_copies,
)

__all__ = ["ProbeBank", "ProbeLosses"]

_STATE_VERSION = 1
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
        refresh_every: steps for which :meth:`current` keeps the directions that it made.

    Raises:
        UserError: no probe, an empty probe, weights that are bad or name other probes.
    """

    def __init__(
        self,
        loaders: Mapping[str, DataLoader[Any]],
        weights: Mapping[str, float] | None = None,
        samples: int = 8,
        refresh_every: int = 1,
    ) -> None:
        if not loaders:
            raise UserError("data.probes: expected at least one probe to measure against, found none. Add one.")
        if samples < 1:
            raise UserError(f"probe_samples: expected at least 1, found {samples}.")
        if refresh_every < 1:
            raise UserError(f"refresh_every: expected at least 1 step, found {refresh_every}.")
        self.names = tuple(loaders)
        self._loaders = dict(loaders)
        self._sizes: dict[str, int] = {}
        for name, loader in loaders.items():
            self._sizes[name] = len(loader.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
            if self._sizes[name] == 0:
                raise UserError(f"data.probes.{name}: expected at least one sample, found an empty split.")
        self.samples = samples
        self.refresh_every = refresh_every
        self.weights = _normalized(self.names, weights)
        self._cache: _Cached | None = None
        self._restored: Mapping[str, Any] | None = None

    def window(self, name: str, update_index: int) -> tuple[int, ...]:
        """Indices of the samples that update ``update_index`` looks at."""
        size = self._sizes[name]
        count = min(self.samples, size)
        start = update_index * max(1, count // _MOVES)
        return tuple((start + i) % size for i in range(count))

    def directions(
        self,
        model: nn.Module,
        update_index: int,
        parameters: Mapping[str, nn.Parameter],
        microbatch_size: int | None = None,
        combine: bool = False,
    ) -> tuple[Directions, dict[str, ProbeLosses]]:
        """One direction for each probe, the gradient of its token-mean loss; and the probes' losses.

        Call it on all ranks, between optimizer steps. Leaves no trace in the model.

        Args:
            model: on one rank, replicated (``DistributedDataParallel``), or sharded by FSDP1 or FSDP2, under the
                latter also tensor parallel.
            update_index: says which samples, see :meth:`window`.
            parameters: that the directions are over, by canonical name.
            microbatch_size: samples in a pass; default all that fall to this rank.
            combine: one direction instead, named ``COMBINED``: the gradient of the weighted sum of the losses.

        Raises:
            UserError: a window without a token that counts, or of another tokenizer; gradients that are not finite;
                windows or passes that differ on the ranks.
        """
        found = zeros_like(parameters, (COMBINED,) if combine else self.names)
        shards, losses = Shards(model, parameters), {}
        with no_trace(model):
            for row, (name, weight) in enumerate(self.weights.items()):
                gradient, losses[name] = self.gradient(model, name, update_index, parameters, microbatch_size)
                if not math.isfinite(shards.norm(gradient)):
                    raise UserError(
                        f"data.probes.{name}: expected a finite gradient, found NaN or infinity. The model diverged "
                        f"or the probe is broken; its mean loss is {losses[name].mean:.4g}."
                    )
                for key, part in gradient.items():
                    if combine:
                        found.tensors[key][0] += part.mul_(weight)
                    else:
                        found.tensors[key][row] = part
        return found, losses

    def current(
        self,
        model: nn.Module,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        microbatch_size: int | None = None,
        combine: bool = False,
    ) -> tuple[Directions, dict[str, ProbeLosses]]:
        """:meth:`directions`, made anew when those at hand are ``refresh_every`` steps old, else as they were made.

        The window moves on at each refresh: its number is ``step // refresh_every``. Arguments and errors as of
        :meth:`directions`; all ranks give the same ``step``.
        """
        if self._restored is not None:
            self._cache, self._restored = _restored(self._restored, model, parameters), None
        cached = self._cache
        if cached is None or not 0 <= step - cached.step < self.refresh_every:
            made = self.directions(model, step // self.refresh_every, parameters, microbatch_size, combine)
            cached = self._cache = _Cached(step, *made, Shards(model, parameters))
        return cached.directions, cached.losses

    @property
    def made_at(self) -> int | None:
        """The step that the directions of :meth:`current` were made at; None: there are none."""
        return None if self._cache is None else self._cache.step

    def state_dict(self) -> dict[str, Any]:
        """The directions at hand, the losses, and the step of both: a resumed run goes on with them, bit for bit.

        A collective call. Tensors are whole and on the CPU, ``{name: [K, *full]}``, so that another number of ranks
        can take them over; without any where each step makes its own.
        """
        if self._restored is not None:
            return dict(self._restored)
        if self._cache is None or self.refresh_every == 1:
            return {"version": _STATE_VERSION}
        cached = self._cache
        tensors = cached.directions.tensors
        return {
            "version": _STATE_VERSION,
            "step": cached.step,
            "names": list(cached.directions.names),
            "tensors": {name: cached.shards.gather(name, part).cpu() for name, part in tensors.items()},
            "losses": {
                name: [list(losses.indices), losses.sums.tolist(), losses.tokens.tolist()]
                for name, losses in cached.losses.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`. Directions over other parameters or probes are refused at the next use."""
        self._cache, self._restored = None, state if "step" in state else None

    def gradient(
        self,
        model: nn.Module,
        name: str,
        update_index: int,
        parameters: Mapping[str, nn.Parameter],
        microbatch_size: int | None = None,
    ) -> tuple[dict[str, torch.Tensor], ProbeLosses]:
        """Gradient of the probe's token-mean loss by parameter, and the losses. Leaves ``.grad`` alone; the caller
        sets the mode. Arguments and errors as of :meth:`directions`, but that a gradient need not be finite.

        Returns:
            ``{name: [*local shape]}``, float32 (float64 for float64 parameters), the same on all ranks or each rank's
            shard; and the losses.
        """
        model, indices = unwrap(model), self.window(name, update_index)
        device = next(iter(parameters.values())).device
        totals = torch.zeros(2, len(indices), dtype=torch.float64, device=device)
        passes = self._passes(model, name, indices, microbatch_size, totals)
        gradient = _by_shards(model, parameters, passes) if is_sharded(model) else _by_autograd(parameters, passes)
        sum_over_ranks(totals, sample_copies(model))
        losses = ProbeLosses(indices, *totals.cpu().numpy())
        tokens = float(losses.tokens.sum())
        if tokens == 0:
            raise UserError(
                f"data.probes.{name}: expected tokens that a loss counts for, found every label masked in samples "
                f"{indices[0]} to {indices[-1]}. Put the probe's mask right."
            )
        for part in gradient.values():
            part /= tokens
        return gradient, losses

    def losses(self, model: nn.Module, update_index: int, microbatch_size: int | None = None) -> dict[str, ProbeLosses]:
        """The probes' losses alone, by forward passes. Arguments and errors as of :meth:`directions`."""
        found: dict[str, ProbeLosses] = {}
        device = next(iter(select_parameters(model).values())).device
        model = unwrap(model)
        with no_trace(model), torch.no_grad():
            for name in self.names:
                indices = self.window(name, update_index)
                totals = torch.zeros(2, len(indices), dtype=torch.float64, device=device)
                for _ in self._passes(model, name, indices, microbatch_size, totals):
                    reshard(model)  # FSDP keeps what it gathered for a pass without gradients.
                sum_over_ranks(totals, sample_copies(model))
                found[name] = ProbeLosses(indices, *totals.cpu().numpy())
        return found

    def _passes(
        self,
        model: nn.Module,
        name: str,
        indices: Sequence[int],
        microbatch_size: int | None,
        totals: torch.Tensor,
    ) -> Iterator[torch.Tensor]:
        """This rank's part of the summed loss, microbatch by microbatch; fills ``totals`` on the way."""
        rows = rank_rows(len(indices), sample_copies(model))
        size, device = microbatch_size or len(rows), totals.device
        check_equal_counts(len(indices), f"samples of probe '{name}'", device)
        check_equal_counts(math.ceil(len(rows) / size), f"passes over probe '{name}'", device)
        for first in range(0, len(rows), size):
            positions = [position for position, _ in rows[first : first + size]]
            counted = torch.tensor(
                [counts for _, counts in rows[first : first + size]], dtype=torch.float64, device=device
            )
            batch = self.batch(name, [indices[position] for position in positions])
            check_vocabulary(model, batch, f"data.probes.{name}")
            sums, tokens = sample_losses(model, to_device(batch, device))
            totals.index_add_(1, torch.tensor(positions, device=device), torch.stack([sums.detach(), tokens]) * counted)
            yield (sums * counted).sum()

    def batch(self, name: str, samples: Sequence[int]) -> dict[str, Any]:
        """What the loader would yield for these samples, without touching its sampler or random state."""
        loader = self._loaders[name]
        dataset: Any = loader.dataset
        rows = dataset.__getitems__(samples) if hasattr(dataset, "__getitems__") else [dataset[i] for i in samples]
        batch: dict[str, Any] = loader.collate_fn(rows)
        return batch


@dataclass(frozen=True)
class _Cached:
    step: int
    directions: Directions
    losses: dict[str, ProbeLosses]
    shards: Shards


def _restored(state: Mapping[str, Any], model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> _Cached:
    saved, shards = state["tensors"], Shards(model, parameters)
    if set(saved) != set(parameters):
        other = sorted(set(saved) ^ set(parameters))
        raise UserError(
            f"influence: expected saved directions over the {len(parameters)} parameters of this run, found them over "
            f"{len(saved)} ({other[0]} is in one alone). Resume with the same model and `layers`."
        )
    tensors = {name: shards.scatter(name, saved[name].to(parameter.device)) for name, parameter in parameters.items()}
    losses = {
        name: ProbeLosses(tuple(indices), np.array(sums), np.array(tokens))
        for name, (indices, sums, tokens) in state["losses"].items()
    }
    return _Cached(state["step"], Directions(tuple(state["names"]), tensors), losses, shards)


def _by_autograd(parameters: Mapping[str, nn.Parameter], passes: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the sum of all passes of all ranks, of parameters that every rank has whole."""
    gradient = {name: torch.zeros_like(parameter, dtype=wide(parameter)) for name, parameter in parameters.items()}
    for loss in passes:
        # Not .backward(): it would write to .grad, and wake the hooks of DistributedDataParallel.
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for accumulated, grad in zip(gradient.values(), grads, strict=True):
            if grad is not None:
                accumulated += grad
    for accumulated in gradient.values():
        sum_over_ranks(accumulated)
    return gradient


def _by_shards(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], passes: Iterator[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same, this rank's shard of it: only ``.backward()`` makes FSDP reduce gradients."""
    scale = gradient_scale(model)
    with gradients_set_aside(model):
        for loss in passes:
            loss.backward()  # type: ignore[no-untyped-call]
        gradient = {}
        for name, parameter in parameters.items():
            held = local(parameter)
            part = torch.zeros_like(held, dtype=wide(held))
            if parameter.grad is not None:
                part += local(parameter.grad)
            gradient[name] = part.div_(scale)
    return gradient


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
