"""Exact projections onto the mixtures that are allowed.

The allowed set is ``{w : sum(w) = 1, lower <= w <= upper, KL(w || p_j) <= r_j}`` with up to two balls around
the last weights and around a prior. It is convex, and so is ``KL(w || wish)``, so there is one nearest
mixture:

    argmin_w KL(w || wish)  over the allowed set          (the I-projection of the wish)

*Bounds alone.* Stationarity of the Lagrangian, ``log(w_i / wish_i) + 1 - nu + (bound multipliers) = 0``, with
complementary slackness gives ``w_i = clip(c * wish_i, lower_i, upper_i)`` with one ``c = exp(nu - 1)``. The
sum over ``i`` is a non-decreasing, piecewise linear function of ``c`` with kinks at ``lower_i / wish_i`` and
``upper_i / wish_i``: the piece on which it reaches 1 is found by bisection over the sorted kinks, and ``c``
is solved for on that piece.

*A ball.* Its multiplier ``m >= 0`` adds ``m * KL(w || p)`` to the objective, and
``KL(w || wish) + m * KL(w || p) = (1 + m) * KL(w || wish**(1-a) * p**a) + const`` with ``a = m / (1 + m)``:
the same problem with bounds alone, for a wish on the exponential path from ``wish`` to ``p``. ``KL(w(a) ||
p)`` falls with ``a`` (it is the slope of the concave dual function, up to a constant), so the ``a`` at which
it meets the radius is found by bisection, and the KKT conditions hold there.

*Two balls.* Dualize one and solve the rest exactly for each of its multipliers: the dual function of the
remaining multiplier is concave and its slope is that ball's slack at the inner solution (envelope theorem),
so the same bisection is right, with the other one inside.

Sums are correctly rounded (``math.fsum``), so the order of the sources does not change a single bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.signals import Array

__all__ = ["Ball", "Constraints", "kl_divergence", "project_kl", "repetition_caps"]

TOLERANCE = 1e-12
_BISECTIONS = 60
# exp(-600) is far below any weight that matters and far above underflow, also when it is divided by.
_SMALLEST_LOG = -600.0
# What a wish of exactly 0 counts as when a ball forbids 0: the limit from above, to within rounding of
# weights.
_NEARLY_ZERO = 1e-12
_KEY = "algorithms.online_mixing.constraints"


@dataclass(frozen=True)
class Ball:
    """``{w : KL(w || center) <= radius}``, radius in nats."""

    center: Array
    radius: float


def kl_divergence(weights: Array, center: Array) -> float:
    """``KL(weights || center)`` in nats; infinite where ``center`` has a 0 that ``weights`` has not."""
    terms = []
    for w, p in zip(weights.tolist(), center.tolist(), strict=True):
        if w > 0 and p <= 0:
            return math.inf
        # ``p - w`` sums to 0 over the simplex and keeps each term non-negative in floating point.
        terms.append((w * math.log(w / p) if w > 0 else 0.0) - w + p)
    return max(0.0, math.fsum(terms))


def project_kl(wish: Array, lower: Array, upper: Array, balls: Sequence[Ball] = ()) -> Array:
    """Return ``argmin_w KL(w || wish)`` over bounds, simplex and balls; see the module's docstring.

    Idempotent to the last bit, and indifferent to the order of the sources. A source whose wish is 0 gets its
    lower bound; where the others cannot take up the rest, such sources share it equally (the limit of equal,
    vanishing wishes).

    Args:
        wish: ``[K]``, non-negative, any scale.
        lower, upper: ``[K]``, within [0, 1].
        balls: at most a few; the work grows with ``60 ** len(balls)`` where they are all active.

    Raises:
        ValueError: no mixture satisfies all of it.
    """
    if math.fsum(lower) > 1 + TOLERANCE or math.fsum(upper) < 1 - TOLERANCE or np.any(lower > upper):
        raise ValueError("the bounds leave no mixture")
    for ball in balls:
        # Outside the centre's support the divergence is infinite.
        upper = np.where(ball.center > 0, upper, 0.0)
        if np.any(lower > upper) or math.fsum(upper) < 1 - TOLERANCE:
            raise ValueError("a ball's centre leaves no mixture within the bounds")
    if _allowed(wish, lower, upper, balls):
        return wish.copy()
    total = math.fsum(wish)
    within = _clip_to_simplex(wish / total if total > 0 else wish, lower, upper)
    if all(kl_divergence(within, ball.center) <= ball.radius for ball in balls):
        return within
    path = np.log(np.maximum(wish / total if total > 0 else wish, _NEARLY_ZERO))
    return _within_balls(path, lower, upper, tuple(balls))


def _allowed(weights: Array, lower: Array, upper: Array, balls: Sequence[Ball]) -> bool:
    return (
        abs(math.fsum(weights) - 1) <= TOLERANCE
        and bool(np.all(weights >= lower - TOLERANCE) and np.all(weights <= upper + TOLERANCE))
        and all(kl_divergence(weights, ball.center) <= ball.radius for ball in balls)
    )


def _within_balls(log_wish: Array, lower: Array, upper: Array, balls: tuple[Ball, ...]) -> Array:
    """Project ``exp(log_wish)``; each ball's multiplier is bisected with those behind it solved inside."""
    if not balls:
        return _clip_to_simplex(np.exp(np.maximum(log_wish - log_wish.max(), _SMALLEST_LOG)), lower, upper)
    ball, others = balls[0], balls[1:]
    inside = _within_balls(log_wish, lower, upper, others)
    if kl_divergence(inside, ball.center) <= ball.radius:
        return inside
    log_center = np.log(np.where(ball.center > 0, ball.center, 1.0))
    best = _within_balls(log_center, lower, upper, others)
    if kl_divergence(best, ball.center) > ball.radius:
        raise ValueError("the balls and bounds leave no mixture")
    outer, inner = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (outer + inner) / 2
        if middle in (outer, inner):
            break
        mixed = _within_balls((1 - middle) * log_wish + middle * log_center, lower, upper, others)
        if kl_divergence(mixed, ball.center) <= ball.radius:
            inner, best = middle, mixed
        else:
            outer = middle
    return best


def _clip_to_simplex(wish: Array, lower: Array, upper: Array) -> Array:
    """Return ``clip(c * wish, lower, upper)`` with the ``c`` for which it sums to 1."""
    wished = wish > 0
    room = 1.0 - math.fsum(lower[~wished])
    if room > math.fsum(upper[wished]):
        # The wished-for sources are full; the others share what is left as if equally wished for.
        result = upper.copy()
        if not wished.all():
            rest = 1.0 - math.fsum(upper[wished])
            result[~wished] = _scale(np.ones(int((~wished).sum())), lower[~wished], upper[~wished], rest)
        return result
    result = lower.copy()
    result[wished] = _scale(wish[wished], lower[wished], upper[wished], room)
    return result


def _scale(wish: Array, lower: Array, upper: Array, total: float) -> Array:
    """Solve ``sum(clip(c * wish, lower, upper)) = total`` for positive wishes; return the summands."""
    starts, ends = lower / wish, upper / wish
    kinks = np.unique(np.concatenate([starts, ends]))

    def height(c: float) -> float:
        return math.fsum(np.clip(c * wish, lower, upper))

    first, last = 0, len(kinks) - 1
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if height(float(kinks[middle])) <= total else (first, middle)
    free = (starts <= kinks[first]) & (ends >= kinks[last]) & (starts < ends)
    if not free.any():
        return np.asarray(np.clip(kinks[last] * wish, lower, upper))
    fixed = np.where(starts > kinks[first], lower, upper)[~free]
    scale = (total - math.fsum(fixed)) / math.fsum(wish[free])
    return np.asarray(np.clip(scale * wish, lower, upper))


def repetition_caps(used: Mapping[str, float], allowed: Mapping[str, float], horizon_tokens: float) -> dict[str, float]:
    """Upper bounds on weights, so that no source's allowance ends before the run does.

    ``(allowed - used) / horizon``: at exactly this weight the allowance lasts for the remaining horizon. 0
    for a source that is spent. A source without an allowance (infinite) has no bound and is left out.

    Args:
        used: tokens drawn so far, by source.
        allowed: tokens that may be drawn in the whole run, by source.
        horizon_tokens: tokens that the run still has to draw, from all sources together.
    """
    if horizon_tokens <= 0:
        return {}
    return {
        name: max(0.0, allowance - used[name]) / horizon_tokens
        for name, allowance in allowed.items()
        if math.isfinite(allowance)
    }


@dataclass(frozen=True)
class Constraints:
    """What weights may be, whatever a strategy wishes.

    Where they conflict, a repetition cap goes before floor and ceiling (a spent source cannot be drawn) and
    widens the balls as far as it must; all other conflicts are errors.

    Args:
        floor, ceiling: bounds on each weight, one for all sources or by source name (default there: 0 and 1).
        kl_step: trust region: a decision moves by at most so many nats, ``KL(new || last)``. None: no limit.
        kl_prior: weights stay within so many nats of ``prior``, ``KL(new || prior)``. None: no limit.
        prior: weights by source name, any scale. None: a controller takes the run's first weights.
        max_epochs: passes over a source at most, for sources that name no limit of their own.

    Raises:
        UserError: a value out of range.
    """

    floor: float | Mapping[str, float] = 0.01
    ceiling: float | Mapping[str, float] = 1.0
    kl_step: float | None = None
    kl_prior: float | None = None
    prior: Mapping[str, float] | None = None
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        for key, bound in (("floor", self.floor), ("ceiling", self.ceiling)):
            values = bound if isinstance(bound, Mapping) else {"": bound}
            for name, value in values.items():
                if not 0 <= value <= 1:
                    place = f"{_KEY}.{key}.{name}".rstrip(".")
                    raise UserError(f"{place}: expected a weight between 0 and 1, found {value}.")
        for key, limit in (
            ("kl_step", self.kl_step),
            ("kl_prior", self.kl_prior),
            ("max_epochs", self.max_epochs),
        ):
            if limit is not None and not limit > 0:
                raise UserError(f"{_KEY}.{key}: expected a positive number, or null for no limit, found {limit}.")

    def check(self, last: Mapping[str, float]) -> None:
        """Raise now, before training, the error that :meth:`project` would raise from these last weights."""
        self.project(last, last)

    def project(
        self,
        wish: Mapping[str, float],
        last: Mapping[str, float] | None = None,
        caps: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return the allowed weights nearest to ``wish``; they sum to 1.

        Args:
            wish: by source name, non-negative, any scale.
            last: weights that ``kl_step`` counts from; None: no trust region (before training).
            caps: upper bounds from :func:`repetition_caps`. Where they sum to less than 1, all sources run
                dry before the end: they are scaled up together, so that they run dry at the same time.

        Raises:
            UserError: a bad wish, names that do not fit, or bounds that leave no mixture; the message says
            which.
        """
        names = tuple(wish)
        wanted = _array(wish, names, "the wished weights")
        lower, upper = self._bounds(names, caps or {})
        balls: list[Ball] = []
        if self.kl_prior is not None:
            if self.prior is None:
                raise UserError(f"{_KEY}.kl_prior: expected prior weights to stay near, found none.")
            center = _array(self.prior, names, f"{_KEY}.prior", normalize=True)
            self._add_ball(balls, "kl_prior", Ball(center, self.kl_prior), names, lower, upper, bool(caps))
        if self.kl_step is not None and last is not None:
            center = _array(last, names, "the last weights", normalize=True)
            self._add_ball(balls, "kl_step", Ball(center, self.kl_step), names, lower, upper, bool(caps))
        return dict(zip(names, project_kl(wanted, lower, upper, balls).tolist(), strict=True))

    def _bounds(self, names: tuple[str, ...], caps: Mapping[str, float]) -> tuple[Array, Array]:
        lower = _bound(self.floor, names, 0.0, f"{_KEY}.floor")
        upper = _bound(self.ceiling, names, 1.0, f"{_KEY}.ceiling")
        for i in np.flatnonzero(lower > upper):
            raise UserError(f"{_KEY}: floor {lower[i]} of source '{names[i]}' is above its ceiling {upper[i]}.")
        if (total := math.fsum(lower)) > 1 + TOLERANCE:
            raise UserError(f"{_KEY}.floor: the floors of {len(names)} sources sum to {total:.6g}, above 1; lower.")
        if (total := math.fsum(upper)) < 1 - TOLERANCE:
            raise UserError(f"{_KEY}.ceiling: the ceilings of {len(names)} sources sum to {total:.6g}, below 1; raise.")
        if not caps:
            return lower, upper
        cap = np.array([caps.get(name, math.inf) for name in names])
        total = math.fsum(np.minimum(cap, 1.0))
        if total <= 0:
            raise UserError("max_epochs: every source has reached it. Raise max_epochs, add data, or train for less.")
        if total < 1:
            cap = cap / total
        capped = np.minimum(upper, cap)
        # The ceiling gives way where the caps have left too little below it.
        upper = capped if math.fsum(capped) >= 1 - TOLERANCE else np.minimum(cap, 1.0)
        lower = np.minimum(lower, upper)
        return lower, upper

    def _add_ball(
        self,
        balls: list[Ball],
        key: str,
        ball: Ball,
        names: tuple[str, ...],
        lower: Array,
        upper: Array,
        capped: bool,
    ) -> None:
        """Append the ball; where nothing of it is allowed, widen it just enough or complain."""
        try:
            reach = kl_divergence(project_kl(ball.center, lower, upper, balls), ball.center)
        except ValueError:
            reach = math.inf
        if reach <= ball.radius:
            balls.append(ball)
        elif not capped:
            raise UserError(self._conflict(key, ball, reach, names, lower, upper))
        elif math.isfinite(reach):
            balls.append(Ball(ball.center, reach * (1 + 1e-9) + TOLERANCE))

    def _conflict(self, key: str, ball: Ball, reach: float, names: tuple[str, ...], lower: Array, upper: Array) -> str:
        around = "the prior" if key == "kl_prior" else "the last weights"
        outside = [
            f"'{name}' {weight:.4g} (allowed {low:.4g} to {high:.4g})"
            for name, weight, low, high in zip(names, ball.center, lower, upper, strict=True)
            if not low - TOLERANCE <= weight <= high + TOLERANCE
        ]
        because = (
            f"{around} lie outside floor and ceiling: {', '.join(outside)}"
            if outside
            else (f"no mixture within kl_prior {self.kl_prior} is that near to {around}")
        )
        needed = (
            f"at least {reach:.4g} is needed"
            if math.isfinite(reach)
            else "no value is enough, since a weight of 0 cannot grow"
        )
        return f"{_KEY}.{key}: {ball.radius} leaves no mixture: {because}; {needed}. Change one of these."


def _array(weights: Mapping[str, float], names: tuple[str, ...], what: str, *, normalize: bool = False) -> Array:
    for name in weights:
        if name not in names:
            raise UserError(f"{what}: no source is named '{name}' (sources: {', '.join(names)}).{nearest(name, names)}")
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"{what}: expected a weight for each source, found none for {', '.join(missing)}.")
    values = np.array([float(weights[name]) for name in names])
    for name, value in zip(names, values, strict=True):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{what}: expected a finite number of at least 0 for source '{name}', found {value}.")
    total = math.fsum(values)
    if total <= 0:
        raise UserError(f"{what}: expected a positive weight, found only zeros.")
    return values / total if normalize else values


def _bound(bound: float | Mapping[str, float], names: tuple[str, ...], default: float, key: str) -> Array:
    if not isinstance(bound, Mapping):
        return np.full(len(names), float(bound))
    for name in bound:
        if name not in names:
            raise UserError(f"{key}: no source is named '{name}' (sources: {', '.join(names)}).{nearest(name, names)}")
    return np.array([float(bound.get(name, default)) for name in names])
