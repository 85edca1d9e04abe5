"""Distillation from hidden states, chunk by chunk: whole logits ``[B, S, V]`` never exist.

The gradient is computed along with the loss, so nothing of size V outlives its chunk and backward only multiplies.
Projections are in float32 (float64 for float64 hidden states) whatever the dtype of states and weights and whatever
autocast says: logits rounded to bfloat16 cost 4 to 23 % of error in the gradient (linkedin/Liger-Kernel issue 1432).
On CUDA, ``torch.backends.cuda.matmul.allow_tf32`` makes that fast; TF32 holds bfloat16 numbers exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cheapertraining.data.collate import IGNORED
from cheapertraining.distillation.divergences import FORWARD_KL, Divergence
from cheapertraining.distillation.fused import fits, fused_cross_entropy
from cheapertraining.distillation.kernels import Objective, RowTargets, block_loss
from cheapertraining.distillation.losses import (
    DistillationLoss,
    Statistics,
    check_settings,
    common_vocabulary,
    next_labels,
    position_weights,
    refuse_not_finite,
)
from cheapertraining.distillation.sparse import check_sampled, check_top_k
from cheapertraining.distillation.statistics import block_statistics
from cheapertraining.distillation.targets import (
    DenseTargets,
    HiddenTargets,
    OutputHead,
    SampledTargets,
    Targets,
    TopKTargets,
)
from cheapertraining.distillation.vocabulary_parallel import WHOLE, VocabularyPart
from cheapertraining.errors import UserError

__all__ = ["chunked_distillation_loss"]

# Logits of a chunk, and of the block of it that elementwise work is done on. On a CPU a block stays in the cache, where
# ten passes over it cost less than three over memory; a GPU wants few and large kernels.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
CHUNK_TOKENS = 128  # at least: matrix products of fewer rows are slow
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 27}


def chunked_distillation_loss(
    hidden: Tensor,
    head: OutputHead,
    targets: Targets | None,
    labels: Tensor,
    *,
    divergence: Divergence = FORWARD_KL,
    temperature: float = 1.0,
    alpha: float = 0.5,
    normalizer: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    statistics: bool = False,
    group: dist.ProcessGroup | None = None,
) -> DistillationLoss:
    """:func:`~cheapertraining.distillation.losses.distillation_loss` from hidden states.

    Gradient goes to ``hidden``, ``head.weight`` and ``head.bias``, to those that require one; under ``torch.no_grad``
    none is computed. Positions that do not count are not computed either. The weights are copied once where they are
    not float32 already, the teacher's too.

    Args:
        hidden: ``[B, S, H]``, what the student's head multiplies.
        head: the student's, its weight whole (under FSDP2: unsharded, as within the root's forward).
        targets: of the teacher; None: cross-entropy alone, whatever ``alpha``, on CUDA by Liger's kernel where that
            :func:`~cheapertraining.distillation.fused.fits` and ``chunk_tokens`` is left out.
        labels: int64 ``[B, S]``, unshifted, -100 where no loss counts.
        chunk_tokens: positions at a time; default: by vocabulary and device.
        statistics: return :class:`~cheapertraining.distillation.losses.Statistics` as well.
        group: ranks that each hold an equal part of the vocabulary, in their order, and call this together: ``head``,
            and a teacher's head or logits, are then the rank's part, all else is the same on each. So is what is
            returned; the gradient is that of the rank's part, for ``hidden`` what it adds. No ``vocab_size`` then.

    Others are as in `distillation_loss`.

    Raises:
        UserError: as `distillation_loss`.
    """
    check_settings(targets, temperature, alpha)
    known = targets.vocabulary if isinstance(targets, DenseTargets | HiddenTargets) else None
    if group is not None and vocab_size is not None:
        raise UserError(
            f"vocab_size: expected none where ranks hold a part of the vocabulary each, found {vocab_size}: leave out "
            "columns of padding before it is divided"
        )
    size = common_vocabulary(head.vocabulary, known, vocab_size)
    head = head.truncated(size)
    vocabulary = WHOLE if group is None else VocabularyPart(group, size)
    alone = targets is None and not statistics and chunk_tokens is None and group is None
    if alone and fits(hidden, head):
        return fused_cross_entropy(hidden, head, labels, normalizer)
    inputs = [hidden, head.weight, head.bias]
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        objective = Objective(divergence, temperature, any(wanted), vocabulary)
        run = _Run(hidden, head, targets, labels, objective, size)
        run.weigh(0.0 if targets is None else alpha, normalizer, token_weights)
        run.go(chunk_tokens or max(CHUNK_TOKENS, _budget(CHUNK, hidden) // size), wanted, statistics)
        loss = run.loss()
    if not any(wanted):
        return loss
    gradients = [run.gradients[i] if wanted[i] else None for i in range(3)]
    return replace(loss, total=_WithGradient.apply(loss.total, *inputs, *gradients))  # type: ignore[no-untyped-call]


def _budget(table: dict[str, int], like: Tensor) -> int:
    return table.get(like.device.type, table["cuda"])


class _WithGradient(torch.autograd.Function):
    """A number and its gradient, both known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors[3:])
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors]
        return (None, *scaled, None, None, None)


@dataclass
class _Sums:
    """What accumulates: one number a counted position."""

    cross_entropy: list[Tensor]
    divergence: list[Tensor]
    others: list[dict[str, Tensor]]


class _Run:
    """One pass over the counted positions, without a graph."""

    def __init__(
        self, hidden: Tensor, head: OutputHead, targets: Targets | None, labels: Tensor, objective: Objective, size: int
    ) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.labels, self.objective, self.size = hidden, labels, objective, size
        self.head = head
        self.wide = head.to(self.dtype)
        if isinstance(targets, HiddenTargets):
            targets = replace(targets, head=targets.head.truncated(size).to(self.dtype))
        self.targets = targets
        following = next_labels(labels)
        self.mask = following != IGNORED
        self.index = self.mask.flatten().nonzero().squeeze(1)
        self.following = following.flatten().index_select(0, self.index)
        self.sums = _Sums([], [], [])
        self.gradients: list[Tensor | None] = [None, None, None]

    def weigh(self, alpha: float, normalizer: float | Tensor | None, token_weights: Tensor | None) -> None:
        """Work out the factor of each position's parts in the total."""
        count = self.mask.sum() if normalizer is None else torch.as_tensor(normalizer, device=self.hidden.device)
        self.inverse = 1 / count.clamp(min=1).to(self.dtype)
        weights = position_weights(token_weights, self.mask)
        flat = torch.ones_like(self.index, dtype=self.dtype) if weights is None else weights.to(self.dtype).flatten()
        self.weights = flat if weights is None else flat.to(self.index.device).index_select(0, self.index)
        self.cross = (1 - alpha) * self.inverse
        self.share = (alpha * self.objective.temperature**2 * self.inverse * self.weights)[:, None]

    def go(self, chunk: int, wanted: list[bool], statistics: bool) -> None:
        """Fill ``sums`` and ``gradients``."""
        flat = self.hidden.flatten(0, 1)
        accumulate = _Accumulator(flat, self.wide, wanted)
        own = self.hidden.new_empty(min(chunk, max(1, len(self.index))), self.size, dtype=self.dtype)
        other = torch.empty_like(own) if isinstance(self.targets, HiddenTargets) else None
        stored = self._stored()
        for rows in _slices(len(self.index), chunk):
            index = self.index[rows]
            states = flat.index_select(0, index).to(self.dtype)
            logits = self.wide.logits(states, out=own[: len(index)])
            targets = self._live(index, other) if stored is None else stored.part(rows)
            capped = logits.clone() if self.wide.soft_cap is not None and any(wanted) else None
            self._blocks(logits, targets, rows, statistics)
            if any(wanted):
                accumulate.add(self.wide.backward(logits, capped), states, index)
        self.gradients = accumulate.finish(self.hidden, self.head)

    def _stored(self) -> TopKTargets | SampledTargets | None:
        """Those of all counted positions, checked, where they are few numbers a position."""
        if not isinstance(self.targets, TopKTargets | SampledTargets):
            return None
        found = self.targets.rows(self.index)
        if isinstance(found, TopKTargets):
            check_top_k(found, self.size * self.objective.vocabulary.ranks, self.objective.divergence)
        else:
            check_sampled(found, self.size * self.objective.vocabulary.ranks, self.objective.divergence)
        return found

    def _live(self, index: Tensor, buffer: Tensor | None) -> DenseTargets | None:
        """The teacher's logits of a chunk."""
        if isinstance(self.targets, HiddenTargets):
            return self.targets.rows(index, None if buffer is None else buffer[: len(index)])
        if isinstance(self.targets, DenseTargets):
            return DenseTargets(self.targets.rows(index).logits[:, : self.size])
        return None

    def _blocks(self, logits: Tensor, targets: RowTargets | None, rows: slice, statistics: bool) -> None:
        following, share, vocabulary = self.following[rows], self.share[rows], self.objective.vocabulary
        # Ranks that share a vocabulary wait for one another in each block: few of them, then.
        budget = _budget(BLOCK if vocabulary.ranks == 1 else CHUNK, logits)
        for block in _slices(len(logits), max(1, budget // self.size)):
            mine = None if targets is None else targets.part(block)
            if isinstance(mine, DenseTargets):
                refuse_not_finite(vocabulary.largest(mine.logits))
            if statistics:
                self.sums.others.append(block_statistics(logits[block], mine, vocabulary))
            cross_entropy, divergence = block_loss(
                logits[block], mine, following[block], self.cross, share[block], self.objective
            )
            self.sums.cross_entropy.append(cross_entropy)
            self.sums.divergence.append(divergence)

    def loss(self) -> DistillationLoss:
        """The sums as a loss, without gradient."""
        cross_entropy, divergence = torch.cat(self.sums.cross_entropy), torch.cat(self.sums.divergence)
        total = self.cross * cross_entropy.sum() + (self.share.squeeze(1) * divergence).sum()
        statistics = self._statistics(cross_entropy, divergence) if self.sums.others else None
        mean = (self.weights * divergence).sum() * self.inverse
        spread = self._spread(cross_entropy)
        return DistillationLoss(total, cross_entropy.sum() * self.inverse, mean, self.mask.sum(), statistics, spread)

    def _spread(self, values: Tensor) -> Tensor:
        """Numbers of the counted positions at their places, float32 ``[B, S]``."""
        empty = torch.zeros(self.mask.numel(), device=self.index.device)
        return empty.index_copy(0, self.index, values.float()).view(self.mask.shape)

    def _statistics(self, cross_entropy: Tensor, divergence: Tensor) -> Statistics:
        found = {name: torch.cat([block[name] for block in self.sums.others]) for name in self.sums.others[0]}
        found["cross_entropy"] = cross_entropy
        if self.targets is not None:
            found["divergence"] = divergence
        return Statistics(**{name: self._spread(values) for name, values in found.items()})


class _Accumulator:
    """Gradients of states, weight and bias, those that are wanted, over chunks."""

    def __init__(self, states: Tensor, head: OutputHead, wanted: list[bool]) -> None:
        self.head = head
        dtype = head.weight.dtype
        self.hidden = torch.zeros_like(states, dtype=dtype) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None

    def add(self, gradient: Tensor, states: Tensor, index: Tensor) -> None:
        """Those of the projection of a chunk, ``[n, V]``."""
        if self.hidden is not None:
            self.hidden.index_copy_(0, index, gradient @ self.head.weight)
        if self.weight is not None:
            self.weight.addmm_(gradient.T, states)
        if self.bias is not None:
            self.bias.add_(gradient.sum(dim=0))

    def finish(self, hidden: Tensor, head: OutputHead) -> list[Tensor | None]:
        """In the shapes and dtypes of what they are gradients of."""
        states = None if self.hidden is None else self.hidden.view(hidden.shape).to(hidden.dtype)
        weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return [states, weight, bias]


def _slices(length: int, step: int) -> Iterator[slice]:
    """All of a length in steps; one empty step of nothing, so that what comes of it has its usual shape."""
    return (slice(start, start + step) for start in range(0, max(1, length), step))
