"""Liger's fused linear cross-entropy in place of ours, on CUDA, where it computes the same.

That is cross-entropy alone, in float32. Of half-precision states Liger makes half-precision logits (linkedin/
Liger-Kernel issue 1432), it has no fused kernel for a divergence from a teacher (its chunked loss is autograd over
chunks, without T^2), and none for stored targets: there ours is used. Liger (`pip install liger-kernel`) is no
dependency.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from cheapertraining.data.collate import IGNORED
from cheapertraining.distillation.losses import DistillationLoss, next_labels
from cheapertraining.distillation.targets import OutputHead

__all__ = ["fits", "fused_cross_entropy"]


def fits(hidden: Tensor, head: OutputHead) -> bool:
    """Whether Liger is installed and its kernel is exact for these states and this head."""
    exact = hidden.dtype == head.weight.dtype == torch.float32 and head.logit_scale == 1.0
    return hidden.is_cuda and exact and importlib.util.find_spec("liger_kernel") is not None


def fused_cross_entropy(
    hidden: Tensor, head: OutputHead, labels: Tensor, normalizer: float | Tensor | None
) -> DistillationLoss:
    """Cross-entropy as :func:`~cheapertraining.distillation.chunked.chunked_distillation_loss` gives it without
    targets, but without numbers by position."""
    kernel = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, reduction="sum", softcap=head.soft_cap
    )
    following = next_labels(labels)
    tokens = (following != IGNORED).sum()
    with torch.autocast(hidden.device.type, enabled=False):
        total = kernel(head.weight, hidden.flatten(0, 1), following.flatten(), head.bias)
    mean = total / (tokens if normalizer is None else torch.as_tensor(normalizer)).clamp(min=1)
    return DistillationLoss(mean, mean.detach(), torch.zeros_like(mean).detach(), tokens)
