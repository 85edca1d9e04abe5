"""Distillation from a teacher with another tokenizer: what is likely matters, not which token it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cheapertraining.distillation.losses import refuse_not_finite, shifted_mask, token_mean
from cheapertraining.errors import UserError

__all__ = ["universal_logit_loss"]


def universal_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    *,
    temperature: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Universal logit distillation (arXiv 2402.12030, eq. 5): ``sum_r |p_(r) - q_(r)|`` over ranks r.

    ``p_(r)`` is the r-th largest probability; the smaller vocabulary is filled up with zeros. It is the Wasserstein
    distance of the two distributions where all tokens are equally far from each other. Within a row, the k-th position
    that counts of the student is paired with the k-th of the teacher; those without a partner are left out. Add
    cross-entropy: the loss does not say which token is the likely one.

    Args:
        student_logits: ``[B, S, V]``.
        teacher_logits: ``[B, S', V']``, of the same texts in the teacher's tokens; no gradient goes there.
        student_labels: int64 ``[B, S]``, unshifted, -100 where no loss counts.
        teacher_labels: int64 ``[B, S']``, likewise.
        temperature: of both softmaxes.
        normalizer: what the sum is divided by; default: the number of pairs.

    Returns:
        Scalar, float32 (float64 for float64 logits); 0 where there is no pair.

    Raises:
        UserError: numbers of rows that differ, a temperature that is not positive, teacher logits that are not finite.
    """
    if len(student_logits) != len(teacher_logits):
        raise UserError(f"expected as many rows, found {len(student_logits)} and {len(teacher_logits)} of the teacher")
    if not temperature > 0:
        raise UserError(f"temperature: expected a number above 0, found {temperature}")
    masks = shifted_mask(student_labels), shifted_mask(teacher_labels)
    pairs = torch.minimum(*(mask.sum(dim=1) for mask in masks))
    q, p = (
        _sorted(logits[mask & (mask.cumsum(dim=1) <= pairs[:, None])], temperature)
        for logits, mask in zip((student_logits, teacher_logits.detach()), masks, strict=True)
    )
    refuse_not_finite(p[:, 0])
    size = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(values, (0, size - values.shape[-1])) for values in (p, q))
    distances = (p.to(q.dtype) - q).abs().sum(dim=-1)
    return token_mean(distances, torch.ones_like(distances, dtype=torch.bool), normalizer)


def _sorted(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities in descending order, float32 or float64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).softmax(dim=-1).sort(dim=-1, descending=True).values
