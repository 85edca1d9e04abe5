"""Targets of a few tokens a position: how they are taken from logits, and what they say about a student.

* Top-k with a tail bucket: the divergence of the distributions over ``K + 1`` outcomes, the last of which is "any
  other token". By the data-processing inequality it is at most the whole one, and every divergence is defined on it.
* Importance-sampled tokens (RS-KD, Anshumann et al. 2025, arXiv 2503.16870): ``-sum_i t_i log q_i`` with E[t] = p is,
  on average, the cross-entropy with the teacher, and its gradient that of forward KL. What is not linear in ``p``
  has no such estimate.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cheapertraining.distillation.divergences import FLOOR, Divergence
from cheapertraining.distillation.targets import SampledTargets, TopKTargets
from cheapertraining.errors import UserError

__all__ = ["renormalized", "sample_targets", "sampled_divergence", "top_k_divergence", "top_k_targets"]


def top_k_targets(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopKTargets:
    """The ``k`` likeliest tokens of a teacher's logits ``[B, S, V]``, in descending order, with the tail's mass.

    Raises:
        UserError: ``k`` is less than 1 or more than ``V``.
    """
    vocabulary = logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise UserError(f"k: expected 1 to {vocabulary} (the teacher's vocabulary), found {k}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = (wide / temperature).log_softmax(dim=-1)
    log_probs, ids = log_p.topk(k, dim=-1)
    # Not log(1 - sum): a tail of 1e-9 would be rounding.
    tail = log_p.scatter(-1, ids, -math.inf).logsumexp(dim=-1)
    return TopKTargets(ids, log_probs, tail, temperature)


def renormalized(targets: TopKTargets) -> TopKTargets:
    """The same without tail, scaled to sum to 1. A baseline that is known to be biased: the student learns that all
    other tokens are impossible (arXiv 2503.16870, section 3)."""
    log_probs = targets.log_probs.log_softmax(dim=-1)
    return replace(targets, log_probs=log_probs, tail=torch.full_like(targets.tail, -math.inf))


def sample_targets(
    logits: Tensor,
    rounds: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
) -> SampledTargets:
    """Draw ``rounds`` tokens a position with replacement, equal ones merged.

    With ``proposal_temperature`` R other than 1 tokens are drawn from ``r ~ p^(1/R)`` and get the importance weights
    ``p / r``, scaled to sum to 1: of less variance in the tail for R > 1, with a bias of order 1 / rounds (arXiv
    2503.16870, section 4). With 1 the weights are counts / rounds, without bias.

    Args:
        logits: ``[B, S, V]`` of the teacher.
        rounds: draws a position.
        generator: on the device of the logits.
        temperature: of the distribution to estimate.
        proposal_temperature: R.

    Returns:
        Targets with ``K`` the largest number of distinct tokens at any position, in ascending order of ids; entries
        that are not used have weight 0 and id 0.

    Raises:
        UserError: ``rounds`` is less than 1; a row of logits has NaN or an infinite maximum.
    """
    if rounds < 1:
        raise UserError(f"rounds: expected at least 1, found {rounds}")
    wide = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    if not bool(torch.isfinite(wide.amax(dim=-1)).all()):
        raise UserError("the teacher's logits have NaN or no finite maximum: look at its weights and precision")
    log_p = wide.log_softmax(dim=-1)
    log_r = (wide / proposal_temperature).log_softmax(dim=-1)
    shape = logits.shape[:-1]
    drawn = torch.multinomial(log_r.exp().flatten(0, -2), rounds, replacement=True, generator=generator)
    ids = drawn.view(*shape, rounds).sort(dim=-1).values
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[..., 1:] = ids[..., 1:] != ids[..., :-1]
    slot = starts.cumsum(dim=-1) - 1
    width = int(slot.max()) + 1 if slot.numel() else 1
    merged = ids.new_zeros(*shape, width).scatter(-1, slot, ids)
    counts = log_p.new_zeros(*shape, width).scatter_add(-1, slot, torch.ones_like(slot, dtype=log_p.dtype))
    if proposal_temperature != 1:
        counts = counts * (log_p.gather(-1, merged) - log_r.gather(-1, merged)).exp()
    return SampledTargets(merged, counts / counts.sum(dim=-1, keepdim=True), temperature)


def top_k_divergence(log_q: Tensor, targets: TopKTargets, divergence: Divergence) -> Tensor:
    """D over ``K + 1`` outcomes, ``[N]``, by autograd, from the student's whole log-probabilities ``[N, V]``.

    Args:
        log_q: at the targets' temperature.
        targets: rows, ``[N, K]``.
        divergence: any; reverse KL needs a tail.

    Raises:
        UserError: see :func:`check_top_k`.
    """
    check_top_k(targets, log_q.shape[-1], divergence)
    tail = log_q.scatter(-1, targets.ids, -math.inf)
    if targets.ids.shape[-1] == log_q.shape[-1]:  # nothing is left: a logsumexp of nothing has no gradient
        log_q_tail = log_q.new_full(log_q.shape[:-1], FLOOR)
    else:
        log_q_tail = tail.logsumexp(dim=-1).clamp(min=FLOOR)
    outcomes = torch.cat([log_q.gather(-1, targets.ids), log_q_tail[..., None]], dim=-1)
    return divergence.value(bucketed(targets, log_q.dtype), outcomes)


def bucketed(targets: TopKTargets, dtype: torch.dtype) -> Tensor:
    """The teacher's log-probabilities of the ``K`` tokens and the tail, finite, ``[N, K + 1]``."""
    return torch.cat([targets.log_probs, targets.tail[..., None]], dim=-1).to(dtype).clamp(min=FLOOR)


def sampled_divergence(log_q: Tensor, targets: SampledTargets, divergence: Divergence) -> Tensor:
    """``-sum_i t_i log q_i``, ``[N]``, by autograd, from the student's whole log-probabilities ``[N, V]``.

    Raises:
        UserError: see :func:`check_sampled`.
    """
    check_sampled(targets, log_q.shape[-1], divergence)
    return -(targets.weights.to(log_q.dtype) * log_q.gather(-1, targets.ids)).sum(dim=-1)


def check_top_k(targets: TopKTargets, vocabulary: int, divergence: Divergence) -> None:
    """Refuse rows of targets that do not fit the student or the divergence.

    Raises:
        UserError: K more than the vocabulary, ids outside of it, probabilities that do not sum to 1 with the tail,
            reverse KL without a tail.
    """
    if targets.ids.shape[-1] > vocabulary:
        raise UserError(f"targets hold {targets.ids.shape[-1]} tokens a position, but the vocabulary has {vocabulary}")
    _check_ids(targets.ids, vocabulary)
    mass = targets.log_probs.float().exp().sum(dim=-1) + targets.tail.float().exp()
    wrong = ~((mass - 1).abs() < 0.05)  # float16 logarithms are good to half a percent
    if bool(wrong.any()):
        raise UserError(
            f"targets: expected probabilities that sum to 1 with the tail, found NaN or another sum at "
            f"{int(wrong.sum())} of {wrong.numel()} counted positions: look at the teacher's precision, at what was "
            f"stored, and at whether the labels are those it was stored for"
        )
    truncated = divergence.name == "reverse_kl" and targets.ids.shape[-1] < vocabulary
    if truncated and bool(torch.isneginf(targets.tail).any()):
        raise UserError(
            "reverse_kl of truncated targets is infinite: the student's mass outside of the stored tokens has no "
            "counterpart; keep the tail, or use forward_kl or skew_reverse_kl"
        )


def check_sampled(targets: SampledTargets, vocabulary: int, divergence: Divergence) -> None:
    """Refuse rows of targets that do not fit the student or the divergence.

    Raises:
        UserError: another divergence than forward KL, ids outside of the vocabulary, weights that do not sum to 1.
    """
    if divergence.name != "forward_kl":
        raise UserError(
            f"sampled targets estimate losses that are linear in the teacher's probabilities, {divergence.name} is "
            f"not: use forward_kl, or top-k targets, or a live teacher"
        )
    _check_ids(targets.ids, vocabulary)
    wrong = ~((targets.weights.sum(dim=-1) - 1).abs() < 1e-2)
    if bool(wrong.any()):
        raise UserError(
            f"targets: expected weights that sum to 1, found {int(wrong.sum())} of {wrong.numel()} counted positions "
            f"where they do not: these positions were not stored, or the labels are others"
        )


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    if ids.numel() and bool(((ids < 0) | (ids >= vocabulary)).any()):
        raise UserError(
            f"targets: expected token ids from 0 to {vocabulary - 1}, found {int(ids.min())} to {int(ids.max())}: they "
            f"were stored with another tokenizer"
        )
