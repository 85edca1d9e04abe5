"""Loss of each sample of a batch, from logits and unshifted labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["IGNORED", "per_sample_loss", "token_losses"]

IGNORED = -100
"""Label of a position that no loss is computed for."""


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy of each position.

    Position ``t`` predicts label ``t + 1``. The first label of each document is ``IGNORED`` (and so is
    ``labels[:, 0]``), so no document predicts the next one's beginning and shifting loses no token.

    Args:
        logits: ``[B, S, V]``, any floating dtype.
        labels: int64 ``[B, S]``, unshifted; ``-100`` where no loss counts.

    Returns:
        ``(losses, counted)``: nats, float32 (float64 for float64 logits) ``[B, S]``, 0 where no loss counts,
        with gradient; and bool ``[B, S]``, where one does.
    """
    batch, length, vocabulary = logits.shape
    # Labels move, not logits: slicing logits would copy the largest tensor of the step.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        wide.reshape(batch * length, vocabulary), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(batch, length), targets != IGNORED


def per_sample_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum :func:`token_losses` over each sample.

    Returns:
        ``(sums, tokens)``: nats, float32 ``[B]`` (float64 for float64 logits), with gradient; and the number
        of tokens summed over, int64 ``[B]``. A sample without any has the sum 0.
    """
    losses, counted = token_losses(logits, labels)
    return losses.sum(dim=1), counted.sum(dim=1)
