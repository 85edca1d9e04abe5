"""Loss and gradient of a block of positions in closed form, the gradient written over the logits.

Arguments are rows: ``logits`` ``[n, V]`` float32 or float64 (overwritten), targets ``[n, ...]``, ``following`` int64
``[n]`` (the label of the next token). ``cross`` and ``share`` are the factors of cross-entropy (scalar) and divergence
(``[n, 1]``, T^2 included) in the total. Slopes are those of :mod:`~cheapertraining.distillation.divergences`. Where
ranks share a vocabulary, logits of student and teacher are the rank's part of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapertraining.distillation.divergences import FLOOR, Divergence
from cheapertraining.distillation.sparse import bucketed
from cheapertraining.distillation.targets import DenseTargets, SampledTargets, TopKTargets
from cheapertraining.distillation.vocabulary_parallel import WHOLE, Vocabulary

__all__ = ["Objective", "RowTargets", "block_loss"]

RowTargets = DenseTargets | TopKTargets | SampledTargets


@dataclass(frozen=True)
class Objective:
    """What is minimised: which divergence, at which temperature, whether the gradient is wanted, over what."""

    divergence: Divergence
    temperature: float
    gradient: bool
    vocabulary: Vocabulary = WHOLE


def block_loss(
    logits: Tensor, targets: RowTargets | None, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence (neither weighted, no T^2), each ``[n]``.

    With ``objective.gradient``, ``logits`` then hold the gradient of ``sum(cross CE + share D)``; else nothing.
    """
    if targets is None:
        losses = _cross_entropy(logits, following, cross, objective)
        return losses, torch.zeros_like(losses)
    if objective.temperature == 1:
        return _combined(logits, targets, following, cross, share, objective)
    # D is of q_T, which takes a softmax of its own: dD/dz = (dD/d(z/T)) / T.
    cooled = logits / objective.temperature
    nothing = torch.zeros_like(cross)
    _, divergences = _combined(cooled, targets, following, nothing, share / objective.temperature, objective)
    losses = _cross_entropy(logits, following, cross, objective)
    if objective.gradient:
        logits.add_(cooled)
    return losses, divergences


def _combined(
    logits: Tensor, targets: RowTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    if isinstance(targets, TopKTargets):
        return _top_k(logits, targets, following, cross, share, objective)
    if isinstance(targets, SampledTargets):
        return _sampled(logits, targets, following, cross, share, objective)
    return _dense(logits, targets, following, cross, share, objective)


def _exp(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Overwrite logits by ``exp(logits - max)``; return max, ``[n, 1]``."""
    top = vocabulary.largest(logits).clamp(min=torch.finfo(logits.dtype).min)
    logits.sub_(top).exp_()
    return top


def _cross_entropy(logits: Tensor, following: Tensor, cross: Tensor, objective: Objective) -> Tensor:
    at, vocabulary = following[:, None], objective.vocabulary
    label = vocabulary.take(logits, at)
    top = _exp(logits, vocabulary)
    total, label = vocabulary.sums(logits.sum(dim=-1, keepdim=True), label)
    if objective.gradient:
        vocabulary.add(logits.mul_(cross / total), at, -cross.expand_as(label))
    return (top + total.log() - label).squeeze(1)


def _sampled(
    logits: Tensor, targets: SampledTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    at, weights, vocabulary = following[:, None], targets.weights.to(logits.dtype), objective.vocabulary
    label, drawn = vocabulary.take(logits, at), vocabulary.take(logits, targets.ids)
    top = _exp(logits, vocabulary)
    total, label, drawn = vocabulary.sums(logits.sum(dim=-1, keepdim=True), label, drawn)
    normalizer = top + total.log()
    if objective.gradient:
        logits.mul_((cross + share * weights.sum(dim=-1, keepdim=True)) / total)
        vocabulary.add(logits, targets.ids, -share * weights)
        vocabulary.add(logits, at, -cross.expand_as(label))
    return (normalizer - label).squeeze(1), (weights * (normalizer - drawn)).sum(dim=-1)


def _top_k(
    logits: Tensor, targets: TopKTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    at, ids, vocabulary = following[:, None], targets.ids, objective.vocabulary
    label, kept = vocabulary.take(logits, at), vocabulary.take(logits, ids)
    # The tail on its own: its mass is exact however small, and the tokens kept are written without cancellation.
    vocabulary.put(logits, ids, -torch.inf)
    top = _exp(logits, vocabulary)
    mass, label, kept = vocabulary.sums(logits.sum(dim=-1, keepdim=True), label, kept)
    outcomes = torch.cat([kept, top + mass.log()], dim=-1)
    normalizer = outcomes.logsumexp(dim=-1, keepdim=True)
    log_q = outcomes.sub_(normalizer).clamp_(min=FLOOR)
    log_p = bucketed(targets, logits.dtype)
    divergences, slope = objective.divergence.value_and_slope(log_p, log_q)
    if objective.gradient:
        inner = share * slope + log_q.exp() * (cross - share * slope.sum(dim=-1, keepdim=True))
        logits.mul_(inner[:, -1:] / mass.clamp(min=torch.finfo(logits.dtype).tiny))
        vocabulary.put(logits, ids, inner[:, :-1])
        vocabulary.add(logits, at, -cross.expand_as(label))
    return (normalizer - label).squeeze(1), divergences


def _dense(
    logits: Tensor, targets: DenseTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    at, vocabulary = following[:, None], objective.vocabulary
    teacher = targets.logits.to(logits.dtype)
    log_p = vocabulary.log_softmax(teacher / objective.temperature if objective.temperature != 1 else teacher)
    log_q = vocabulary.log_softmax(logits)
    label = vocabulary.take(log_q, at)
    divergences, slope = objective.divergence.value_and_slope(log_p, log_q)
    label, divergence = vocabulary.sums(label, divergences[:, None])
    if objective.gradient:
        slope.mul_(share)
        (through,) = vocabulary.sums(slope.sum(dim=-1, keepdim=True))
        torch.addcmul(slope, log_q.exp_(), cross - through, out=logits)
        vocabulary.add(logits, at, -cross.expand(len(at), 1))
    return -label.squeeze(1), divergence.squeeze(1)
