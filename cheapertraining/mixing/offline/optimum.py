"""The mixture that a law calls best: least predicted loss, not too far from a prior, within what may be drawn.

    minimise  F(w) = sum_i v_i L_i(w) + kl * KL(w || prior)    over  sum(w) = 1, lower <= w <= upper,
    upper_k <= max_epochs * available_k / tokens

(Olmix's problem, arXiv 2602.12237: KL term and repetition caps; there ``kl`` 0.1 and 4 epochs by default). The laws
are convex, so F is, and there is one minimum; for ``kl > 0`` also one minimiser.

*Method.* Mirror descent with the KL divergence as distance; the step keeps ``kl * KL(w || prior)`` whole and replaces
only the laws by their tangent with slope g:

    w' = argmin  eta * <g, w> + eta * kl * KL(w || prior) + KL(w || w_t)
       = the exact KL projection onto the bounds of  (w_t * prior**(eta kl) * exp(-eta g)) ** (1 / (1 + eta kl)).

``eta`` doubles after each step and halves until the laws lie below tangent plus ``KL(w' || w_t) / eta``, which makes
every step a descent (Bauschke, Bolte, Teboulle 2017). It ends when the Frank-Wolfe gap ``max_s <F'(w), w - s>``, an
upper bound on ``F(w) - min F``, is below the tolerance. No random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.constraints import kl_divergence, project_kl, repetition_caps
from cheapertraining.mixing.offline.law import LogLinearLaw
from cheapertraining.mixing.signals import Array

__all__ = ["Optimum", "mixture_bounds", "optimal_mixture"]

_SMALLEST = 1e-30
"""Weights are kept from falling below this on the way, so that they can come back."""
_NOTHING = 1e-12
_FARTHEST = 200.0
"""Nats that one step may change the ratio of two weights by."""
_STEPS = 5000


@dataclass(frozen=True)
class Optimum:
    """What the search found.

    Attributes:
        weights: ``[K]``, they sum to 1.
        loss: weighted mean of the predicted losses there, without the KL term.
        gap: the objective is at most so far above its minimum.
    """

    weights: Array
    loss: float
    gap: float


def mixture_bounds(
    sources: Sequence[str],
    *,
    floor: float = 0.0,
    ceiling: float = 1.0,
    available: Mapping[str, float] | None = None,
    max_epochs: float | None = None,
    tokens: float | None = None,
) -> tuple[Array, Array]:
    """Bounds on weights, ``lower`` and ``upper`` ``[K]``, repetition caps among them.

    Args:
        sources: names.
        floor, ceiling: for each source; a cap goes before the floor.
        available: tokens in one pass over a source, by name; a source that is not named has no cap.
        max_epochs: passes over a source at most; None: no cap.
        tokens: tokens that the run will draw in all.

    Raises:
        UserError: unknown names, values out of range, or bounds that leave no mixture.
    """
    for name, amount in (available or {}).items():
        if name not in sources:
            raise UserError(f"available: no source is named '{name}'.{nearest(name, sources)}")
        if not (amount >= 0 and math.isfinite(amount)):
            raise UserError(f"available: expected tokens of '{name}', found {amount}.")
    if not 0 <= floor <= ceiling <= 1:
        raise UserError(f"floor and ceiling: expected 0 <= floor <= ceiling <= 1, found {floor:g} and {ceiling:g}.")
    for key, value in (("max_epochs", max_epochs), ("tokens", tokens)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{key}: expected a positive number, found {value}.")
    count = len(sources)
    lower, upper = np.full(count, floor), np.full(count, ceiling)
    if available and max_epochs is not None and tokens is not None:
        allowed = {name: max_epochs * amount for name, amount in available.items()}
        caps = repetition_caps(dict.fromkeys(allowed, 0.0), allowed, tokens)
        upper = np.minimum(upper, [caps.get(name, 1.0) for name in sources])
        lower = np.minimum(lower, upper)
    if (total := math.fsum(lower)) > 1 + _NOTHING:
        raise UserError(f"floor: {count} sources of at least {floor:g} sum to {total:.4g}, above 1. Lower it.")
    if (total := math.fsum(upper)) < 1 - _NOTHING:
        raise UserError(
            f"ceiling and max_epochs: the sources may give {total:.1%} of the mixture at most. Raise them, or train on "
            "fewer tokens."
        )
    return lower, upper


def optimal_mixture(
    laws: Sequence[LogLinearLaw],
    prior: Array,
    lower: Array,
    upper: Array,
    *,
    kl: float = 0.1,
    target_weights: Array | None = None,
    start: Array | None = None,
    tolerance: float = 1e-7,
) -> Optimum:
    """Minimise the weighted mean of the laws plus ``kl * KL(w || prior)`` within the bounds.

    Args:
        laws: one a target, ``[M]``.
        prior: ``[K]``, sums to 1. For ``kl > 0`` a source without prior weight gets none.
        lower, upper: ``[K]``, from :func:`mixture_bounds`.
        kl: nats of predicted loss that one nat of divergence from the prior must gain.
        target_weights: ``[M]``, any scale; None: equal.
        start: ``[K]``, where to begin; changes the work only.
        tolerance: on the gap, in units of the loss.

    Raises:
        UserError: the prior forbids what the bounds demand.
    """
    v = np.ones(len(laws)) if target_weights is None else target_weights
    v = v / v.sum()
    if kl > 0:
        upper = np.where(prior > 0, upper, 0.0)
        if np.any(lower > upper) or math.fsum(upper) < 1 - _NOTHING:
            raise UserError("prior: sources with a prior weight of 0 get none, and the others cannot fill the mixture.")
    search = _Search(laws, v, prior, lower, upper, kl)
    w = search.project((prior + 1 / len(prior)) / 2 if start is None else np.maximum(start, _NOTHING))
    eta, gap = 1.0, search.gap(w)
    for _ in range(_STEPS):
        if gap <= tolerance:
            break
        w, eta = search.step(w, eta)
        gap = search.gap(w)
    cleared = project_kl(np.where(w > _NOTHING, w, 0.0), lower, upper)
    return Optimum(cleared, search.loss(cleared), gap)


@dataclass(frozen=True)
class _Search:
    laws: Sequence[LogLinearLaw]
    v: Array
    prior: Array
    lower: Array
    upper: Array
    kl: float

    def loss(self, w: Array) -> float:
        return math.fsum(v * float(law.predict(w)) for v, law in zip(self.v, self.laws, strict=True))

    def slope(self, w: Array) -> Array:
        result: Array = np.sum([v * law.gradient(w) for v, law in zip(self.v, self.laws, strict=True)], axis=0)
        return result

    def project(self, wish: Array) -> Array:
        return project_kl(np.where(self.upper > 0, wish, 0.0), self.lower, self.upper)

    def step(self, w: Array, eta: float) -> tuple[Array, float]:
        """Return the next mixture and the step size to try then."""
        here, slope = self.loss(w), self.slope(w)
        # A capped source may take the lead by any factor: what the others' ratios are must survive in floats.
        eta = min(eta, _FARTHEST / max(float(np.ptp(slope)), 1e-30))
        log_w, log_prior = np.log(np.maximum(w, _SMALLEST)), np.log(np.maximum(self.prior, _SMALLEST))
        while True:
            wish = (log_w + eta * self.kl * log_prior - eta * slope) / (1 + eta * self.kl)
            new = self.project(np.exp(wish - wish.max()))
            tangent = here + float(slope @ (new - w)) + kl_divergence(new, np.maximum(w, _SMALLEST)) / eta
            if self.loss(new) <= tangent + 1e-15 * abs(here) or eta < 1e-12:
                return new, min(2 * eta, 1e12)
            eta /= 2

    def gap(self, w: Array) -> float:
        """``max_s <F'(w), w - s>``: the best s takes the smallest slopes first, up to their bounds."""
        slope = self.slope(w)
        if self.kl > 0:
            ratio = np.maximum(w, _SMALLEST) / np.maximum(self.prior, _SMALLEST)
            slope = slope + np.where(self.prior > 0, self.kl * (np.log(ratio) + 1), 0.0)
        order = np.argsort(slope, kind="stable")
        room = 1.0 - math.fsum(self.lower)
        best = self.lower.copy()
        for k in order:
            best[k] += (given := min(room, self.upper[k] - self.lower[k]))
            room -= given
        return max(0.0, float(slope @ (w - best)))
