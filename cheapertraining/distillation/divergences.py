"""Divergences D(p, q) of a student's distribution q from a teacher's p over one set of outcomes.

Each has a value and a slope, the derivative of the value by ``log q`` outcome by outcome as if these were independent.
With ``log q = log_softmax(z)`` the gradient is ``dD/dz = slope - q * sum(slope)``.

| name | value, summed over outcomes | slope | source |
|---|---|---|---|
| forward_kl | p log(p/q) | -p | Hinton et al. 2015, arXiv 1503.02531 |
| reverse_kl | q log(q/p) | q (log(q/p) + 1) | MiniLLM, arXiv 2306.08543 |
| jensen_shannon | b p log(p/M) + (1-b) q log(q/M), M = b p + (1-b) q | (1-b) q log(q/M) | GKD, arXiv 2306.13649 |
| skew_kl | p log(p/M), M = a p + (1-a) q | -(1-a) p q / M | DistiLLM, arXiv 2402.03898 |
| skew_reverse_kl | q log(q/M), M = (1-a) p + a q | q (log(q/M) + 1 - a q / M) | DistiLLM |
| total_variation | abs(p - q) / 2 | q sign(q - p) / 2 | f-divergences, arXiv 2307.15190 |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapertraining.errors import UserError, nearest

__all__ = ["DIVERGENCES", "FORWARD_KL", "Divergence", "log_softmax"]

FLOOR = -1e30
"""Log-probability that stands for zero: ``0 * FLOOR`` is 0, where ``0 * -inf`` would be NaN."""

_Form = Callable[[Tensor, Tensor, float], Tensor]


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, finite: an outcome of logit -inf gets ``FLOOR``."""
    return logits.log_softmax(dim=-1).clamp(min=FLOOR)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """``log(share p + (1 - share) q)``."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share)).clamp(min=FLOOR)


def _forward_kl(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _forward_kl_slope(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return -log_p.exp()


def _reverse_kl(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def _reverse_kl_slope(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return log_q.exp() * (log_q - log_p + 1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    mixture = _log_mixture(log_p, log_q, beta)
    return beta * _forward_kl(log_p, mixture, 0) + (1 - beta) * _forward_kl(log_q, mixture, 0)


def _jensen_shannon_slope(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return (1 - beta) * log_q.exp() * (log_q - _log_mixture(log_p, log_q, beta))


def _skew_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    return _forward_kl(log_p, _log_mixture(log_p, log_q, skew), 0)


def _skew_kl_slope(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    return (skew - 1) * (log_p + log_q - _log_mixture(log_p, log_q, skew)).exp()


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    return _forward_kl(log_q, _log_mixture(log_q, log_p, skew), 0)


def _skew_reverse_kl_slope(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    ratio = log_q - _log_mixture(log_q, log_p, skew)
    return log_q.exp() * (ratio + 1 - skew * ratio.exp())


def _total_variation(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def _total_variation_slope(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    q = log_q.exp()
    return 0.5 * q * (q - log_p.exp()).sign()


_FORMS: dict[str, tuple[_Form, _Form, float | None]] = {
    "forward_kl": (_forward_kl, _forward_kl_slope, None),
    "reverse_kl": (_reverse_kl, _reverse_kl_slope, None),
    "jensen_shannon": (_jensen_shannon, _jensen_shannon_slope, 0.5),
    "skew_kl": (_skew_kl, _skew_kl_slope, 0.1),
    "skew_reverse_kl": (_skew_reverse_kl, _skew_reverse_kl_slope, 0.1),
    "total_variation": (_total_variation, _total_variation_slope, None),
}
DIVERGENCES = tuple(_FORMS)
"""The names that :class:`Divergence` knows."""


@dataclass(frozen=True)
class Divergence:
    """One of ``DIVERGENCES``.

    Attributes:
        name: see the module's table.
        weight: ``b`` of ``jensen_shannon`` (default 0.5), ``a`` of the skewed ones (default 0.1); None elsewhere.

    Raises:
        UserError: unknown name; a weight where none belongs, or one outside of (0, 1). At its ends, generalized
            Jensen-Shannon is zero and the skewed ones are KL or zero: those have names of their own.
    """

    name: str = "forward_kl"
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _FORMS:
            raise UserError(
                f"divergence: expected one of {', '.join(DIVERGENCES)}, found '{self.name}'."
                f"{nearest(self.name, DIVERGENCES)}"
            )
        default = _FORMS[self.name][2]
        if default is None and self.weight is not None:
            raise UserError(f"divergence: {self.name} takes no weight, found {self.weight}: leave it out")
        if self.weight is None:
            object.__setattr__(self, "weight", default)
        elif not 0 < self.weight < 1:
            raise UserError(
                f"divergence: expected a weight of {self.name} between 0 and 1, both excluded, found {self.weight}: "
                f"what it tends to there is forward_kl, reverse_kl or nothing; name that"
            )

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """``[...]`` in nats (``total_variation``: from 0 to 1) for finite log-probabilities ``[..., outcomes]``."""
        return _FORMS[self.name][0](log_p, log_q, self.weight or 0.0)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Derivative of :meth:`value` by each ``log_q``, ``[..., outcomes]``."""
        return _FORMS[self.name][1](log_p, log_q, self.weight or 0.0)

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Both, of forward KL at the cost of one exponential."""
        if self.name != "forward_kl":
            return self.value(log_p, log_q), self.slope(log_p, log_q)
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(dim=-1), p.neg_()


FORWARD_KL = Divergence()
