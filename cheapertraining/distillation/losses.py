"""Distillation losses from full logits: the plain form, by autograd, that everything faster is held to.

    total = (1 - alpha) CE + alpha T^2 D(p_T, q_T)

summed over the positions that count and divided by their number (Hinton et al. 2015, arXiv 1503.02531): ``p_T`` and
``q_T`` are teacher's and student's softmax of logits / T, CE is at T = 1. Labels are as in batches, unshifted, and -100
where no loss counts; position ``n`` predicts, and counts with, label ``n + 1``. All is computed in float32, in float64
for float64 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cheapertraining.data.collate import IGNORED
from cheapertraining.distillation.divergences import FORWARD_KL, Divergence, log_softmax
from cheapertraining.distillation.sparse import sampled_divergence, top_k_divergence
from cheapertraining.distillation.targets import DenseTargets, HiddenTargets, SampledTargets, Targets, TopKTargets
from cheapertraining.errors import UserError

__all__ = [
    "DistillationLoss",
    "Statistics",
    "distillation_loss",
    "divergence_of_logits",
    "next_labels",
    "shifted_mask",
    "token_mean",
]


@dataclass(frozen=True)
class Statistics:
    """Position by position, float32 ``[B, S]``, detached, at temperature 1 but for ``divergence``; 0 where no loss
    counts. None: the targets do not tell.

    Attributes:
        cross_entropy: with the label, nats.
        divergence: without weights and T^2, nats; from sampled targets, the cross-entropy with them.
        agreement: 1 where student and teacher find the same token likeliest (not from sampled targets).
        student_entropy: nats.
        teacher_entropy: nats (from whole distributions alone).
        acceptance: ``sum_v min(p, q)``, the share of the student's drafts that speculative decoding would accept
            (arXiv 2211.17192, corollary 3.6; from whole distributions alone).
    """

    cross_entropy: Tensor
    student_entropy: Tensor
    divergence: Tensor | None = None
    agreement: Tensor | None = None
    teacher_entropy: Tensor | None = None
    acceptance: Tensor | None = None


@dataclass(frozen=True)
class DistillationLoss:
    """A loss and its parts.

    Attributes:
        total: ``(1 - alpha) cross_entropy + alpha T^2 divergence``, a scalar with gradient.
        cross_entropy: scalar, detached.
        divergence: scalar, detached, token weights included; from sampled targets, the cross-entropy with them, which
            is above the KL by the teacher's entropy. 0 without targets.
        tokens: int64 scalar, how many positions count.
        statistics: where they were asked for.
        cross_entropies: position by position, float32 ``[B, S]``, detached, 0 where no loss counts; from
            :func:`~cheapertraining.distillation.chunked.chunked_distillation_loss` only, and not from a fused kernel.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    tokens: Tensor
    statistics: Statistics | None = None
    cross_entropies: Tensor | None = None


def next_labels(labels: Tensor) -> Tensor:
    """Label ``n + 1`` at position ``n``, -100 at the last: int64 ``[B, S]`` from unshifted int64 ``[B, S]``."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def shifted_mask(labels: Tensor) -> Tensor:
    """Which positions count: bool ``[B, S]`` from unshifted labels, int64 ``[B, S]``."""
    return next_labels(labels) != IGNORED


def token_mean(values: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Sum ``values`` ``[B, S]`` where ``mask`` ``[B, S]`` and divide by ``normalizer`` (default: how many these are).

    Nothing that counts gives 0. A normalizer of all microbatches and ranks makes the gradient the same however a batch
    is split.
    """
    total = torch.where(mask, values, 0).sum()
    return total / (mask.sum() if normalizer is None else torch.as_tensor(normalizer)).clamp(min=1)


def divergence_of_logits(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence = FORWARD_KL,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """``D(p_T, q_T)`` position by position, without the factor T^2.

    Args:
        student: logits ``[..., V]``, any floating dtype. A logit of -inf takes a token out of the vocabulary.
        teacher: logits ``[..., V']``. A token that only the teacher (the student, for reverse forms) holds possible
            costs 1e30 nats by its probability.
        divergence: which one.
        temperature: T.
        vocab_size: of the tokenizer; columns beyond are padding and left out on both sides. Default: V, which must
            then be V'.

    Returns:
        ``[...]``, nats, float32 or float64.

    Raises:
        UserError: the sizes of the vocabularies differ, or are less than ``vocab_size``.
    """
    size = common_vocabulary(student.shape[-1], teacher.shape[-1], vocab_size)
    return divergence.value(_log_probs(teacher, size, temperature), _log_probs(student, size, temperature))


def _log_probs(logits: Tensor, size: int, temperature: float) -> Tensor:
    kept = logits[..., :size]
    wide = kept if kept.dtype == torch.float64 else kept.float()
    return log_softmax(wide / temperature if temperature != 1 else wide)


def common_vocabulary(student: int, teacher: int | None, vocab_size: int | None) -> int:
    """How many tokens student and teacher (None: not told) share.

    Raises:
        UserError: see :func:`divergence_of_logits`.
    """
    sizes = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    if vocab_size is None:
        if len(set(sizes.values())) > 1:
            raise UserError(
                f"expected logits of one vocabulary, found {student} of the student and {teacher} of the teacher: give "
                f"vocab_size, if both have the same tokenizer and are padded, or use universal_logit_loss"
            )
        return student
    for whose, size in sizes.items():
        if size < vocab_size:
            raise UserError(f"vocab_size is {vocab_size}, but the {whose} has logits for {size} tokens only")
    return vocab_size


def check_settings(targets: Targets | None, temperature: float, alpha: float) -> None:
    """Refuse what no loss can be made of.

    Raises:
        UserError: ``alpha`` outside of [0, 1], a temperature that is not positive or not that of stored targets.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected a number from 0 to 1, found {alpha}")
    if not temperature > 0:
        raise UserError(f"temperature: expected a number above 0, found {temperature}")
    if isinstance(targets, TopKTargets | SampledTargets) and targets.temperature != temperature:
        raise UserError(
            f"temperature: the targets were stored at {targets.temperature:g} and cannot be turned into those at "
            f"{temperature:g}: set it to {targets.temperature:g}, or store them anew"
        )


def position_weights(token_weights: Tensor | None, mask: Tensor) -> Tensor | None:
    """``[B]`` or ``[B, S]`` as ``[B, S]``.

    Raises:
        UserError: another shape.
    """
    if token_weights is None:
        return None
    if token_weights.shape not in (mask.shape, mask.shape[:1]):
        raise UserError(
            f"token_weights: expected shape {list(mask.shape[:1])} or {list(mask.shape)}, "
            f"found {list(token_weights.shape)}"
        )
    return token_weights if token_weights.ndim == 2 else token_weights[:, None].expand(mask.shape)


def distillation_loss(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor,
    *,
    divergence: Divergence = FORWARD_KL,
    temperature: float = 1.0,
    alpha: float = 0.5,
    normalizer: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> DistillationLoss:
    """The loss of the module's formula. Use :func:`~cheapertraining.distillation.chunked.chunked_distillation_loss`
    where hidden states are at hand: it gives the same without whole logits.

    Args:
        student_logits: ``[B, S, V]``, with scale and soft-cap of the student's head.
        targets: of the teacher; no gradient goes there.
        labels: int64 ``[B, S]``, unshifted, -100 where no loss counts.
        divergence: forward KL alone with :class:`SampledTargets`.
        temperature: T; that of stored targets.
        alpha: share of the divergence, from 0 to 1.
        normalizer: what sums are divided by; default: the number of positions that count, or 1 where none does.
        token_weights: ``[B]`` or ``[B, S]``, factors of the divergence, such as one by source.
        vocab_size: see :func:`divergence_of_logits`.

    Raises:
        UserError: settings, shapes or targets that do not fit; a target row that is not finite.
    """
    check_settings(targets, temperature, alpha)
    known = targets.vocabulary if isinstance(targets, DenseTargets | HiddenTargets) else None
    size = common_vocabulary(student_logits.shape[-1], known, vocab_size)
    mask = shifted_mask(labels)
    index = mask.flatten().nonzero().squeeze(1)
    logits = student_logits.flatten(0, 1).index_select(0, index)
    following = next_labels(labels).flatten().index_select(0, index)
    log_q = _log_probs(logits, size, temperature)
    rows = targets.rows(index)
    if isinstance(rows, TopKTargets):
        found = top_k_divergence(log_q, rows, divergence)
    elif isinstance(rows, SampledTargets):
        found = sampled_divergence(log_q, rows, divergence)
    else:
        refuse_not_finite(rows.logits[..., :size].amax(dim=-1))
        found = divergence.value(_log_probs(rows.logits.detach(), size, temperature), log_q)
    cross = F.nll_loss(_log_probs(logits, size, 1.0), following, reduction="none")
    weights = position_weights(token_weights, mask)
    weighted = found if weights is None else found * weights.flatten().index_select(0, index)
    counted = torch.ones_like(index, dtype=torch.bool)
    cross_entropy = token_mean(cross, counted, normalizer)
    mean = token_mean(weighted, counted, normalizer)
    total = (1 - alpha) * cross_entropy + alpha * temperature**2 * mean
    return DistillationLoss(total, cross_entropy.detach(), mean.detach(), mask.sum())


def refuse_not_finite(per_position: Tensor) -> None:
    """Raise UserError where a number of the teacher, one a position, is NaN or infinite (on CUDA: one synchronization).

    The largest logit, or the log-normalizer, of a row shows whether any of it is NaN.
    """
    if not bool(torch.isfinite(per_position).all()):
        bad = int((~torch.isfinite(per_position)).sum())
        raise UserError(
            f"the teacher's targets are not finite at {bad} of {per_position.numel()} counted positions: look at its "
            f"weights and precision (float16 overflows where bfloat16 does not), or at what was stored"
        )
