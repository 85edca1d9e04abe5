"""ADO: draw from the sources whose own scaling laws promise the fastest progress (Jiang et al., arXiv 2410.11820).

At each decision a law ``L_k(n) = exp(e_k) + exp(b_k) * n**-a_k`` is fitted to each source's training losses so far,
``n`` the batches trained on in all (``use_same_step_size`` of the authors' code, ``yidingjiang/ado:
src/data_selectors/ado.py``). Then, with the prior ``p`` and ``h_k`` the recent share of source ``k``,

    slope_k = a_k * exp(b_k) * n**-a_k / n
    rho_k   ∝ p_k * h_k**0.5 * slope_k,  at least 0.01 each
    w       = 0.9 * average of rho + 0.1 * rho

The average begins at ``p`` and is over all batches; ``h`` is a moving average that forgets a tenth at each batch. (The
code has ``(h_k * (1 - h_k))**0.5``; ``h_k**0.5`` is from our notes.) The fit is the code's: Huber's loss
(1e-3) on logarithms, ``a`` up to 0.8, ``e`` at least 0.5, ``b`` up to 6.5, started from its grid; here by the best of
the grid's points and damped Gauss-Newton steps within the bounds, and losses are means between decisions instead of a
filtered series of batches.

Cost: none in passes; a fit takes some ten milliseconds a source.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.mixing.signals import LOSSES, Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import by_name, from_names, weights_from_names

__all__ = ["ADOStrategy", "fit_law"]

_VERSION = 1
_FLOOR = 0.01
_RECENT = 0.9  # Of the shares drawn, kept at each batch.
_INSTANT = 0.1
_SMALLEST_EXPONENT = 0.05
_FEWEST = 4  # Points of a fit.
_MOST = 256
_DELTA = 1e-3
# b, e and a.
_LOWER, _UPPER = np.array([-20.0, 0.5, 0.001]), np.array([6.5, 5.0, 0.8])
_GRID = np.array(list(itertools.product(np.arange(-2.0, 6.0), np.arange(-2, 2, 0.5), np.arange(0, 0.8, 0.1))))
_STARTS = 4
_STEPS = 60


class ADOStrategy:
    """Follows the slopes of fitted scaling laws. No settings: they are the paper's."""

    name: ClassVar[str] = "ado"
    needs: ClassVar[frozenset[str]] = frozenset({LOSSES})

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        self._prior = prior
        self._average = prior
        self._recent = prior
        self._batch = 0
        self._tokens = np.zeros(len(prior))
        # Points of the laws: batches and, in them, each source's mean loss.
        self._places: list[float] = []
        self._losses: list[Array] = []

    def propose(self, signals: Signals) -> Array | None:
        came = np.isfinite(signals.losses)
        batches = signals.batch - self._batch
        if not came.any() or batches < 1:
            return None
        self._remember(signals, came, batches)
        if len(self._places) < _FEWEST:
            return None
        slopes = self._slopes(float(signals.batch))
        pull = self._prior * np.sqrt(self._recent) * slopes
        if not (np.isfinite(pull).all() and pull.sum() > 0):
            return None
        instant = np.maximum(pull / pull.sum(), _FLOOR)
        instant = instant / instant.sum()
        wish = (1 - _INSTANT) * self._average + _INSTANT * instant
        share = batches / (signals.batch + 1)
        self._average = (1 - share) * self._average + share * instant
        return np.asarray(wish)

    def _slopes(self, batch: float) -> Array:
        """Of each source's law; a source that has come too late for one has the mean slope of the others."""
        places, slopes = np.array(self._places), []
        for losses in np.array(self._losses).T:
            known = np.isfinite(losses)
            enough = int(known.sum()) >= _FEWEST
            slopes.append(_slope(fit_law(places[known], losses[known]), batch) if enough else np.nan)
        found = np.array(slopes)
        return np.where(np.isfinite(found), found, np.mean(found[np.isfinite(found)]))

    def _remember(self, signals: Signals, came: Array, batches: int) -> None:
        """A point on each source's curve; a source that did not come keeps its last loss, if it has ever come."""
        before = self._losses[-1] if self._losses else np.full(len(came), np.nan)
        # In the middle of the batches that the mean is over.
        self._places.append((self._batch + signals.batch) / 2)
        self._losses.append(np.where(came, signals.losses, before))
        drawn = signals.tokens_seen - self._tokens
        if drawn.sum() > 0:
            kept = _RECENT**batches
            self._recent = kept * self._recent + (1 - kept) * drawn / drawn.sum()
        self._batch, self._tokens = signals.batch, signals.tokens_seen
        if len(self._places) > _MOST:
            halves = range(0, len(self._places) - 1, 2)
            self._places = [(self._places[i] + self._places[i + 1]) / 2 for i in halves]
            self._losses = [(self._losses[i] + self._losses[i + 1]) / 2 for i in halves]

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "average": by_name(self._names, self._average),
            "recent": by_name(self._names, self._recent),
            "batch": self._batch,
            "tokens": by_name(self._names, self._tokens),
            "places": list(self._places),
            "losses": [by_name(self._names, losses) for losses in self._losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average, self._recent = (
            weights_from_names(self._names, state[key], self._prior) for key in ("average", "recent")
        )
        self._tokens = from_names(self._names, state["tokens"], new=0.0)
        self._batch = int(state["batch"])
        self._places = [float(place) for place in state["places"]]
        self._losses = [from_names(self._names, losses, new=np.nan) for losses in state["losses"]]


def fit_law(places: Array, losses: Array) -> Array:
    """``(b, e, a)`` of ``L(n) = exp(e) + exp(b) * n**-a`` that fit best.

    Args:
        places: ``[T]``, ``n``, above 0.
        losses: ``[T]``, above 0.
    """
    logs, targets = np.log(places), np.log(np.maximum(losses, 1e-12))
    starts = np.clip(_GRID, _LOWER, _UPPER)
    values = np.array([_objective(start, logs, targets) for start in starts])
    best = np.argsort(values, kind="stable")[:_STARTS]
    fitted = [_descend(starts[place], logs, targets) for place in best]
    return min(fitted, key=lambda law: _objective(law, logs, targets))


def _slope(law: Array, place: float) -> float:
    """How fast the curve falls at ``place``, a nat for each batch."""
    amplitude, _, exponent = law
    return float(max(exponent, _SMALLEST_EXPONENT) * np.exp(amplitude) * place ** (-exponent) / place)


def _predicted(law: Array, logs: Array) -> Array:
    return np.asarray(np.logaddexp(law[0] - law[2] * logs, law[1]))


def _objective(law: Array, logs: Array, targets: Array) -> float:
    off = np.abs(_predicted(law, logs) - targets)
    return float(np.where(off > _DELTA, _DELTA * (off - 0.5 * _DELTA), 0.5 * off**2).sum())


def _descend(law: Array, logs: Array, targets: Array) -> Array:
    """Levenberg's steps on the reweighted squares that Huber's loss amounts to, clipped to the bounds."""
    damping, value = 1e-3, _objective(law, logs, targets)
    for _ in range(_STEPS):
        off = _predicted(law, logs) - targets
        weights = _DELTA / np.maximum(np.abs(off), _DELTA)
        share = np.exp(law[0] - law[2] * logs - _predicted(law, logs))
        jacobian = np.stack([share, 1 - share, -logs * share], axis=1)
        # At a bound that the gradient pushes against, a parameter stays.
        gradient = jacobian.T @ (weights * off)
        free = ~(((law <= _LOWER) & (gradient > 0)) | ((law >= _UPPER) & (gradient < 0)))
        if not free.any():
            break
        normal = (jacobian[:, free].T * weights) @ jacobian[:, free]
        step = np.zeros(3)
        scale = damping * np.maximum(np.diag(normal), 1e-9)
        step[free] = np.linalg.solve(normal + np.diag(scale), gradient[free])
        moved = np.clip(law - step, _LOWER, _UPPER)
        found = _objective(moved, logs, targets)
        if found < value:
            done = value - found < 1e-12 * value
            law, value, damping = moved, found, max(damping / 5, 1e-9)
            if done:
                break
        elif damping > 1e6:
            break
        else:
            damping *= 5
    return law
