"""Cross-entropy over logits whose vocabulary is cut across ranks (Megatron-LM, arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cheapertraining.influence.losses import IGNORED

__all__ = ["vocabulary_parallel_token_losses"]


def vocabulary_parallel_token_losses(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~cheapertraining.influence.losses.token_losses` where each rank holds a part of the vocabulary.

    With ``m`` the largest logit, ``log(sum exp(z - m)) + m - z_label`` needs three numbers a position from the other
    ranks (a maximum and two sums), and its gradient, ``softmax(z) - onehot``, none.

    Args:
        logits: ``[B, S, V / n]`` on the ``r``-th of ``n`` ranks: ids ``r V / n`` to ``(r + 1) V / n``.
        labels: int64 ``[B, S]``, unshifted, the same on all ranks of the group; -100 where no loss counts.
        group: the ranks that share the vocabulary.

    Returns:
        ``(losses, counted)``, the same on all ranks of the group: nats, float32 (float64 for float64 logits)
        ``[B, S]``, with gradient; and bool ``[B, S]``.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counted = targets != IGNORED
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses: torch.Tensor = _CrossEntropy.apply(wide, targets, counted, group)  # type: ignore[no-untyped-call]
    return losses, counted


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        width = logits.shape[-1]
        local = targets - dist.get_rank(group) * width
        here = counted & (local >= 0) & (local < width)
        column = torch.where(here, local, 0)
        largest = logits.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - largest[..., None]).exp_()
        label = (logits.gather(-1, column[..., None])[..., 0] - largest) * here
        sums = torch.stack([exponentials.sum(dim=-1), label])
        dist.all_reduce(sums, group=group)
        total, label = sums
        ctx.save_for_backward(exponentials.div_(total[..., None]), column, here, counted)
        losses: torch.Tensor = (total.log() - label) * counted
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[torch.Tensor, None, None, None]:
        probabilities, column, here, counted = ctx.saved_tensors
        gradient = probabilities.clone()
        gradient.scatter_add_(-1, column[..., None], -here[..., None].to(gradient.dtype))
        return gradient.mul_((outputs[0] * counted)[..., None]), None, None, None
