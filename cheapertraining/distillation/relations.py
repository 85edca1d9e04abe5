"""Relations between the positions of a sequence, as a layer's queries, keys or values have them.

With ``A`` the states of one relation head, ``[S, d]``, the relations are the rows of

* ``scaled``: ``R = softmax(A A^T / sqrt(d))`` (MiniLMv2, arXiv 2012.15828, eq. 6 and 7; BitDistill, arXiv 2510.13998,
  eq. 11 and 12);
* ``cosine``: ``R = softmax(C / temperature)`` with the cosines ``C`` of the rows of A (BitDistill's algorithm 1).

The two are different objectives: their gradients differ in direction, and in length by an order of magnitude. The loss
is ``KL(R_teacher, R_student)``, averaged over relation heads and positions. States are the projected ones (before
attention, not its probabilities), of any number of heads: their width is split anew into ``relation_heads``, so that
student and teacher need have neither width nor heads in common. Memory: ``B x relation_heads x S x S`` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cheapertraining.distillation.losses import token_mean
from cheapertraining.errors import UserError

__all__ = ["document_mask", "relation_loss"]

Form = Literal["scaled", "cosine"]


def document_mask(position_ids: Tensor, mask: Tensor) -> Tensor:
    """Which positions may be related: bool ``[B, S, S]``, both in ``mask`` and in one document.

    Args:
        position_ids: int64 ``[B, S]``, starting anew at each document.
        mask: bool ``[B, S]``, False at padding.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    document = starts.cumsum(dim=1)
    return (document[:, :, None] == document[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def relation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    *,
    relation_heads: int,
    position_ids: Tensor | None = None,
    form: Form = "scaled",
    temperature: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Sum over the kinds of states, such as queries, keys and values of one layer, of the module's loss.

    Args:
        student: one ``[B, S, width]`` a kind, heads beside each other; widths may differ by kind (grouped queries).
        teacher: the same kinds in the same order; no gradient goes there.
        mask: bool ``[B, S]``, the tokens that are related and counted: False at padding.
        relation_heads: that each width is split into.
        position_ids: int64 ``[B, S]``, starting anew at each document, to keep documents apart; None: a row is one.
        form: see the module.
        temperature: of ``cosine``.
        normalizer: what each kind's sum over positions is divided by; default: how many are counted.

    Returns:
        Scalar, float32 (float64 for float64 states); 0 where nothing counts.

    Raises:
        UserError: kinds that do not pair, a width that ``relation_heads`` does not divide, an unknown form.
    """
    if len(student) != len(teacher) or not student:
        raise UserError(f"relations: expected as many kinds of states, found {len(student)} and {len(teacher)}")
    if form not in ("scaled", "cosine"):
        raise UserError(f"form: expected 'scaled' or 'cosine', found '{form}'")
    if position_ids is None:
        position_ids = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    related = document_mask(position_ids, mask)
    total = torch.zeros((), device=mask.device)
    for own, other in zip(student, teacher, strict=True):
        log_q = _log_relations(own, mask, related, relation_heads, form, temperature)
        log_p = _log_relations(other.detach(), mask, related, relation_heads, form, temperature)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean(dim=1)
        total = total + token_mean(divergence, mask, normalizer)
    return total


def _log_relations(states: Tensor, mask: Tensor, related: Tensor, heads: int, form: Form, temperature: float) -> Tensor:
    """``log R``, ``[B, heads, S, S]``; finite everywhere, 0 in the sum where nothing is related."""
    batch, length, width = states.shape
    if width % heads:
        raise UserError(f"relation_heads: expected a divisor of the states' width {width}, found {heads}")
    # Whatever stands in padding must not reach the gradient of others, where 0 * NaN would be NaN.
    wide = torch.where(mask[..., None], states if states.dtype == torch.float64 else states.float(), 0)
    split = wide.view(batch, length, heads, width // heads).transpose(1, 2)
    if form == "cosine":
        unit = F.normalize(split, dim=-1)
        scores = unit @ unit.transpose(-1, -2) / temperature
    else:
        scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    return scores.masked_fill(~related[:, None], torch.finfo(scores.dtype).min / 2).log_softmax(dim=-1)
