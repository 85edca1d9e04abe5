"""What is worth logging about a block of positions, from logits that are at hand anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapertraining.distillation.divergences import log_softmax
from cheapertraining.distillation.targets import DenseTargets, SampledTargets, TopKTargets

__all__ = ["block_statistics"]


def block_statistics(logits: Tensor, targets: DenseTargets | TopKTargets | SampledTargets | None) -> dict[str, Tensor]:
    """Fields of :class:`~cheapertraining.distillation.losses.Statistics`, each ``[n]``, but for the losses.

    Args:
        logits: the student's, ``[n, V]``; left as they are.
        targets: rows of ``n``.
    """
    log_q = log_softmax(logits)
    q = log_q.exp()
    found = {"student_entropy": -(q * log_q).sum(dim=-1)}
    if isinstance(targets, DenseTargets):
        log_p = log_softmax(targets.logits.to(logits.dtype))
        p = log_p.exp()
        found["teacher_entropy"] = -(p * log_p).sum(dim=-1)
        found["acceptance"] = torch.minimum(p, q).sum(dim=-1)
        found["agreement"] = targets.logits.argmax(dim=-1) == logits.argmax(dim=-1)
    elif isinstance(targets, TopKTargets):
        likeliest = targets.ids.gather(1, targets.log_probs.argmax(dim=-1, keepdim=True)).squeeze(1)
        found["agreement"] = likeliest == logits.argmax(dim=-1)
    return found
