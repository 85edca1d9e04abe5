"""How student and teacher agree, added up over microbatches and ranks, by source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cheapertraining.distillation.losses import DistillationLoss
from cheapertraining.influence.ranks import sum_over_ranks

__all__ = ["AgreementSums"]

_MEASURES = ("cross_entropy", "divergence", "agreement", "teacher_entropy", "student_entropy", "acceptance")


class AgreementSums:
    """Sums by source of what :class:`~cheapertraining.distillation.losses.Statistics` hold, and of the loss.

    Args:
        sources: names that a batch's ``source`` int64 ``[B]`` counts in.
        device: of the batches.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = tuple(sources)
        # float64: by source, tokens and each measure; overall, tokens, loss; which measures the targets tell.
        self._by_source = torch.zeros(len(sources), 1 + len(_MEASURES), dtype=torch.float64, device=device)
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)
        self._told = torch.zeros(len(_MEASURES), dtype=torch.float64, device=device)

    def add(self, loss: DistillationLoss, source: Tensor, mask: Tensor) -> None:
        """One microbatch.

        Args:
            loss: with statistics.
            source: int64 ``[B]``.
            mask: bool ``[B, S]``, positions that count.
        """
        assert loss.statistics is not None
        rows = [mask.sum(dim=1)]
        for place, name in enumerate(_MEASURES):
            values: Tensor | None = getattr(loss.statistics, name)
            self._told[place] += values is not None
            rows.append(mask.new_zeros(len(mask)) if values is None else values.sum(dim=1))
        table = torch.stack([row.to(self._by_source) for row in rows], dim=1)
        # A product with a one-hot matrix: scatter-adds on a GPU differ in the last bits from run to run.
        one_hot = source[None, :] == torch.arange(len(self.sources), device=source.device)[:, None]
        self._by_source += one_hot.to(table) @ table
        tokens = loss.tokens.to(self._loss)
        self._loss += torch.stack([tokens, tokens * loss.total.detach().to(self._loss)])

    def means(self) -> dict[str, float]:
        """Means over tokens since the last call, over all ranks: ``total``, ``<measure>``, ``<measure>/<source>``.

        A collective call; what the targets do not tell, and sources that did not come, are left out.
        """
        for sums in (self._by_source, self._loss, self._told):
            sum_over_ranks(sums)
        by_source, told = self._by_source.cpu(), (self._told > 0).tolist()
        tokens, total = self._loss.tolist()
        found = {"total": total / tokens} if tokens else {}
        rows = {"": by_source.sum(dim=0), **{f"/{name}": by_source[k] for k, name in enumerate(self.sources)}}
        for ending, row in rows.items():
            if row[0] > 0:
                means = (row[1:] / row[0]).tolist()
                found |= {
                    f"{name}{ending}": mean
                    for name, mean, is_told in zip(_MEASURES, means, told, strict=True)
                    if is_told
                }
        for sums in (self._by_source, self._loss, self._told):
            sums.zero_()
        return {name: value for name, value in found.items() if math.isfinite(value)}
