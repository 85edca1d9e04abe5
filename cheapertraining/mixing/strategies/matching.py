"""Gradient matching: the mixture whose gradient comes nearest to the target's own.

A step on the target's data would follow its gradient ``g_T``; a step on a mixture follows ``sum_k w_k g_k``. So the
weights are asked for under which the second is most like the first (GRAD-MATCH, Killamsetty et al., arXiv 2103.00123,
chooses samples of one data set so; the noise terms and the use on a mixture are our own):

    minimise on the simplex   |g_T - sum_k w_k g_k|**2 + ridge * sum_k e_k (w_k - p_k)**2

All that it needs are products, ``<g_k, g_l>`` and ``<g_k, g_T>``. Unlike rules that follow the scores ``<g_k, g_T>``
alone, it counts what the sources have in common only once: where the target is the mean over the sources, its solution
is their uniform mixture and not the source with the largest gradient, and a source that repeats another shares its
weight with it. As the weights sum to 1, a source that is known by heart, whose gradient is short, is not called on more
for that.

*Noise.* ``g_k`` is the mean over a few samples. ``|g_k|**2`` is taken without the bias that this brings, and ``e_k``,
the squared error of the mean, pulls ``w_k`` to where nothing is known: the prior mixture ``p``. Products are divided by
the mean ``|g_k|**2`` of their measurement and averaged over decisions (``ema``, corrected for its start), and ``e_k``
shrinks with that average.

*Reliability.* The same is solved for two halves of the samples apart. With ``a`` and ``b`` their moves from the prior
and ``r = 2 <a, b> / (<a, a> + <b, b>)``, products weighted by ``1 / p``, the wish is only as far from the prior as the
halves agree,

    w <- p + R (w - p),     R = 2 r / (1 + r) for r > 0, else 0

the reliability of a test of twice the length (Spearman 1910, Brown 1910). So sources that are equally good stay at the
prior, however noisy the gradients are.

Cost: a ``GRAM`` measurement with probes a decision, a forward and backward pass without weight gradients over ``K *
source_samples + P * probe_samples`` samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.influence.scorers.gram import SourceGradients
from cheapertraining.mixing.signals import GRAM, PROBE_PRODUCTS, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, from_names

__all__ = ["MatchingStrategy", "nearest_mixture"]

_VERSION = 1
_KEY = "algorithms.online_mixing.matching"
_CONVERGED = 1e-10
_PARTS = ("all", "even", "odd")
_SMALLEST_EIGENVALUE = 1e-6  # Of the largest: unbiased norms may leave the matrix slightly indefinite.


class MatchingStrategy:
    """Weights whose gradient is nearest to the probes'.

    Args:
        ridge: how strongly the error of the gradients pulls to the prior; 1 is its size.
        ema: share of the old products that is kept at each decision.

    Raises:
        UserError: a value out of range.
    """

    name: ClassVar[str] = "matching"
    needs: ClassVar[frozenset[str]] = frozenset({GRAM, PROBE_PRODUCTS})

    def __init__(self, ridge: float = 0.3, ema: float = 0.5) -> None:
        if not ridge >= 0:
            raise UserError(f"{_KEY}.ridge: expected a number of at least 0, found {ridge}.")
        if not 0 <= ema < 1:
            raise UserError(f"{_KEY}.ema: expected a number from 0 to below 1, found {ema}.")
        self.ridge = ridge
        self.ema = ema

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._prior = prior
        self._averages = {part: _Average.zeros(len(prior)) for part in _PARTS}

    def propose(self, signals: Signals) -> Array | None:
        measured = signals.gradients
        if measured is None or measured.target_products is None or not np.isfinite(measured.products).all():
            return None
        scale = float(measured.squared_norms.mean())
        if not scale > 0:
            return None  # Nothing but noise.
        for part, found in zip(_PARTS, (measured, *measured.halves), strict=False):
            self._averages[part] = self._averages[part].with_measured(found, scale, self.ema)
        moves = {
            part: average.nearest(self.ridge, self._prior) - self._prior
            for part, average in self._averages.items()
            if average.total > 0
        }
        trust = _reliability(moves[_PARTS[1]], moves[_PARTS[2]], self._prior) if len(moves) == len(_PARTS) else 1.0
        return np.asarray(self._prior + trust * moves[_PARTS[0]])

    def state_dict(self) -> dict[str, Any]:
        averages = {part: average.state_dict(self._names) for part, average in self._averages.items()}
        return {"version": _VERSION, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With other sources the averages begin anew."""
        saved = state["averages"]
        if saved[_PARTS[0]]["gram"].keys() == set(self._names):
            self._averages = {part: _Average.of(saved[part], self._names) for part in _PARTS}


@dataclass(frozen=True)
class _Average:
    """Moving averages that started at 0: of the products, and the squared errors of that average."""

    gram: Array
    target: Array
    errors: Array
    total: float

    @classmethod
    def zeros(cls, count: int) -> _Average:
        return cls(np.zeros((count, count)), np.zeros(count), np.zeros(count), 0.0)

    def with_measured(self, found: SourceGradients, scale: float, keep: float) -> _Average:
        assert found.target_products is not None
        gram, take = found.products.copy(), 1 - keep
        np.fill_diagonal(gram, found.squared_norms)
        return _Average(
            keep * self.gram + take * gram / scale,
            keep * self.target + take * found.target_products / scale,
            keep**2 * self.errors + take**2 * found.variances / found.samples / scale,
            keep * self.total + take,
        )

    def nearest(self, ridge: float, prior: Array) -> Array:
        total = self.total
        return nearest_mixture(self.gram / total, self.target / total, ridge * self.errors / total**2, prior)

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "gram": {name: by_name(names, row) for name, row in zip(names, self.gram, strict=True)},
            "target": by_name(names, self.target),
            "errors": by_name(names, self.errors),
            "total": self.total,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], names: Sequence[str]) -> _Average:
        gram = np.stack([from_names(names, state["gram"][name]) for name in names])
        return cls(gram, from_names(names, state["target"]), from_names(names, state["errors"]), float(state["total"]))


def _reliability(one: Array, other: Array, prior: Array) -> float:
    """``R`` of the module's text."""
    weights = np.divide(1.0, prior, out=np.zeros(len(prior)), where=prior > 0)
    size = float(weights @ (one**2 + other**2))
    agreement = 2 * float(weights @ (one * other)) / size if size > 0 else 0.0
    return 2 * agreement / (1 + agreement) if agreement > 0 else 0.0


def nearest_mixture(gram: Array, target: Array, pull: Array, prior: Array) -> Array:
    """``argmin_w w' G w - 2 w' t + sum_k pull_k (w_k - p_k)**2`` on the simplex; see the module's text.

    By active sets: of the sources that are not at 0 the optimum is that of a linear system; sources leave where it is
    below 0, and come back where their slope is above the others'.

    Args:
        gram: ``[K, K]``, products of the sources' gradients.
        target: ``[K]``, their products with the target's.
        pull: ``[K]``, non-negative.
        prior: ``[K]``, sums to 1; a source at 0 stays there.
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2 + np.diag(pull))
    matrix = (vectors * np.maximum(values, _SMALLEST_EIGENVALUE * values.max())) @ vectors.T
    wanted = target + pull * prior
    allowed = prior > 0
    free, w = allowed.copy(), np.where(allowed, prior, 0.0)
    tolerance = _CONVERGED * float(np.abs(matrix).max())
    for _ in range(10 * len(w)):
        solved, slope = _on_face(matrix, wanted, free)
        below = free & (solved < 0)
        if below.any():
            w = w + float((w[below] / (w[below] - solved[below])).min()) * (solved - w)
            free &= w > _CONVERGED
            w = np.where(free, w, 0.0)
            continue
        w = solved
        beyond = np.where(allowed & ~free, wanted - matrix @ w - slope, -np.inf)
        if beyond.max() <= tolerance:
            break
        free[int(beyond.argmax())] = True
    return np.asarray(w / w.sum())


def _on_face(matrix: Array, wanted: Array, free: NDArray[np.bool_]) -> tuple[Array, float]:
    """The optimum with ``free`` sources alone, which may be below 0, and the slope that they share there."""
    count = int(free.sum())
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = matrix[np.ix_(free, free)], 0.0
    found = np.linalg.solve(system, np.append(wanted[free], 1.0))
    solved = np.zeros(len(wanted))
    solved[free] = found[:count]
    return solved, float(found[count])
