"""What is worth logging about a block of positions, from logits that are at hand anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapertraining.distillation.targets import DenseTargets, SampledTargets, TopKTargets
from cheapertraining.distillation.vocabulary_parallel import WHOLE, Vocabulary

__all__ = ["block_statistics"]


def block_statistics(
    logits: Tensor, targets: DenseTargets | TopKTargets | SampledTargets | None, vocabulary: Vocabulary = WHOLE
) -> dict[str, Tensor]:
    """Fields of :class:`~cheapertraining.distillation.losses.Statistics`, each ``[n]``, but for the losses.

    Args:
        logits: the student's, ``[n, V]``, or the rank's part of them; left as they are.
        targets: rows of ``n``; logits among them in parts as the student's.
        vocabulary: what ``logits`` are about.
    """
    log_q = vocabulary.log_softmax(logits)
    q = log_q.exp()
    sums = {"student_entropy": -(q * log_q).sum(dim=-1, keepdim=True)}
    likeliest = None
    if isinstance(targets, DenseTargets):
        log_p = vocabulary.log_softmax(targets.logits.to(logits.dtype))
        p = log_p.exp()
        sums["teacher_entropy"] = -(p * log_p).sum(dim=-1, keepdim=True)
        sums["acceptance"] = torch.minimum(p, q).sum(dim=-1, keepdim=True)
        likeliest = vocabulary.likeliest(targets.logits)
    elif isinstance(targets, TopKTargets):
        likeliest = targets.ids.gather(1, targets.log_probs.argmax(dim=-1, keepdim=True)).squeeze(1)
    whole = vocabulary.sums(*sums.values())
    found = {name: each.squeeze(1) for name, each in zip(sums, whole, strict=True)}
    if likeliest is not None:
        found["agreement"] = likeliest == vocabulary.likeliest(logits)
    return found
