"""Gradient matching: the mixture whose gradient comes nearest to the target's own.

A step on the target's data would follow its gradient ``g_T``; a step on a mixture follows ``sum_k w_k g_k``. So the
weights are asked for under which the second is most like the first (GRAD-MATCH, Killamsetty et al., arXiv 2103.00123,
chooses samples of one data set so; the noise terms and the use on a mixture are our own):

    minimise over u >= 0   |g_T - sum_k u_k g_k|**2 + ridge * sum_k e_k (u_k - c p_k)**2,     w = u / sum u

All that it needs are products, ``<g_k, g_l>`` and ``<g_k, g_T>``. Unlike rules that follow the scores ``<g_k, g_T>``
alone, it counts what the sources have in common only once: where the target is the mean over the sources, its solution
is their uniform mixture and not the source with the largest gradient, and a source that repeats another shares its
weight with it.

*Noise.* ``g_k`` is the mean over a few samples. ``|g_k|**2`` is taken without the bias that this brings, and ``e_k``,
the squared error of the mean, pulls ``u_k`` to where nothing is known: the prior mixture ``p``, at the length ``c =
<g_T, g_p> / |g_p|**2`` that matches the target best. Products are divided by the mean ``|g_k|**2`` of their measurement
and averaged over decisions (``ema``, corrected for its start), and ``e_k`` shrinks with that average.

*Sharpness* ``s``: ``w_k`` is proportional to ``p_k * (u_k / p_k)**s``. The pull to the prior is meant for the noise of
one decision; with ``s`` above 1 what stands out of it is followed further.

Cost: a ``GRAM`` measurement with probes a decision, a forward and backward pass without weight gradients over ``K *
source_samples + P * probe_samples`` samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.signals import GRAM, PROBE_PRODUCTS, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, from_names

__all__ = ["MatchingStrategy", "nearest_combination"]

_VERSION = 1
_KEY = "algorithms.online_mixing.matching"
_CONVERGED = 1e-10
_TINY = float(np.finfo(np.float64).tiny)
_SMALLEST_EIGENVALUE = 1e-6  # Of the largest: unbiased norms may leave the matrix slightly indefinite.


class MatchingStrategy:
    """Weights whose gradient is nearest to the probes'.

    Args:
        ridge: how strongly the error of the gradients pulls to the prior; 1 is its size.
        sharpness: how far what stands out is followed.
        ema: share of the old products that is kept at each decision.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "matching"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM, PROBE_PRODUCTS})

    def __init__(self, ridge: float = 1.0, sharpness: float = 1.0, ema: float = 0.5) -> None:
        if not ridge >= 0:
            raise UserError(f"{_KEY}.ridge: expected a number of at least 0, found {ridge}.")
        if not sharpness > 0:
            raise UserError(f"{_KEY}.sharpness: expected a positive number, found {sharpness}.")
        if not 0 <= ema < 1:
            raise UserError(f"{_KEY}.ema: expected a number from 0 to below 1, found {ema}.")
        self.ridge = ridge
        self.sharpness = sharpness
        self.ema = ema

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._prior = prior
        count = len(prior)
        # Moving averages that started at 0: of the products, and the squared errors of that average.
        self._gram, self._target, self._errors = np.zeros((count, count)), np.zeros(count), np.zeros(count)
        self._total = 0.0

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.gradients
        if measured is None or measured.target_products is None or not np.isfinite(measured.products).all():
            return None
        scale = float(measured.squared_norms.mean())
        if not scale > 0:
            return None  # Nothing but noise.
        gram = measured.products.copy()
        np.fill_diagonal(gram, measured.squared_norms)
        keep, take = self.ema, 1 - self.ema
        self._gram = keep * self._gram + take * gram / scale
        self._target = keep * self._target + take * measured.target_products / scale
        self._errors = keep**2 * self._errors + take**2 * measured.variances / measured.samples / scale
        self._total = keep * self._total + take
        total = self._total
        nearest = nearest_combination(
            self._gram / total, self._target / total, self.ridge * self._errors / total**2, self._prior
        )
        if nearest is None:
            return None
        wish = np.where(self._prior > 0, self._prior, 0.0)
        lift = np.divide(nearest, self._prior, out=np.zeros(len(nearest)), where=self._prior > 0)
        wish = wish * (lift / max(float(lift.max()), _TINY)) ** self.sharpness
        return np.asarray(wish / wish.sum())

    def state_dict(self) -> dict[str, Any]:
        rows = zip(self._names, self._gram, strict=True)
        return {
            "version": _VERSION,
            "gram": {name: by_name(self._names, row) for name, row in rows},
            "target": by_name(self._names, self._target),
            "errors": by_name(self._names, self._errors),
            "total": self._total,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With other sources the averages begin anew."""
        if state["gram"].keys() != set(self._names):
            return
        self._gram = np.stack([from_names(self._names, state["gram"][name]) for name in self._names])
        self._target = from_names(self._names, state["target"])
        self._errors = from_names(self._names, state["errors"])
        self._total = float(state["total"])


def nearest_combination(gram: Array, target: Array, pull: Array, prior: Array) -> Array | None:
    """``argmin_(u >= 0) u' G u - 2 u' t + sum_k pull_k (u_k - c p_k)**2``; see the module's text.

    Args:
        gram: ``[K, K]``, products of the sources' gradients.
        target: ``[K]``, their products with the target's.
        pull: ``[K]``, non-negative.
        prior: ``[K]``, sums to 1.

    Returns:
        ``u``, ``[K]``; None where the prior's gradient does not lead towards the target and nothing else does.
    """
    length = float(prior @ gram @ prior)
    reach = max(0.0, float(prior @ target) / length) if length > 0 else 0.0
    values, vectors = np.linalg.eigh((gram + gram.T) / 2 + np.diag(pull))
    matrix = (vectors * np.maximum(values, _SMALLEST_EIGENVALUE * values.max())) @ vectors.T
    wanted = target + pull * reach * prior
    u = _non_negative_solution(matrix, wanted)
    return u if u.sum() > 0 else None


def _non_negative_solution(matrix: Array, wanted: Array) -> Array:
    """``argmin_(u >= 0) u' A u / 2 - u' b`` for positive definite ``A``, by active sets.

    Lawson & Hanson 1974; on the normal equations, Bro & de Jong 1997.
    """
    u = np.zeros(len(wanted))
    free = np.zeros(len(wanted), bool)
    tolerance = _CONVERGED * float(np.abs(wanted).max())
    for _ in range(3 * len(wanted) + 1):
        slope = np.where(free, -np.inf, wanted - matrix @ u)
        if slope.max() <= tolerance:
            break
        free[int(slope.argmax())] = True
        while True:
            solved = np.zeros(len(wanted))
            solved[free] = np.linalg.solve(matrix[np.ix_(free, free)], wanted[free])
            below = free & (solved <= 0)
            if not below.any():
                break
            step = (u[below] / np.maximum(u[below] - solved[below], _TINY)).min()
            u = u + step * (solved - u)
            free &= u > _CONVERGED * float(u.max())
            u[~free] = 0.0
        u = solved
    return u
