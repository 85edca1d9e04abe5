"""From tokens to units (samples or documents), and from units to sources, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from cheapertraining.errors import UserError

__all__ = ["By", "mean_by_group", "unit_index"]

By = Literal["sample", "document"]
"""What gets a score of its own: a row of the batch, or each document packed into one."""


def unit_index(batch: Mapping[str, torch.Tensor], by: By) -> tuple[torch.Tensor, int]:
    """The unit that each token belongs to.

    Args:
        batch: ``labels`` int64 ``[B, S]``; for documents also ``position_ids``, which restart at each of them.
        by: see :data:`By`. Documents are counted through the batch in order; padding is one of its own.

    Returns:
        int64 ``[B, S]``, from 0 to ``N - 1``, never falling along the flattened batch; and ``N``.

    Raises:
        UserError: documents are asked for, and there are no ``position_ids``.
    """
    shape, device = batch["labels"].shape, batch["labels"].device
    if by == "sample":
        return torch.arange(shape[0], device=device)[:, None].expand(shape), shape[0]
    if "position_ids" not in batch:
        raise UserError("influence by document: expected position_ids that restart at each document, found none.")
    starts = batch["position_ids"].to(device) == 0
    starts[:, 0] = True
    units = starts.reshape(-1).cumsum(0).view(shape) - 1
    return units, int(units[-1, -1]) + 1


def mean_by_group(
    scores: torch.Tensor, tokens: torch.Tensor, group: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-weighted mean score of each group of units, and its standard error.

    A unit's score belongs to its summed loss, so the mean is a ratio of two sums, and the error that of a ratio of
    means (Cochran, Sampling Techniques, 1977, section 6.4): with residuals ``r_i = s_i - mean * t_i`` over ``n`` units,
    ``sqrt(n / (n - 1) * sum r_i**2) / sum t_i``.

    Args:
        scores: ``[N, K]``.
        tokens: ``[N]``, loss-counting tokens of each unit.
        group: int64 ``[N]``, the source of each unit, from 0; units below 0 are left out.
        count: number of groups, ``G``.

    Returns:
        float64 ``[G, K]`` means and errors; both NaN for a group without a counting token, the error also for one with
        a single unit.
    """
    kept = group >= 0
    index, length = group[kept], tokens[kept].double()
    wide = scores[kept].double()
    shape = (count, scores.shape[1])
    total = torch.zeros(count, dtype=torch.float64, device=wide.device).index_add_(0, index, length)
    number = torch.zeros_like(total).index_add_(0, index, torch.ones_like(length))
    total = torch.where(total > 0, total, torch.nan)[:, None]
    mean = torch.zeros(shape, dtype=torch.float64, device=wide.device).index_add_(0, index, wide) / total
    residual = wide - mean[index] * length[:, None]
    squares = torch.zeros_like(mean).index_add_(0, index, residual**2)
    freedom = torch.where(number > 1, number / (number - 1), torch.nan)[:, None]
    return mean, (freedom * squares).sqrt() / total
