"""Loss and gradient of a block of positions in closed form, the gradient written over the logits.

Arguments are rows: ``logits`` ``[n, V]`` float32 or float64 (overwritten), targets ``[n, ...]``, ``following`` int64
``[n]`` (the label of the next token). ``cross`` and ``share`` are the factors of cross-entropy (scalar) and divergence
(``[n, 1]``, T^2 included) in the total. Slopes are those of :mod:`~cheapertraining.distillation.divergences`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapertraining.distillation.divergences import FLOOR, Divergence, log_softmax
from cheapertraining.distillation.sparse import bucketed
from cheapertraining.distillation.targets import DenseTargets, SampledTargets, TopKTargets

__all__ = ["Objective", "RowTargets", "block_loss"]

RowTargets = DenseTargets | TopKTargets | SampledTargets


@dataclass(frozen=True)
class Objective:
    """What is minimised: which divergence, at which temperature, and whether the gradient is wanted."""

    divergence: Divergence
    temperature: float
    gradient: bool


def block_loss(
    logits: Tensor, targets: RowTargets | None, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence (neither weighted, no T^2), each ``[n]``.

    With ``objective.gradient``, ``logits`` then hold the gradient of ``sum(cross CE + share D)``; else nothing.
    """
    if targets is None:
        losses = _cross_entropy(logits, following, cross, objective.gradient)
        return losses, torch.zeros_like(losses)
    if objective.temperature == 1:
        return _combined(logits, targets, following, cross, share, objective)
    # D is of q_T, which takes a softmax of its own: dD/dz = (dD/d(z/T)) / T.
    cooled = logits / objective.temperature
    nothing = torch.zeros_like(cross)
    _, divergences = _combined(cooled, targets, following, nothing, share / objective.temperature, objective)
    losses = _cross_entropy(logits, following, cross, objective.gradient)
    if objective.gradient:
        logits.add_(cooled)
    return losses, divergences


def _combined(
    logits: Tensor, targets: RowTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    if isinstance(targets, TopKTargets):
        return _top_k(logits, targets, following, cross, share, objective)
    if isinstance(targets, SampledTargets):
        return _sampled(logits, targets, following, cross, share, objective.gradient)
    return _dense(logits, targets, following, cross, share, objective)


def _exp(logits: Tensor) -> Tensor:
    """Overwrite logits by ``exp(logits - max)``; return max, ``[n, 1]``."""
    top = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    logits.sub_(top).exp_()
    return top


def _cross_entropy(logits: Tensor, following: Tensor, cross: Tensor, gradient: bool) -> Tensor:
    at = following[:, None]
    label = logits.gather(1, at)
    top = _exp(logits)
    total = logits.sum(dim=-1, keepdim=True)
    if gradient:
        logits.mul_(cross / total).scatter_add_(1, at, -cross.expand_as(label))
    return (top + total.log() - label).squeeze(1)


def _sampled(
    logits: Tensor, targets: SampledTargets, following: Tensor, cross: Tensor, share: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    at, weights = following[:, None], targets.weights.to(logits.dtype)
    label, drawn = logits.gather(1, at), logits.gather(1, targets.ids)
    top = _exp(logits)
    total = logits.sum(dim=-1, keepdim=True)
    normalizer = top + total.log()
    if gradient:
        logits.mul_((cross + share * weights.sum(dim=-1, keepdim=True)) / total)
        logits.scatter_add_(1, targets.ids, -share * weights)
        logits.scatter_add_(1, at, -cross.expand_as(label))
    return (normalizer - label).squeeze(1), (weights * (normalizer - drawn)).sum(dim=-1)


def _top_k(
    logits: Tensor, targets: TopKTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    at, ids = following[:, None], targets.ids
    label, kept = logits.gather(1, at), logits.gather(1, ids)
    # The tail on its own: its mass is exact however small, and the tokens kept are written without cancellation.
    logits.scatter_(1, ids, -torch.inf)
    top = _exp(logits)
    mass = logits.sum(dim=-1, keepdim=True)
    outcomes = torch.cat([kept, top + mass.log()], dim=-1)
    normalizer = outcomes.logsumexp(dim=-1, keepdim=True)
    log_q = outcomes.sub_(normalizer).clamp_(min=FLOOR)
    log_p = bucketed(targets, logits.dtype)
    divergences, slope = objective.divergence.value_and_slope(log_p, log_q)
    if objective.gradient:
        inner = share * slope + log_q.exp() * (cross - share * slope.sum(dim=-1, keepdim=True))
        logits.mul_(inner[:, -1:] / mass.clamp(min=torch.finfo(logits.dtype).tiny))
        logits.scatter_(1, ids, inner[:, :-1])
        logits.scatter_add_(1, at, -cross.expand_as(label))
    return (normalizer - label).squeeze(1), divergences


def _dense(
    logits: Tensor, targets: DenseTargets, following: Tensor, cross: Tensor, share: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    at = following[:, None]
    teacher = targets.logits.to(logits.dtype)
    log_p = log_softmax(teacher / objective.temperature if objective.temperature != 1 else teacher)
    log_q = log_softmax(logits)
    losses = -log_q.gather(1, at).squeeze(1)
    divergences, slope = objective.divergence.value_and_slope(log_p, log_q)
    if objective.gradient:
        slope.mul_(share)
        torch.addcmul(slope, log_q.exp_(), cross - slope.sum(dim=-1, keepdim=True), out=logits)
        logits.scatter_add_(1, at, -cross.expand(len(at), 1))
    return losses, divergences
