"""From tokens to units (samples or documents), and from units to sources, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.ranks import sum_over_ranks

__all__ = ["By", "GroupSums", "check_rows", "source_of_units", "unit_index", "units_with_loss"]

By = Literal["sample", "document"]
"""What gets a score of its own: a row of the batch, or each document packed into one."""


def check_rows(batch: Mapping[str, torch.Tensor]) -> None:
    """Refuse a batch that nothing can be scored in.

    Raises:
        UserError: it has no labels, or no row.
    """
    if "labels" not in batch:
        raise UserError(
            f"influence: expected 'labels' int64 [B, S] in the batch, found {', '.join(sorted(batch)) or 'nothing'}."
        )
    if not batch["labels"].numel():
        raise UserError(f"influence: expected at least one row of tokens, found {list(batch['labels'].shape)}.")


def unit_index(batch: Mapping[str, torch.Tensor], by: By) -> tuple[torch.Tensor, int]:
    """The unit that each token belongs to.

    Args:
        batch: ``labels`` int64 ``[B, S]``; for documents also ``position_ids``, which restart at each of them.
        by: see :data:`By`. Documents are counted through the batch in order; padding is one of its own.

    Returns:
        int64 ``[B, S]``, from 0 to ``N - 1``, never falling along the flattened batch; and ``N``.

    Raises:
        UserError: documents are asked for, and there are no ``position_ids``; a batch without rows or labels.
    """
    check_rows(batch)
    shape, device = batch["labels"].shape, batch["labels"].device
    if by == "sample":
        return torch.arange(shape[0], device=device)[:, None].expand(shape), shape[0]
    if "position_ids" not in batch:
        raise UserError("influence by document: expected position_ids that restart at each document, found none.")
    starts = batch["position_ids"].to(device) == 0
    starts[:, 0] = True
    units = starts.reshape(-1).cumsum(0).view(shape) - 1
    return units, int(units[-1, -1]) + 1


def units_with_loss(batch: Mapping[str, torch.Tensor], by: By) -> torch.Tensor:
    """Which units have a token that a loss counts for: bool ``[N]``."""
    index, count = unit_index(batch, by)
    # The loss of label t + 1 belongs to the unit of position t.
    counted = batch["labels"][:, 1:].to(index.device) != IGNORED
    found = torch.zeros(count, dtype=torch.bool, device=index.device)
    found[index[:, :-1][counted]] = True
    return found


def source_of_units(batch: Mapping[str, torch.Tensor], by: By) -> torch.Tensor:
    """The source of each unit, int64 ``[N]``, from ``source`` int64 ``[B]`` in the batch.

    Raises:
        UserError: the batch has none.
    """
    if "source" not in batch:
        raise UserError("influence by source: expected 'source' int64 [B] in the batch, found none.")
    if by == "sample":
        return batch["source"]
    index, count = unit_index(batch, by)
    by_token = batch["source"].to(index.device)[:, None].expand_as(index)
    return torch.empty(count, dtype=torch.int64, device=index.device).scatter_(
        0, index.reshape(-1), by_token.reshape(-1)
    )


class GroupSums:
    """Sums over units by group, from which the token-weighted mean score of each group and its error follow.

    A unit's score ``s_i`` belongs to its summed loss over ``t_i`` tokens, so a group's mean is a ratio of two sums, and
    its error that of a ratio of means (Cochran, Sampling Techniques, 1977, section 6.4): with residuals
    ``r_i = s_i - mean * t_i`` over ``n`` units, ``sqrt(n / (n - 1) * sum r_i**2) / sum t_i``. Units without a
    token that counts are left out.

    Args:
        groups: ``G``.
        columns: of the scores, ``K``.
        device: where scores come from.
    """

    def __init__(self, groups: int, columns: int, device: torch.device) -> None:
        # float64 [3, G]: units, sum t, sum t**2; and [3, G, K]: sum s, sum s**2, sum s * t.
        self._lengths = torch.zeros(3, groups, dtype=torch.float64, device=device)
        self._scores = torch.zeros(3, groups, columns, dtype=torch.float64, device=device)

    def add(self, scores: torch.Tensor, tokens: torch.Tensor, group: torch.Tensor) -> None:
        """Add units.

        Args:
            scores: ``[N, K]``.
            tokens: ``[N]``, loss-counting tokens of each unit.
            group: int64 ``[N]``, from 0; units below 0 are left out.
        """
        kept = (group >= 0) & (tokens > 0)
        # Not times 0: the score of a unit without a token may be NaN.
        wide = torch.where(kept[:, None], scores.double(), 0.0)
        index, length = group.clamp_min(0), tokens.double() * kept
        self._lengths.index_add_(1, index, torch.stack([kept.double(), length, length**2]))
        self._scores.index_add_(1, index, torch.stack([wide, wide**2, wide * length[:, None]]))

    def means(self, *, over_ranks: bool = False, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and standard errors, float64 ``[G, K]``.

        Both are NaN for a group without a unit, the error also for one with a single unit.

        Args:
            over_ranks: of the units of all ranks together; then all of them must call.
            copies: ranks that each added the same units.
        """
        lengths, scores = self._lengths.clone(), self._scores.clone()
        if over_ranks:
            sum_over_ranks(lengths, copies)
            sum_over_ranks(scores, copies)
        number, total, squared = lengths[:, :, None]
        total = torch.where(total > 0, total, torch.nan)
        mean = scores[0] / total
        residuals = (scores[1] - 2 * mean * scores[2] + mean**2 * squared).clamp_min(0)
        freedom = torch.where(number > 1, number / (number - 1), torch.nan)
        return mean, (freedom * residuals).sqrt() / total

    def counts(self) -> torch.Tensor:
        """Units of each group on this rank, float64 ``[G]``."""
        return self._lengths[0].clone()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums of this rank."""
        return {"lengths": self._lengths, "scores": self._scores}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over :meth:`state_dict` of as many groups and columns."""
        self._lengths.copy_(state["lengths"])
        self._scores.copy_(state["scores"])
