"""Exponentiated gradient on measured influence, with everything that looks like noise left out.

The loss on the probes falls, for one unit of learning rate, by ``sum_k w_k * s_k`` with ``s_k = <g_k, u>``
the score of source ``k`` (a `SourceInfluence`, combined over the directions by their weights: the objective
is the weighted sum of the probes' losses). Its derivative on the simplex is the centred score ``c_k = s_k -
sum_j w_j s_j``, and ascent in the geometry of the simplex is exponentiated gradient, ``w_k <- w_k * exp(eta *
c_k) / Z`` (Kivinen & Warmuth 1997; for domain weights DoGE, arXiv 2310.15393, and Aioli, arXiv 2411.05735).
Scores are estimated from a few samples, so:

*Smoothing.* Each measurement is divided by the root mean square of its own standard errors: gradients shrink by
orders of magnitude while a model trains, and an average of raw scores would be ruled by the first, noisiest looks
for the rest of the run (docs/experiments.md). ``s`` is an exponential moving average of these scores, corrected for
its start, and ``U`` the variance of that average: ``U_t = b**2 U_(t-1) + (1-b)**2 v_t``. ``v`` is itself a moving
average of the squared standard errors, drawn towards its mean over the sources with the weight of ``_PRIOR_DOF``
degrees of freedom (moderated variances, Smyth 2004), because a few samples a source say little about a variance.

*Doubt.* ``Var(c_k) = (1 - 2 w_k) U_k + sum_j w_j**2 U_j``. A source counts as different once ``|c_k|``
exceeds ``z`` standard errors,

    z**2 = threshold**2 + 2 * log(K * L),     L = max(1, t * (1 - b)),

the bound for the largest of ``K`` sources over ``L`` independent looks (the moving average forgets within
``1 / (1-b)`` updates), made wider for few degrees of freedom as Student's t is (Wallace 1959). The share of
``c_k`` beyond doubt is ``trust_k = max(0, 1 - (z * se_k / c_k)**2)`` (the non-negative garrote, Breiman
1995).

*Step.* With ``scale`` the root mean square of the centred scores, so that ``learning_rate`` (eta) has no
unit,

    log(w_k / prior_k) <- (1 - _PULL * (1 - trust_k)) * log(w_k / prior_k) + eta * trust_k * c_k / scale.

What is beyond doubt moves; what is not goes back towards the prior. Sources that are random splits of one
corpus therefore stay at the prior; ``tests/mixing/test_controls.py`` has the numbers.

*KL-proximal step* (``update: kl_proximal``). The step above is ``argmax_w eta * <x, w> - KL(w || last)`` with ``x`` the
trusted scores. With ``_ANCHOR * KL(w || prior)`` taken off as well, all of the right-hand side is divided by ``1 +
_ANCHOR``: weights settle at ``eta * x / _ANCHOR`` from the prior instead of drifting on for as long as scores differ.

*Robust probes* (``robust``). The probes' weights ``z`` in the objective follow what lags behind, as in group DRO
(Sagawa et al., arXiv 1911.08731) on relative improvements (GRAPE, arXiv 2505.20380): with ``r_n`` the share of its
loss that probe ``n`` has lost since the last measurement, ``log(z_n / v_n) <- (1 - _PULL) * log(z_n / v_n) - (r_n -
mean r) / mean |r|``, ``v`` the given weights. A probe that keeps lagging by one mean improvement comes to count
``exp(5)`` times as much.

*Fidelity guard* (``guard``). What each decision expected of the objective is compared with what the next measurement
finds. Over the last ``_LOOKS`` comparisons (at least ``_FEWEST``), where their correlation is not positive, or where
the mean error exceeds the spread of the scores, nothing is trusted, and all weights go back towards the prior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.mixing.signals import INFLUENCE, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import from_names

__all__ = ["InfluenceStrategy"]

_VERSION = 1
_PULL = 0.2
_PRIOR_DOF = 4.0
_NEARLY_ZERO = 1e-12
_LARGEST_EXPONENT = 700.0  # exp of it is still finite.
_ANCHOR = 0.1
_LOOKS, _FEWEST = 8, 4
UPDATES = ("exponentiated", "kl_proximal")


class InfluenceStrategy:
    """Moves weight to the sources whose training lowers the probes' loss most.

    Args:
        learning_rate: ``eta``: how far one decision moves the logarithm of a weight, for a score of typical
            size.
        ema: ``b``: how much of the old scores stays at each decision. The memory is ``1 / (1 - b)``
            decisions.
        threshold: standard errors below which a score is taken for chance, before the allowance for many
            looks.
        update: ``exponentiated`` or ``kl_proximal``.
        robust: follow the probes that improve least.
        guard: go back towards the prior where predictions do not come true.

    Raises:
        UserError: a value out of range; at ``propose``, a measurement of all probes combined with ``robust``.
    """

    name: ClassVar[str] = "influence"
    needs: ClassVar[frozenset[str]] = frozenset({INFLUENCE})

    def __init__(
        self,
        learning_rate: float = 1.0,
        ema: float = 0.9,
        threshold: float = 2.5,
        update: str = "exponentiated",
        robust: bool = False,
        guard: bool = False,
    ) -> None:
        key = "algorithms.online_mixing.influence"
        if not learning_rate > 0:
            raise UserError(f"{key}.learning_rate: expected a positive number, found {learning_rate}.")
        if not 0 <= ema < 1:
            raise UserError(f"{key}.ema: expected a number from 0 to below 1, found {ema}.")
        if not threshold >= 0:
            raise UserError(f"{key}.threshold: expected a number of at least 0, found {threshold}.")
        if update not in UPDATES:
            raise UserError(
                f"{key}.update: expected {' or '.join(UPDATES)}, found '{update}'.{nearest(update, UPDATES)}"
            )
        self.update, self.robust, self.guard = update, robust, guard
        self.learning_rate = learning_rate
        self.ema = ema
        self.threshold = threshold

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._prior = prior
        # Measurements of each source: one that was added between runs has fewer behind it.
        self._updates = np.zeros(len(prior))
        # Moving averages that started at 0: of the scores, of their squared errors, and the variance of the
        # first.
        self._mean = np.zeros(len(prior))
        self._error2 = np.zeros(len(prior))
        self._variance = np.zeros(len(prior))
        self.probe_importance: dict[str, float] = {}
        self._urgency: dict[str, float] = {}  # log(z / v) by probe.
        self._looks: list[tuple[float, float]] = []  # Predicted and realized changes of the objective.

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.influence
        if measured is None:
            return None
        importance = self._importance(measured) if self.robust else measured.direction_weights
        scores: Array = importance @ measured.scores
        # The same samples meet every direction, so errors are taken as fully correlated: an upper bound.
        errors: Array = importance @ measured.errors
        if not (np.isfinite(scores).all() and np.isfinite(errors).all()):
            return None
        scores, errors = _standardized(scores, errors, measured.samples)
        weights = signals.sampling_weights
        centred, variance, dof = self._centred(scores, errors, measured.samples, weights)
        scale = math.sqrt(float((centred**2).mean()))
        if scale == 0:
            return None
        beyond = np.maximum(0.0, centred**2 - self._z_squared(dof) * variance)
        trust = beyond / np.maximum(centred**2, np.finfo(np.float64).tiny)
        if self.guard and self._unfaithful(signals, measured, noisy=float(variance.mean()) > scale**2):
            trust = np.zeros(len(trust))
        ratio = np.log(np.maximum(weights, _NEARLY_ZERO) / np.maximum(self._prior, _NEARLY_ZERO))
        ratio = (1 - _PULL * (1 - trust)) * ratio + self.learning_rate * trust * centred / scale
        if self.update == "kl_proximal":
            ratio = ratio / (1 + _ANCHOR)
        wish: Array = self._prior * np.exp(ratio - ratio.max())
        return np.asarray(wish / wish.sum())

    def _importance(self, measured: SourceInfluence) -> Array:
        """The probes' weights, more of it on those that improve least, ``[P]``."""
        if measured.directions != measured.probes:
            raise UserError(
                "algorithms.online_mixing.influence.robust: expected one direction for each probe, found them combined."
            )
        gains = -measured.probe_changes / (measured.probe_losses - measured.probe_changes)
        urgency = np.array([self._urgency.get(name, 0.0) for name in measured.probes])
        if np.isfinite(gains).all() and np.abs(gains).mean() > 0:
            urgency = (1 - _PULL) * urgency - (gains - gains.mean()) / np.abs(gains).mean()
        self._urgency = dict(zip(measured.probes, urgency.tolist(), strict=True))
        importance: Array = measured.probe_weights * np.exp(urgency - urgency.max())
        importance = importance / importance.sum()
        self.probe_importance = dict(zip(measured.probes, importance.tolist(), strict=True))
        return importance

    def _unfaithful(self, signals: Signals, measured: SourceInfluence, *, noisy: bool) -> bool:
        """Whether predictions have not come true of late; takes in the newest comparison."""
        if signals.predicted_changes is not None:
            pair = measured.direction_weights @ np.stack(
                [signals.predicted_changes, measured.direction_changes], axis=1
            )
            if np.isfinite(pair).all():
                self._looks = [*self._looks, (float(pair[0]), float(pair[1]))][-_LOOKS:]
        if len(self._looks) < _FEWEST:
            return noisy
        predicted, realized = np.array(self._looks).T
        agreement = float((predicted - predicted.mean()) @ (realized - realized.mean()))
        return noisy or agreement <= 0

    def _centred(self, scores: Array, errors: Array, samples: int, weights: Array) -> tuple[Array, Array, Array]:
        """Take in a measurement; return centred mean scores, their variances, and the latter's d.o.f."""
        self._updates = self._updates + 1
        keep, take = self.ema, 1 - self.ema
        total = 1 - keep**self._updates
        squares = take / (1 + keep) * (1 - keep ** (2 * self._updates))
        own_dof = (samples - 1) * total**2 / squares
        self._mean = keep * self._mean + take * scores
        self._error2 = keep * self._error2 + take * errors**2
        own = self._error2 / total
        moderated = (_PRIOR_DOF * own.mean() + own_dof * own) / (_PRIOR_DOF + own_dof)
        # A noisy look is noisier than the average knows.
        moderated = np.maximum(moderated, (errors**2).mean())
        self._variance = keep**2 * self._variance + take**2 * moderated
        mean, spread = self._mean / total, self._variance / total**2
        variance = (1 - 2 * weights) * spread + float(weights**2 @ spread)
        dof = own_dof + np.minimum(_PRIOR_DOF, (len(scores) - 1) * own_dof)
        return mean - float(weights @ mean), variance, dof

    def _z_squared(self, dof: Array) -> Array:
        """By source, ``[K]``."""
        looks = np.maximum(1.0, self._updates * (1 - self.ema))
        z = np.sqrt(self.threshold**2 + 2 * np.log(len(self._names) * looks))
        exponent = (z * (8 * dof + 3) / (8 * dof + 1)) ** 2 / dof
        return np.asarray(dof * np.expm1(np.minimum(exponent, _LARGEST_EXPONENT)))

    def state_dict(self) -> dict[str, Any]:
        def by_name(values: Array) -> dict[str, float]:
            return dict(zip(self._names, values.tolist(), strict=True))

        return {
            "version": _VERSION,
            "updates": by_name(self._updates),
            "mean": by_name(self._mean),
            "error2": by_name(self._error2),
            "variance": by_name(self._variance),
            "urgency": dict(self._urgency),
            "looks": [list(look) for look in self._looks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A new source has no measurement behind it, and its weight moves once its own scores are beyond doubt."""
        updates = state["updates"]
        if not isinstance(updates, Mapping):  # Checkpoints from before sources could change: one count for all.
            updates = dict.fromkeys(state["mean"], updates)
        self._updates, self._mean, self._error2, self._variance = (
            from_names(self._names, values, new=0.0)
            for values in (updates, state["mean"], state["error2"], state["variance"])
        )
        # Checkpoints from before these options have neither.
        self._urgency = dict(state.get("urgency", {}))
        self._looks = [(float(predicted), float(realized)) for predicted, realized in state.get("looks", [])]


def _standardized(scores: Array, errors: Array, samples: int) -> tuple[Array, Array]:
    """Scores and errors in units of the root mean square error, which itself is known from few samples.

    Dividing by an estimate with ``n`` degrees of freedom widens the variance by ``n / (n - 2)`` (Student's t).
    """
    unit = math.sqrt(float((errors**2).mean()))
    if unit == 0:
        return scores, errors
    freedom = len(scores) * (samples - 1)
    return scores / unit, errors / unit * math.sqrt(freedom / max(freedom - 2, 1))
