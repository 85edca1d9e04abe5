"""Mixtures to try: Dirichlet draws around a prior, within bounds (RegMix, arXiv 2407.01492, section 3).

    p ∝ prior**(1 / temperature)
    s   log-uniform between the two concentrations
    w = lower + (1 - sum(lower)) * d,   d ~ Dirichlet(s * p),   drawn again until w <= upper

A concentration of K with an even prior is the even distribution over all mixtures of K sources; smaller ones come
nearer to single sources, which show their effects best. ``temperature`` 1 keeps the prior, more makes it more even
(RegMix's own setting, an exponent of 0.5, is temperature 2).
"""

from __future__ import annotations

import math

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import Array

__all__ = ["sample_mixtures"]

_TRIES = 1000


def sample_mixtures(
    prior: Array,
    count: int,
    *,
    lower: Array,
    upper: Array,
    seed: int,
    temperature: float = 1.0,
    concentration: tuple[float, float] | None = None,
) -> Array:
    """Draw mixtures, ``[count, K]``; the first of n draws are the same for every n.

    Args:
        prior: ``[K]``, any scale; a source with 0 is in no mixture beyond its lower bound.
        count: how many.
        lower, upper: ``[K]``, see :func:`~cheapertraining.mixing.offline.optimum.mixture_bounds`.
        seed: of the draws.
        temperature: above 0.
        concentration: lowest and highest; None: 1 and the number of sources.

    Raises:
        UserError: a value out of range, or hardly any draw stays within the upper bounds.
    """
    if not temperature > 0:
        raise UserError(f"temperature: expected a positive number, found {temperature:g}.")
    if count < 1:
        raise UserError(f"runs: expected a positive number, found {count}.")
    sources = len(prior)
    lowest, highest = concentration or (1.0, float(sources))
    if not 0 < lowest <= highest:
        raise UserError(f"concentration: expected 0 < LOW <= HIGH, found {lowest:g} and {highest:g}.")
    center = np.where(prior > 0, prior, 0.0) / prior.max()
    center = np.where(center > 0, center ** (1 / temperature), 0.0)
    center /= center.sum()
    rng = np.random.default_rng(seed)
    room = 1.0 - math.fsum(lower)
    kept: list[Array] = []
    drawn, missing = 0, count
    while missing > 0:
        if drawn >= _TRIES * count:
            raise UserError(
                f"runs: only {count - missing} of {drawn} mixtures drawn around the prior respect the caps, fewer than "
                f"the {count} wanted. Raise temperature, concentration, max_epochs or ceiling, or lower tokens."
            )
        chunk = max(count, 64)
        strengths = np.exp(rng.uniform(math.log(lowest), math.log(highest), chunk))
        for strength in strengths:
            shape = np.maximum(strength * center, 1e-6)  # a smaller one can underflow to no draw at all
            raw = np.where(center > 0, rng.standard_gamma(shape), 0.0)
            if not (total := raw.sum()) > 0:
                continue
            mixture = lower + room * (raw / total)
            if missing > 0 and np.all(mixture <= upper + 1e-12):
                kept.append(np.minimum(mixture, upper))
                missing -= 1
        drawn += chunk
    return np.array(kept)
