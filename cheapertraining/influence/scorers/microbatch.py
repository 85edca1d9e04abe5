"""Scores of sources from gradient accumulation: one scalar product a microbatch, no pass of its own.

Where each microbatch holds one source only, the gradient of that source is what the microbatch adds to ``.grad``, and
its product with a direction is ``<grad after, u> - <grad before, u>``: of all that came before, one scalar is kept for
each direction. :func:`source_microbatches` cuts batches so.

On several ranks the sum over ranks of these differences is what the microbatch of all ranks together adds, whether its
gradients are reduced at once or with a later microbatch: replicas that have just averaged hold the same gradient, whose
product counts once for each. So nothing is communicated until scores are collected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import GroupSums
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.ranks import check_equal_counts, rank_and_world, sum_over_ranks
from cheapertraining.influence.sharding import Shards, check_reduced, gradient_scale, local, sample_copies

__all__ = ["MicrobatchScorer", "MicrobatchScores", "source_microbatches"]


@dataclass(frozen=True)
class MicrobatchScores:
    """What training on ``G`` sources did along ``K`` directions, the same on all ranks.

    Attributes:
        sources: names, ``[G]``.
        directions: names, ``[K]``.
        sums: float64 ``[G, K]``, ``<gradient of the source's summed loss, direction>``.
        tokens: int64 ``[G]``, loss-counting tokens behind them.
        microbatches: int64 ``[G]``, those with counting tokens.
        means: float64 ``[G, K]``, score of the source's mean loss; NaN without a token.
        errors: float64 ``[G, K]``, standard errors of the means over microbatches; NaN with fewer than two.
    """

    sources: tuple[str, ...]
    directions: tuple[str, ...]
    sums: torch.Tensor
    tokens: torch.Tensor
    microbatches: torch.Tensor
    means: torch.Tensor
    errors: torch.Tensor


class MicrobatchScorer:
    """Watches ``.grad`` grow from microbatch to microbatch.

    In a step: :meth:`begin` before the first backward pass, :meth:`mark` after each. :meth:`collect` whenever scores
    are wanted, after one step or many. On several ranks the microbatches that are marked together hold the same source.

    Cost: ``2 * K * P`` floating-point operations a microbatch. Memory: none beside the directions.

    Args:
        model: on one rank, replicated (``DistributedDataParallel``, with or without ``no_sync``), or sharded by FSDP1
            or FSDP2 (under the latter also tensor parallel) that reduce every microbatch. Making a scorer is a
            collective call.
        directions: over its parameters.
        sources: their names; marks give an index into them.

    Raises:
        UserError: directions over parameters that the model does not have.
    """

    def __init__(self, model: nn.Module, directions: Directions, sources: Sequence[str]) -> None:
        parameters = select_parameters(model)
        if other := [name for name in directions.tensors if name not in parameters]:
            raise UserError(
                f"influence directions: expected the model's trainable parameters, found '{other[0]}'. Make the "
                "directions from this model."
            )
        self.sources = tuple(sources)
        self._model = model
        self._directions = directions
        self._parameters = {name: parameters[name] for name in directions.tensors}
        shards = Shards(model, self._parameters)
        self._sharded = shards.sharded
        # Shards of one parameter make up one product; copies of a shard must not count twice, nor averages too little.
        scale = gradient_scale(model) if self._sharded else 1.0
        self._factors = {
            name: 1.0 / (shards.copies(name) * scale) if self._sharded else 1.0 for name in self._parameters
        }
        self._before: torch.Tensor | None = None
        self._marks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def begin(self) -> None:
        """Take note of the gradients that the step starts from; free where they are ``None``."""
        self._before = self._products()

    def mark(
        self, source: int | torch.Tensor, tokens: int | torch.Tensor, loss_scale: float | torch.Tensor = 1.0
    ) -> None:
        """Put down what the microbatch whose backward pass has just ended added.

        Args:
            source: index of the source that all its samples belong to; scalars on the device are not waited for.
            tokens: that its loss counts, on this rank.
            loss_scale: factor with which the sum of its token losses went into the backward pass: ``1 / tokens`` for
                a mean, times the microbatch's weight in the step.

        Raises:
            UserError: no step was begun; FSDP puts off the reduction of gradients.
        """
        if self._before is None:
            raise UserError("MicrobatchScorer: expected begin() before the first microbatch of a step, found none.")
        check_reduced(self._model)
        after = self._products()
        counted = torch.as_tensor(tokens, dtype=torch.float64, device=after.device).detach()
        scale = torch.as_tensor(loss_scale, dtype=torch.float64, device=after.device).detach()
        own = torch.as_tensor(source, dtype=torch.int64, device=after.device)
        self._marks.append((own, after - self._before, counted, counted * scale))
        self._before = after

    def collect(self) -> MicrobatchScores:
        """Scores of everything marked since the last call; a collective call, of a few numbers.

        Raises:
            UserError: ranks marked different numbers of microbatches, or different sources together.
        """
        return self._by_source(*self.collect_microbatches())

    def discard(self) -> None:
        """Forget everything marked since the last :meth:`collect`."""
        self._marks, self._before = [], None

    def collect_microbatches(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`collect`, for those who sum up themselves: of each microbatch, over all ranks, its source int64
        ``[M]``, scores of its summed loss float64 ``[M, K]`` and tokens float64 ``[M]``."""
        marks, self._marks, self._before = self._marks, [], None
        device = next(iter(self._parameters.values())).device
        sources = torch.zeros(len(marks), dtype=torch.int64, device=device)
        for row, (source, *_) in enumerate(marks):
            sources[row] = source
        check_equal_counts(len(marks), "microbatches marked for influence", device)
        _check_same_sources(sources)
        count = len(self._directions.names)
        table = torch.zeros(len(marks), count + 2, dtype=torch.float64, device=device)
        for row, (_, added, tokens, weighted) in enumerate(marks):
            table[row] = torch.cat([added, tokens[None], weighted[None]])
        sum_over_ranks(table)
        # Of ranks that train on the same samples each holds a part of the products, but counts all of the tokens.
        tokens, weighted = (table[:, -2:] / sample_copies(self._model)).T
        # The ranks' factors may differ a little, where each divides by its own tokens: then their weighted mean.
        sums = torch.where(tokens[:, None] > 0, table[:, :count] * (tokens / weighted)[:, None], 0.0)
        return sources, sums, tokens

    def _by_source(self, sources: torch.Tensor, sums: torch.Tensor, tokens: torch.Tensor) -> MicrobatchScores:
        groups, columns = len(self.sources), sums.shape[1]
        spread = GroupSums(groups, columns, sums.device)
        spread.add(sums, tokens, sources)
        means, errors = spread.means()
        lengths = torch.zeros(groups, dtype=torch.int64, device=sums.device)
        return MicrobatchScores(
            sources=self.sources,
            directions=self._directions.names,
            sums=sums.new_zeros(groups, columns).index_add_(0, sources, sums),
            tokens=lengths.index_add(0, sources, tokens.long()),
            microbatches=lengths.index_add(0, sources, (tokens > 0).long()),
            means=means,
            errors=errors,
        )

    @torch.no_grad()
    def _products(self) -> torch.Tensor:
        """``<grad, u>`` of this rank's part, float64 ``[K]``."""
        total = torch.zeros(len(self._directions.names), dtype=torch.float64)
        total = total.to(next(iter(self._parameters.values())).device)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                directions = self._directions.tensors[name]
                grad = local(parameter.grad).reshape(-1).to(directions.dtype)
                total += (directions.reshape(len(directions), -1) @ grad).double() * self._factors[name]
        return total


def source_microbatches(batch: Mapping[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Cut a batch into microbatches of one source each; Composer's ``split_batch``.

    On several ranks a collective call, and all get the same sequence of sources: one that has run out of a source's
    rows fills up with a row whose labels are all masked. Its loss must be 0 and, in an average over microbatches, of
    no weight, as when they are weighted by tokens.

    Args:
        batch: tensors ``[B, ...]``, of them ``source`` int64 ``[B]``, on the device that ranks communicate on.
        microbatch_size: rows in a microbatch, at most.

    Returns:
        Microbatches in the order of the sources' numbers, rows in the batch's; what is no tensor is in each.

    Raises:
        UserError: the batch has no ``source``.
    """
    if "source" not in batch:
        raise UserError(
            "microbatches by source: expected 'source' in the batch, found "
            f"{', '.join(sorted(batch))}. Load with a mixture of sources."
        )
    sources: torch.Tensor = batch["source"]
    microbatches = []
    for source, passes in enumerate(_passes_by_source(sources, microbatch_size)):
        rows = (sources == source).nonzero().flatten()
        for number in range(passes):
            part = rows[number * microbatch_size : (number + 1) * microbatch_size]
            microbatches.append(_take(batch, part) if len(part) else _filler(batch, source))
    return microbatches


def _passes_by_source(sources: torch.Tensor, microbatch_size: int) -> list[int]:
    """Microbatches of each source, ``[max source + 1]``: as many as the rank with the most rows of it needs."""
    highest = sources.max() if len(sources) else sources.new_tensor(-1)
    several = rank_and_world()[1] > 1
    if several:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    counts = torch.bincount(sources, minlength=int(highest) + 1)
    passes = (counts + microbatch_size - 1) // microbatch_size
    if several:
        dist.all_reduce(passes, op=dist.ReduceOp.MAX)
    found: list[int] = passes.tolist()
    return found


def _take(batch: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {name: value[rows.to(value.device)] if torch.is_tensor(value) else value for name, value in batch.items()}


def _filler(batch: Mapping[str, Any], source: int) -> dict[str, Any]:
    filler = _take(batch, torch.zeros(1, dtype=torch.int64))
    filler["source"] = torch.full_like(filler["source"], source)
    filler["labels"] = torch.full_like(filler["labels"], IGNORED)
    return filler


def _check_same_sources(sources: torch.Tensor) -> None:
    if rank_and_world()[1] == 1 or not len(sources):
        return
    bounds = torch.stack([sources, -sources])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if not torch.equal(bounds[0], -bounds[1]):
        first = int((bounds[0] != -bounds[1]).nonzero()[0])
        raise UserError(
            f"influence by microbatch: expected the same source on all ranks at a time, found sources "
            f"{int(-bounds[1, first])} to {int(bounds[0, first])} in microbatch {first}. Cut batches with "
            "source_microbatches."
        )
