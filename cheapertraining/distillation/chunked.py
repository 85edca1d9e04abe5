"""Distillation from hidden states, chunk by chunk: whole logits ``[B, S, V]`` never exist.

The gradient is computed along with the loss, so nothing of size V outlives its chunk and backward only multiplies.
"""

from __future__ import annotations

from torch import Tensor

from cheapertraining.distillation.divergences import FORWARD_KL, Divergence
from cheapertraining.distillation.losses import DistillationLoss, distillation_loss
from cheapertraining.distillation.targets import OutputHead, Targets

__all__ = ["chunked_distillation_loss"]


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
) -> DistillationLoss:
    """:func:`~cheapertraining.distillation.losses.distillation_loss` from hidden states.

    Args:
        hidden: ``[B, S, H]``, what the student's head multiplies.
        head: the student's, its weight whole (under FSDP2: unsharded, as within the root's forward).
        targets: of the teacher; None: cross-entropy alone, whatever ``alpha``.
        labels: int64 ``[B, S]``, unshifted, -100 where no loss counts.
        chunk_tokens: positions at a time; default: by vocabulary and device.
        statistics: return :class:`~cheapertraining.distillation.losses.Statistics` as well.

    Others are as in `distillation_loss`.
    """
    assert targets is not None
    assert not statistics
    return distillation_loss(
        head.logits(hidden),
        targets,
        labels,
        divergence=divergence,
        temperature=temperature,
        alpha=alpha,
        normalizer=normalizer,
        token_weights=token_weights,
        vocab_size=vocab_size,
    )
