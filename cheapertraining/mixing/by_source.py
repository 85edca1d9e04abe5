"""Sums over the samples of each source, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["sums_by_source"]


def sums_by_source(rows: Sequence[torch.Tensor], source: torch.Tensor, count: int) -> torch.Tensor:
    """``rows`` summed over the samples of each source.

    Args:
        rows: each ``[B]``, any number type; the first says on which device the sums are.
        source: int64 ``[B]``, each sample's, below ``count``.
        count: of sources, ``K``.

    Returns:
        float64 ``[len(rows), K]``.
    """
    device = rows[0].device
    # A sum over a one-hot matrix, since scatter-adds on a GPU differ in the last bits from run to run.
    one_hot = (source[None, :] == torch.arange(count, device=source.device)[:, None]).to(device, torch.float64)
    return (torch.stack([row.detach().to(device).double() for row in rows])[:, None, :] * one_hot[None]).sum(dim=2)
