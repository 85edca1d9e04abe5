"""A student's hidden states drawn to a teacher's, layer by layer, through a learned projection where widths differ."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cheapertraining.distillation.losses import token_mean
from cheapertraining.errors import UserError

__all__ = ["HiddenProjection", "hidden_loss"]


class HiddenProjection(nn.Module):
    """A linear map from the student's width to the teacher's, for training only: drop it at export.

    Args:
        student_width: of the student's hidden states.
        teacher_width: of the teacher's.
        seed: of the initial weights, which are orthogonal (columns or rows, whichever are fewer): lengths and angles
            that fit are kept. Global random state is left as it was.
    """

    def __init__(self, student_width: int, teacher_width: int, *, seed: int = 0) -> None:
        super().__init__()
        weight = torch.empty(teacher_width, student_width)
        nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., student_width]`` to ``[..., teacher_width]``, in the dtype of ``hidden``."""
        return F.linear(hidden, self.weight.to(hidden.dtype))


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    form: Literal["mse", "cosine"] = "mse",
    projection: HiddenProjection | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Distance of hidden states, averaged over positions.

    ``mse`` is the mean over the width of ``(W h_s - h_t)^2`` (FitNets, arXiv 1412.6550, eq. 3; there with a half),
    ``cosine`` is ``1 - cos(W h_s, h_t)`` (DistilBERT, arXiv 1910.01108, section 3).

    Args:
        student: ``[B, S, Hs]``.
        teacher: ``[B, S, Ht]``; no gradient goes there.
        mask: bool ``[B, S]``, which positions count.
        form: see above.
        projection: W; needed where the widths differ.
        normalizer: what the sum is divided by; default: how many positions count.

    Returns:
        Scalar, float32 (float64 for float64 states); 0 where nothing counts.

    Raises:
        UserError: widths that differ and no projection, an unknown form.
    """
    index = mask.flatten().nonzero().squeeze(1)
    own, other = (states.flatten(0, 1).index_select(0, index) for states in (student, teacher.detach()))
    own = own if own.dtype == torch.float64 else own.float()
    if projection is not None:
        own = projection(own)
    if own.shape != other.shape:
        raise UserError(
            f"hidden states: expected one width, found {own.shape[-1]} of the student and {other.shape[-1]} of the "
            f"teacher: give a HiddenProjection({student.shape[-1]}, {teacher.shape[-1]})"
        )
    other = other.to(own.dtype)
    if form == "mse":
        distances = (own - other).square().mean(dim=-1)
    elif form == "cosine":
        distances = 1 - F.cosine_similarity(own, other, dim=-1)
    else:
        raise UserError(f"form: expected 'mse' or 'cosine', found '{form}'")
    return token_mean(distances, torch.ones_like(index, dtype=torch.bool), normalizer)
