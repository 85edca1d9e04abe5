"""The log-linear mixing law: what loss a mixture ends with (Ye et al. 2024, arXiv 2403.16952).

For a target i and sampling weights w that sum to 1,

    L_i(w) = c_i + exp(b_i + sum_j t_ij w_j) = c_i + exp(sum_j a_ij w_j),    a_ij = b_i + t_ij:

since the weights sum to 1, ``b_i`` only shifts all exponents and is not a parameter of its own. That leaves
``K + 1`` for each target, so that O(K) runs suffice; among laws for mixtures this one ranked best where runs are few
(Olmix, arXiv 2602.12237). ``L_i`` is convex in w.

*Fit.* With ``r_n`` the residual of run n and ``u_n`` its weight, minimise ``sum_n u_n huber(r_n)``; Huber's function
bends at 1.345 times the noise: 95 % efficient under normal noise (Huber 1981), and a run that diverged does not bend
the law. Levenberg-Marquardt starts from a fixed list of floors ``c`` below the smallest loss, for each of which
``log(L - c)`` is linear in w and is fitted by weighted least squares (weights ``(L - c)**2``, the delta method); the
best end wins. That first fit is of least squares; the noise is then measured on its residuals (median absolute
deviation, corrected for the parameters) and the descent goes on, a few times. No random numbers. A penalty on the
``t_ij`` was tried: it ranks one of RegMix's 13 targets better from 34 runs, and their average worse at any strength,
since a source can lower the loss on its own text by orders of magnitude more than the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cheapertraining.mixing.signals import Array

__all__ = ["LogLinearLaw", "fit_law"]

_FLOORS = (0.02, 0.1, 0.3, 1.0, 3.0)
"""Starting floors: so many ranges of the losses below the smallest."""
_BEND = 1.345
_LARGEST = 50.0
"""Exponents are cut here while fitting: far beyond any loss, far below overflow."""
_ROUNDS = 3
_STEPS, _TRIALS, _CONVERGED = 100, 12, 1e-8


@dataclass(frozen=True)
class LogLinearLaw:
    """``L(w) = floor + exp(exponents @ w)``.

    Attributes:
        floor: the part of the loss that no mixture moves.
        exponents: ``[K]``; a source with a smaller one lowers the loss.
    """

    floor: float
    exponents: Array

    def predict(self, weights: Array) -> Array:
        """Losses ``[...]`` of mixtures ``[..., K]``."""
        result: Array = self.floor + np.exp(np.minimum(weights @ self.exponents, 700.0))
        return result

    def gradient(self, weights: Array) -> Array:
        """``dL/dw = exp(exponents @ w) * exponents``, ``[K]``, of one mixture ``[K]``."""
        result: Array = (self.predict(weights) - self.floor) * self.exponents
        return result


def fit_law(
    weights: Array,
    losses: Array,
    *,
    run_weights: Array | None = None,
    start: LogLinearLaw | None = None,
) -> LogLinearLaw:
    """Fit the law of one target.

    Args:
        weights: ``[N, K]``, rows sum to 1.
        losses: ``[N]``, not all equal.
        run_weights: ``[N]``, how much each run counts; None: 1 each.
        start: descend from here alone, in place of the fixed list (to fit nearly the same data again).

    Raises:
        ValueError: the losses are all equal.
    """
    middle, scale = float(np.median(losses)), float(np.std(losses))
    if not scale > 0:
        raise ValueError("the losses are all equal")
    counted = np.ones(len(losses)) if run_weights is None else run_weights
    problem = _Problem(weights, (losses - middle) / scale, counted)
    if start is None:
        starts: Sequence[Array] = [problem.linearized(floor) for floor in _FLOORS]
    else:
        starts = [np.concatenate([[(start.floor - middle) / scale], start.exponents - np.log(scale)])]
    _, best = min((problem.descend(begin, np.inf) for begin in starts), key=lambda end: end[0])
    for _ in range(_ROUNDS):
        noise = problem.noise(best)
        if noise < 1e-7:
            break
        _, best = problem.descend(best, _BEND * noise)
    return LogLinearLaw(middle + scale * float(best[0]), best[1:] + np.log(scale))


@dataclass(frozen=True)
class _Problem:
    """Mixtures ``x``, standardised losses ``y``, weights of the runs ``u``. Parameters: ``[c, a_1, …, a_K]``."""

    x: Array
    y: Array
    u: Array

    def linearized(self, floor: float) -> Array:
        """Parameters from least squares on ``log(y - c)``, with c so many ranges below the smallest y."""
        c = float(self.y.min() - floor * np.ptp(self.y))
        above = self.y - c
        count, mean = self.x.shape[1], float(np.average(np.log(above), weights=self.u * above**2))
        rows = self.x * (self.u * above**2)[:, None]
        # A trace of ridge, in proportion, so that there is one answer also with fewer runs than sources.
        trace = 1e-6 * float(np.trace(rows.T @ self.x)) / count * np.eye(count)
        a = np.linalg.solve(rows.T @ self.x + trace, rows.T @ np.log(above) + trace @ np.full(count, mean))
        return np.concatenate([[c], a])

    def residuals(self, parameters: Array) -> Array:
        result: Array = parameters[0] + np.exp(np.minimum(self.x @ parameters[1:], _LARGEST)) - self.y
        return result

    def cost(self, parameters: Array, bend: float) -> float:
        size = np.abs(self.residuals(parameters))
        inner = np.minimum(size, bend)
        huber = inner * (size - inner / 2)
        return float(self.u @ huber)

    def noise(self, parameters: Array) -> float:
        """Robust standard deviation of the residuals, for the parameters that were fitted to them."""
        runs, count = self.x.shape
        freed = (runs / max(runs - count - 1, 1)) ** 0.5
        return float(1.4826 * np.median(np.abs(self.residuals(parameters))) * freed)

    def descend(self, parameters: Array, bend: float) -> tuple[float, Array]:
        """Levenberg-Marquardt on the cost, Huber's bend by reweighting; return (cost, parameters)."""
        cost, damping = self.cost(parameters, bend), 1e-3
        for _ in range(_STEPS):
            growth = np.exp(np.minimum(self.x @ parameters[1:], _LARGEST))
            jacobian = np.concatenate([np.ones((len(self.y), 1)), growth[:, None] * self.x], axis=1)
            residuals = self.residuals(parameters)
            counted = self.u * np.minimum(1.0, bend / np.maximum(np.abs(residuals), 1e-300))
            hessian = jacobian.T @ (counted[:, None] * jacobian)
            slope = jacobian.T @ (counted * residuals)
            before = cost
            for _ in range(_TRIALS):
                damped = hessian + damping * np.diag(np.diag(hessian) + 1e-9)
                trial = parameters - np.linalg.solve(damped, slope)
                if (lower := self.cost(trial, bend)) < cost:
                    cost, parameters, damping = lower, trial, max(damping / 5, 1e-12)
                    break
                damping *= 4
            if before - cost <= _CONVERGED * before:
                break
        return cost, parameters
