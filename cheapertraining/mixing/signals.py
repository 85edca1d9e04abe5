"""What a strategy is told, and what a strategy is.

All arrays are float64 and ordered like ``Signals.sources``. The same numbers reach every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.gram import SourceGradients

__all__ = [
    "GRAM",
    "INFLUENCE",
    "LOSSES",
    "PROBE_LOSSES",
    "PROBE_PRODUCTS",
    "REFERENCE",
    "Array",
    "ProbeReading",
    "Signals",
    "SourceInfo",
    "Strategy",
]

Array = NDArray[np.float64]

LOSSES = "losses"
"""In ``Strategy.needs``: the training loss of each source (costs nothing)."""
INFLUENCE = "influence"
"""In ``Strategy.needs``: ``Signals.influence``, which an estimator measures."""
GRAM = "gram"
"""In ``Strategy.needs``: ``Signals.gradients``, norms and products of the sources' gradients."""
PROBE_LOSSES = "probe_losses"
"""In ``Strategy.needs``: ``Signals.probe_losses``, by forward passes over the probes."""
PROBE_PRODUCTS = "probe_products"
"""In ``Strategy.needs``, beside ``GRAM``: ``Signals.gradients`` with ``target_products``."""
REFERENCE = "reference"
"""In ``Strategy.needs``: ``Signals.excess_losses``, by a forward pass of a reference model over every training batch
(about a third of a training step where both models are of one size)."""


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before training.

    Attributes:
        name: of the source.
        available_tokens: tokens in one pass over it.
        max_epochs: how often it may be passed over at most; None for no limit.
    """

    name: str
    available_tokens: int
    max_epochs: float | None = None

    @property
    def allowed_tokens(self) -> float:
        """Tokens that may be drawn from the source in the whole run; infinite without a limit."""
        return np.inf if self.max_epochs is None else self.max_epochs * self.available_tokens


@dataclass(frozen=True)
class ProbeReading:
    """Losses on the probes at a decision, on the same samples each time, so that differences are training's.

    Attributes:
        probes: names, ``[P]``.
        weights: ``[P]``, weight of each probe's loss in the objective, sum 1.
        losses: ``[P]``, token-mean loss, nats.
    """

    probes: tuple[str, ...]
    weights: Array
    losses: Array


@dataclass(frozen=True)
class Signals:
    """One decision's input.

    Attributes:
        sources: names, ``[K]``.
        batch: batches trained so far.
        tokens: tokens (padding included) trained on so far.
        effective_batch, effective_tokens: the same at the moment from which a decision made now will count.
        horizon_tokens: tokens that the whole run will train on.
        sampling_weights: ``[K]``, the newest weights by which samples are drawn; they sum to 1.
        objective_weights: ``[K]``, factors on the loss of each source's samples; ones, unless a method
            weights the objective apart from the sampling.
        losses: ``[K]``, mean training loss since the last decision, nats per token; NaN where a source did
            not come.
        loss_tokens: ``[K]``, tokens behind ``losses``.
        tokens_seen: ``[K]``, tokens (padding included) drawn from each source so far.
        epochs: ``[K]``, passes over each source so far.
        influence: the newest measurement; None unless the strategy needs it.
        gradients, probe_losses: likewise.
        excess_losses: ``[K]``, mean over the tokens since the last decision of how far the training loss is above the
            reference model's, a token below it counting as 0; NaN where a source did not come.
        predicted_changes: by direction of ``influence``: what the last decision expected of the change since then;
            None where nothing was expected.
        learning_rate: of the optimizer, where the caller gave it.
        batch_size: samples in a batch.
    """

    sources: tuple[str, ...]
    batch: int
    tokens: int
    effective_batch: int
    effective_tokens: int
    horizon_tokens: int
    sampling_weights: Array
    objective_weights: Array
    losses: Array
    loss_tokens: Array
    tokens_seen: Array
    epochs: Array
    influence: SourceInfluence | None = None
    gradients: SourceGradients | None = None
    probe_losses: ProbeReading | None = None
    excess_losses: Array | None = None
    predicted_changes: Array | None = None
    learning_rate: float | None = None
    batch_size: int = 1


@runtime_checkable
class Strategy(Protocol):
    """Turns signals into a wish for the sampling weights. Constraints are not its business.

    A strategy is deterministic: the same calls give the same wishes, on every rank and after a resume.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    """Signals to pay for, of ``LOSSES``, ``INFLUENCE``, ``GRAM``, ``PROBE_LOSSES`` and ``REFERENCE``. A strategy that
    needs none is asked before training too."""

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        """Begin a run.

        Args:
            sources: in the order of all arrays.
            prior: ``[K]``, the weights to stay near where nothing is known; they sum to 1.
            horizon_tokens: tokens that the whole run will train on.

        Raises:
            UserError: the strategy's settings do not fit the sources.
        """

    def propose(self, signals: Signals) -> Array | None:
        """Return the weights wished for, ``[K]``, non-negative on any scale; None to leave them as they
        are."""

    def state_dict(self) -> dict[str, Any]:
        """Return JSON-able state, with a ``version``; arrays as mappings from source names."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict` of a strategy of the same class, right after :meth:`reset`.

        With the same sources it continues exactly. Where sources were added or retired since, those that stay keep
        what is known of them, and new ones begin without a preference.
        """
