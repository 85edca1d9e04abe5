"""Which samples to take, by their scores."""

from __future__ import annotations

import math

import torch

from cheapertraining.errors import UserError

__all__ = ["above_threshold", "greats", "top_fraction"]


def greats(scores: torch.Tensor, gram: torch.Tensor, k: int, lr: float) -> torch.Tensor:
    """Greedy choice of ``k`` samples of a batch that do not tell the same twice (GREATS; Wang et al., NeurIPS 2024).

    To second order, and with the identity in place of the Hessian, a gradient step on a set ``S`` lowers the probe's
    loss by ``sum_{i in S} lr <g_i, g_val> - lr**2 sum_{i < j in S} <g_i, g_j>`` and terms of each sample alone. Each
    choice takes the sample that adds most to it: marginal gains start as ``lr * scores`` and fall by
    ``lr**2 * gram[:, chosen]`` with each choice.

    Args:
        scores: ``[N]``, ``<g_i, g_val>``; positive helps.
        gram: ``[N, N]``, ``<g_i, g_j>``.
        k: how many to choose, 1 to ``N``.
        lr: learning rate of the step.

    Returns:
        int64 ``[k]``, indices in the order of choice; of equals, the first.

    Raises:
        UserError: shapes that do not fit, ``k`` out of range, a learning rate that is not above 0, or numbers that are
            not finite.
    """
    count = _check_scores(scores)
    if gram.shape != (count, count):
        raise UserError(f"greats: expected a gram matrix [{count}, {count}], found {list(gram.shape)}.")
    if not 1 <= k <= count:
        raise UserError(f"greats: expected k from 1 to the {count} samples of the batch, found {k}.")
    if not (math.isfinite(lr) and lr > 0):
        raise UserError(f"greats: expected a learning rate above 0, found {lr}.")
    if not bool(torch.isfinite(gram).all()):
        raise UserError("greats: expected a finite gram matrix, found NaN or infinity in it.")
    gains = scores.double() * lr
    products = gram.double() * lr**2
    chosen = torch.empty(k, dtype=torch.int64, device=scores.device)
    for step in range(k):
        best = torch.argmax(gains)
        chosen[step] = best
        gains -= products[:, best]
        gains[chosen[: step + 1]] = -torch.inf
    return chosen


def top_fraction(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """Bool ``[N]``: the ``fraction`` of the samples with the highest scores, rounded half up; of equals, the first.

    Raises:
        UserError: a fraction outside (0, 1], one that is less than half a sample, or scores that are not finite.
    """
    count = _check_scores(scores)
    if not 0 < fraction <= 1:
        raise UserError(f"top_fraction: expected a share above 0 and up to 1, such as 0.2, found {fraction}.")
    number = math.floor(fraction * count + 0.5)
    if number == 0:
        raise UserError(f"top_fraction={fraction}: chooses none of {count} samples. Expected at least {0.5 / count:g}.")
    chosen = torch.zeros(count, dtype=torch.bool, device=scores.device)
    chosen[torch.argsort(scores, descending=True, stable=True)[:number]] = True
    return chosen


def above_threshold(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Bool ``[N]``: the samples with scores above ``threshold``; with 0, those that help.

    Raises:
        UserError: there are none, a threshold that is NaN, or scores that are not finite.
    """
    _check_scores(scores)
    chosen = scores > threshold
    if not bool(chosen.any()):
        raise UserError(
            f"threshold={threshold:g}: chooses none of {len(scores)} samples. Expected one below the highest score, "
            f"{float(scores.max()):g}."
        )
    return chosen


def _check_scores(scores: torch.Tensor) -> int:
    """Number of scores, if they can be put in order."""
    if scores.ndim != 1 or not len(scores):
        raise UserError(f"selection: expected scores [N] of at least one sample, found shape {list(scores.shape)}.")
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).sum())
        raise UserError(f"selection: expected finite scores, found {bad} of {len(scores)} NaN or infinite.")
    return len(scores)
