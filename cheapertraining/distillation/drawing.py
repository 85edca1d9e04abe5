"""Draws from a teacher's distribution, the same for the same row wherever and whenever it is drawn."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Drawing", "draw", "uniforms"]

Drawing = Literal["systematic", "multinomial"]


def uniforms(seed: int, source: str, sample: int, positions: int, rounds: int, drawing: Drawing) -> NDArray[np.float64]:
    """Numbers in [0, 1), ascending along each position, float64 ``[positions, rounds]``.

    Multinomial: independent ones, sorted. Systematic: ``(u + j) / rounds`` with one ``u`` a position.
    """
    key = hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=8).digest()
    generator = np.random.Generator(np.random.Philox(key=[int.from_bytes(key, "little"), sample]))
    if drawing == "multinomial":
        return np.sort(generator.random((positions, rounds)), axis=1)
    return np.asarray((generator.random((positions, 1)) + np.arange(rounds)) / rounds)


def draw(log_probs: torch.Tensor, numbers: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Invert the distribution function at ``numbers``: token ``v`` is drawn where it steps over one.

    With independent numbers that is drawing with replacement. With systematic ones each token comes ``floor(R p)`` or
    ``ceil(R p)`` times, ``R p`` on average: as unbiased as the former, with less variance (Madow 1949).

    Args:
        log_probs: ``[N, V]``, normalized.
        numbers: of :func:`uniforms`, ``[N, R]``.

    Returns:
        ids and how often each was drawn, int64 ``[N, R]``; entries with count 0 are empty.
    """
    mass = log_probs.exp().cumsum(dim=1)
    wanted = torch.from_numpy(numbers).to(mass) * mass[:, -1:]
    # right: never a token without mass, whose step has no height.
    ids = torch.searchsorted(mass, wanted, right=True).clamp(max=mass.shape[1] - 1).cpu().numpy()
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = np.flatnonzero(starts)  # of each run of equal ids; every row begins with one
    rows, slot = first // ids.shape[1], (np.cumsum(starts, axis=1) - 1).reshape(-1)[first]
    counts, merged = np.zeros_like(ids), np.zeros_like(ids)
    counts[rows, slot] = np.diff(np.append(first, ids.size))
    merged[rows, slot] = ids.reshape(-1)[first]
    return merged, counts
