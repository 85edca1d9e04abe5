"""When to measure, what to ask, when to act: the mixture's control loop, without a trainer.

    controller = MixtureController(mixture, strategy, constraints, interval=20, warmup=20, horizon_tokens=...)
    controller.start()
    for batch, … in enumerate(loop, start=1):          # batches trained so far
        controller.record(loss_sums, tokens)           # by source, summed over all ranks
        if controller.due(batch):
            measurement = None
            if controller.needs_influence:
                measurement = estimator.measure(…, update_index=controller.measurements)
            controller.step(batch, measurement)

Everything here is arithmetic on numbers that are the same on all ranks, so all ranks decide the same; a
caller that wants certainty sends rank 0's ``propose`` to the others before ``commit``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.plan import Exhausted, carried_over
from cheapertraining.errors import UserError
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.gram import SourceGradients
from cheapertraining.mixing.constraints import Constraints, repetition_caps
from cheapertraining.mixing.signals import (
    INFLUENCE,
    REFERENCE,
    Array,
    ProbeReading,
    Signals,
    SourceInfo,
    Strategy,
)

__all__ = ["Decision", "Mixture", "MixtureController", "Totals"]

log = logging.getLogger(__name__)

Weights = dict[str, float]

_STATE_VERSION = 1
# Decisions kept in a checkpoint; the mixture's own ledger has the weights of all.
_KEPT = 64
# Plans keep weights as multiples of 2**-32; a smaller change is none.
_SAME = 2.0**-31


class Counts(Protocol):
    """What each source has given so far, arrays ``[K]``."""

    @property
    def tokens(self) -> NDArray[np.int64]: ...

    @property
    def epochs(self) -> NDArray[np.float64]: ...


class Mixture(Protocol):
    """What the controller needs of a mixture; ``cheapertraining.data.MixedDataset`` is one."""

    consumed: int
    max_epochs: dict[str, float | None]

    @property
    def source_names(self) -> tuple[str, ...]: ...

    @property
    def available_tokens(self) -> dict[str, int]: ...

    @property
    def global_batch_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def lag(self) -> int: ...

    def get_current_weights(self) -> dict[str, float]: ...

    def weights_at(self, batch: int) -> dict[str, float]: ...

    def set_weights(self, weights: Mapping[str, float], from_batch: int | None = None) -> int: ...

    def counts(self) -> Counts: ...


@dataclass
class Decision:
    """One entry of the record.

    Attributes:
        batch: batches trained when it was made.
        from_batch: first batch drawn with the new weights; None where they stayed as they were.
        weights: newest weights after it.
        wish: what the strategy asked for; None where it asked for nothing.
        scores, errors: by direction and source, as measured.
        probe_losses: by probe.
        predicted: by direction: first-order change of its loss until the next decision, in nats; per unit of
            learning rate where the learning rate was not given. Momentum, clipping and curvature are left
            out: its sign and its course over the run are worth reading, its size for metric ``adam`` only
                roughly.
        realized: by direction: the change that the next measurement found; None until then.
    """

    batch: int
    from_batch: int | None
    weights: Weights
    wish: Weights | None = None
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    probe_losses: dict[str, float | None] = field(default_factory=dict)
    predicted: dict[str, float | None] = field(default_factory=dict)
    realized: dict[str, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite are None."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Totals:
    """Sums since the start of the run, by source: losses in nats, and the tokens behind them."""

    losses: Array
    tokens: Array

    def mean_since(self, earlier: Totals) -> Array:
        """Mean loss between two totals, nats per token; NaN where a source did not come."""
        tokens = self.tokens - earlier.tokens
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(tokens > 0, (self.losses - earlier.losses) / tokens, np.nan)

    def share_since(self, earlier: Totals) -> Array:
        """Share of each source in the tokens between two totals, which is its weight in their mean loss; 0 without."""
        tokens = self.tokens - earlier.tokens
        return np.asarray(tokens / max(float(tokens.sum()), 1.0))

    def by_name(self, names: Sequence[str]) -> dict[str, list[float | None]]:
        """JSON-able: ``[losses, tokens]`` of each source. A loss that is not finite becomes None."""
        return {
            name: [_finite(loss), _finite(tokens)]
            for name, loss, tokens in zip(names, self.losses, self.tokens, strict=True)
        }

    @classmethod
    def of(cls, sums: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> Totals:
        """The inverse of :meth:`by_name`; None becomes NaN, and so do all means behind it. A new source has 0."""
        losses, tokens = ([_number(sums[name][row]) if name in sums else 0.0 for name in names] for row in range(2))
        return cls(np.array(losses), np.array(tokens))


class MixtureController:
    """Decides on a mixture's weights while it is trained on.

    Args:
        mixture: weights are read from and written to it. Where its ``allow_source_changes`` is true, a state of other
            sources is taken over as far as they are the same.
        strategy: makes the wishes. It is reset with the mixture's present weights as prior.
        constraints: applied to every wish.
        interval: batches between decisions.
        warmup: batches before the first decision that looks at signals. Strategies that need none decide from
            the start.
        horizon_tokens: tokens (padding included) that the whole run trains on.
        updates: semi-dynamic: decide after these batches alone, whatever ``interval`` and ``warmup`` say; or, a number,
            so often in all, spread evenly from the end of the warm-up over the horizon. None: every ``interval``.

    Raises:
        UserError: bad numbers, or constraints that the sources or their first weights cannot satisfy.
    """

    def __init__(
        self,
        mixture: Mixture,
        strategy: Strategy,
        constraints: Constraints,
        interval: int,
        warmup: int,
        horizon_tokens: int,
        updates: int | Sequence[int] | None = None,
    ) -> None:
        if interval < 1:
            raise UserError(f"algorithms.online_mixing.interval: expected at least 1 batch, found {interval}.")
        if warmup < 0:
            raise UserError(f"algorithms.online_mixing.warmup: expected at least 0 batches, found {warmup}.")
        self.mixture = mixture
        self.strategy = strategy
        self.interval = interval
        self.warmup = warmup
        self.horizon_tokens = horizon_tokens
        self.updates = None if updates is None else self._update_batches(updates)
        """Batches after which to decide, rising; None where ``interval`` says it."""
        self.source_names = tuple(mixture.source_names)
        self.measurements = 0
        """Measurements taken so far; the ``update_index`` of the next one."""
        self.history: list[Decision] = []
        self.sources_changed = False
        """Whether the state that was loaded last is of other sources."""
        count = len(self.source_names)
        self.totals = Totals(np.zeros(count), np.zeros(count))
        self._at_decision = self.totals
        # Excess losses over a reference model, where the strategy needs them.
        self._excess = self._excess_at_decision = self.totals
        self._configured = dict(mixture.get_current_weights())
        self._prior = self._configured
        self.constraints = constraints
        self._constraints = self._with_prior()
        if strategy.needs:
            self._constraints.check(self._prior)
        else:
            self._constraints.project(self._prior)
        self._reset_strategy()

    @property
    def needs_influence(self) -> bool:
        """Whether a decision wants a measurement."""
        return self._needs(INFLUENCE)

    @property
    def probe_importance(self) -> dict[str, float]:
        """The probes' weights in the objective as of the last wish, of strategies that move them; else nothing."""
        return dict(getattr(self.strategy, "probe_importance", {}))

    def record(self, loss_sums: Array, tokens: Array, excess_sums: Array | None = None) -> None:
        """Add training losses since the last call, summed over all ranks.

        Args:
            loss_sums: ``[K]``, nats.
            tokens: ``[K]``, loss-counting tokens.
            excess_sums: ``[K]``, of ``max(loss - reference model's loss, 0)`` by token, nats; where the strategy needs
                ``REFERENCE``.
        """
        self.totals = Totals(self.totals.losses + loss_sums, self.totals.tokens + tokens)
        if excess_sums is not None:
            self._excess = Totals(self._excess.losses + excess_sums, self._excess.tokens + tokens)

    def due(self, batch: int) -> bool:
        """Whether to decide after ``batch`` batches have been trained."""
        if self.updates is not None:
            return batch in self.updates
        first = self.warmup if self.strategy.needs else 0
        return batch > 0 and batch >= first and (batch - first) % self.interval == 0

    def next_due(self, batch: int) -> int:
        """The batch of the first decision after ``batch``; behind the last of :attr:`updates`, the end of the run."""
        if self.updates is None:
            first = self.warmup if self.strategy.needs else 0
            return max(first, batch + self.interval - (batch - first) % self.interval, 1)
        later = [due for due in self.updates if due > batch]
        return later[0] if later else max(batch + 1, self.horizon_tokens // self._tokens_per_batch)

    def start(self) -> Decision | None:
        """Before the first batch: put the weights of a strategy that needs no signals in force at once."""
        if self.strategy.needs:
            return None
        wish = self._ask(self._signals(0, None, effective=0))
        if wish is None:
            return None
        weights = self._constraints.project(wish)
        return self._commit(0, 0, weights, wish, None, None)

    def after_source_changes(self, batch: int) -> list[Decision]:
        """What the mixture is drawn with from ``batch`` on, where a state of other sources was loaded; else nothing.

        No decision of a strategy, but a ledger without it could not be replayed.
        """
        if not self.sources_changed:
            return []
        found: list[Decision] = []
        with contextlib.suppress(Exhausted):
            for start in range(batch, batch + self.mixture.lag + 1):
                weights = dict(self.mixture.weights_at(start))
                if not found or weights != found[-1].weights:
                    found.append(Decision(batch, start, weights))
        return found

    def step(
        self,
        batch: int,
        measurement: SourceInfluence | None = None,
        learning_rate: float | None = None,
        *,
        gradients: SourceGradients | None = None,
        probe_losses: ProbeReading | None = None,
    ) -> Decision:
        """Decide and act: :meth:`propose`, then :meth:`commit`."""
        weights = self.propose(batch, measurement, learning_rate, gradients=gradients, probe_losses=probe_losses)
        return self.commit(batch, weights, measurement, learning_rate, probe_losses=probe_losses)

    def propose(
        self,
        batch: int,
        measurement: SourceInfluence | None = None,
        learning_rate: float | None = None,
        *,
        gradients: SourceGradients | None = None,
        probe_losses: ProbeReading | None = None,
    ) -> Weights | None:
        """Ask the strategy and project its wish; None to leave the weights as they are. The mixture is not
        touched.

        Advances the strategy: call it once for each decision, on every rank.

        Args:
            batch: batches trained so far.
            measurement: needed where :attr:`needs_influence`.
            learning_rate: the optimizer's, for strategies whose steps are in its unit.
            gradients, probe_losses: likewise where the strategy's ``needs`` name them.
        """
        signals = self._signals(batch, measurement, effective=batch + self.mixture.lag)
        self._wish = self._ask(
            dataclasses.replace(signals, gradients=gradients, probe_losses=probe_losses, learning_rate=learning_rate)
        )
        self._at_decision, self._excess_at_decision = self.totals, self._excess
        self.measurements += any(each is not None for each in (measurement, gradients, probe_losses))
        if self._wish is None:
            return None
        caps = self._caps(batch)
        if caps and not any(caps.get(name, 1.0) > 0 for name in self.source_names):
            return None  # All spent: what happens now is the mixture's exhaustion policy's business.
        return self._constraints.project(self._wish, self.mixture.get_current_weights(), caps)

    def commit(
        self,
        batch: int,
        weights: Weights | None,
        measurement: SourceInfluence | None = None,
        learning_rate: float | None = None,
        *,
        probe_losses: ProbeReading | None = None,
    ) -> Decision:
        """Put weights in force ``lag`` batches from now, and write the decision down.

        Args:
            batch: batches trained so far.
            weights: from :meth:`propose`.
            measurement: what it was made from.
            learning_rate: for the prediction of what the probes' losses will do.
            probe_losses: to write down.
        """
        decision = self._commit(batch, batch + self.mixture.lag, weights, self._wish, measurement, learning_rate)
        if probe_losses is not None:
            losses = zip(probe_losses.probes, probe_losses.losses, strict=True)
            decision.probe_losses |= {name: _finite(loss) for name, loss in losses}
        return decision

    def _commit(
        self,
        batch: int,
        from_batch: int,
        weights: Weights | None,
        wish: Weights | None,
        measurement: SourceInfluence | None,
        learning_rate: float | None,
    ) -> Decision:
        current = self.mixture.get_current_weights()
        changed = weights is not None and any(abs(weights[name] - current[name]) > _SAME for name in self.source_names)
        effective = None
        if changed and weights is not None:
            effective = self.mixture.set_weights(weights, from_batch)
        decision = Decision(batch, effective, dict(self.mixture.get_current_weights()), wish)
        if measurement is not None:
            self._describe(decision, measurement, learning_rate)
            if self.history:
                found = zip(measurement.directions, measurement.direction_changes, strict=True)
                self.history[-1].realized = {name: _finite(change) for name, change in found}
        self.history.append(decision)
        return decision

    def _describe(self, decision: Decision, measured: SourceInfluence, learning_rate: float | None) -> None:
        mixtures = self._drawn(decision.batch, self.next_due(decision.batch))
        step = 1.0 if learning_rate is None else learning_rate
        for row, direction in enumerate(measured.directions):
            decision.scores[direction] = self._by_name(measured.scores[row])
            decision.errors[direction] = self._by_name(measured.errors[row])
            decision.predicted[direction] = _finite(-step * float(mixtures @ measured.scores[row]))
        losses = zip(measured.probes, measured.probe_losses, strict=True)
        decision.probe_losses = {name: _finite(loss) for name, loss in losses}

    def _ask(self, signals: Signals) -> Weights | None:
        wish = self.strategy.propose(signals)
        return None if wish is None else dict(zip(self.source_names, wish.tolist(), strict=True))

    def _signals(self, batch: int, measurement: SourceInfluence | None, *, effective: int) -> Signals:
        counts = self.mixture.counts()
        weights = self.mixture.get_current_weights()
        return Signals(
            sources=self.source_names,
            batch=batch,
            tokens=batch * self._tokens_per_batch,
            effective_batch=effective,
            effective_tokens=effective * self._tokens_per_batch,
            horizon_tokens=self.horizon_tokens,
            sampling_weights=np.array([weights[name] for name in self.source_names]),
            objective_weights=np.ones(len(self.source_names)),
            losses=self.totals.mean_since(self._at_decision),
            loss_tokens=self.totals.tokens - self._at_decision.tokens,
            tokens_seen=counts.tokens.astype(np.float64),
            epochs=counts.epochs.astype(np.float64),
            influence=measurement,
            excess_losses=self._excess.mean_since(self._excess_at_decision) if self._needs(REFERENCE) else None,
            predicted_changes=self._predicted(measurement),
            batch_size=self.mixture.global_batch_size,
        )

    def _needs(self, signal: str) -> bool:
        return signal in self.strategy.needs

    def _predicted(self, measurement: SourceInfluence | None) -> Array | None:
        """What the last decision expected of this measurement's changes, ``[D]``; NaN where it expected nothing."""
        if measurement is None or not self.history:
            return None
        last = self.history[-1].predicted
        return np.array([_number(last.get(name)) for name in measurement.directions])

    def _update_batches(self, updates: int | Sequence[int]) -> tuple[int, ...]:
        key = "algorithms.online_mixing.updates"
        if isinstance(updates, int):
            last = self.horizon_tokens // self._tokens_per_batch
            first = max(1, self.warmup)
            if not 1 <= updates <= last - first:
                raise UserError(
                    f"{key}: expected from 1 to the {max(0, last - first)} batches between warm-up and end, found "
                    f"{updates}."
                )
            return tuple(first + place * (last - first) // updates for place in range(updates))
        batches = tuple(updates)
        if not batches or batches[0] < 1 or list(batches) != sorted(set(batches)):
            raise UserError(f"{key}: expected a number, or batches from 1 on that rise, found {list(batches)}.")
        return batches

    @property
    def _tokens_per_batch(self) -> int:
        return self.mixture.global_batch_size * self.mixture.seq_len

    def _drawn(self, start: int, end: int) -> Array:
        """Sum of the weights of the batches from ``start`` to before ``end`` (or the end of the data), ``[K]``."""
        weights: list[Weights] = []
        with contextlib.suppress(Exhausted):
            weights.extend(self.mixture.weights_at(batch) for batch in range(start, end))
        return np.array([math.fsum(each[name] for each in weights) for name in self.source_names])

    def _caps(self, batch: int) -> Weights:
        """Repetition caps as of the batch that a decision made now counts from."""
        infos = [info for info in self._sources() if math.isfinite(info.allowed_tokens)]
        if not infos:
            return {}
        effective = batch + self.mixture.lag
        seen = self.mixture.counts().tokens + self._drawn(batch, effective) * self._tokens_per_batch
        used = dict(zip(self.source_names, seen.tolist(), strict=True))
        allowed = {info.name: info.allowed_tokens for info in infos}
        return repetition_caps(used, allowed, self.horizon_tokens - effective * self._tokens_per_batch)

    def _sources(self) -> list[SourceInfo]:
        default = self.constraints.max_epochs
        limits = {name: default if own is None else own for name, own in self.mixture.max_epochs.items()}
        return [SourceInfo(name, self.mixture.available_tokens[name], limits[name]) for name in self.source_names]

    def _with_prior(self) -> Constraints:
        """The constraints, with the run's first weights as prior where none is given."""
        given = self.constraints.prior
        return dataclasses.replace(self.constraints, prior=self._prior if given is None else given)

    def _reset_strategy(self) -> None:
        prior = np.array([self._prior[name] for name in self.source_names])
        self.strategy.reset(self._sources(), prior / prior.sum(), self.horizon_tokens)

    def _by_name(self, values: Array) -> dict[str, float | None]:
        return {name: _finite(value) for name, value in zip(self.source_names, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: totals, strategy, the latest decisions; everything by source name."""
        return {
            "version": _STATE_VERSION,
            "sources": list(self.source_names),
            "prior": dict(self._prior),
            "measurements": self.measurements,
            "totals": self.totals.by_name(self.source_names),
            "at_decision": self._at_decision.by_name(self.source_names),
            "excess": self._excess.by_name(self.source_names),
            "excess_at_decision": self._excess_at_decision.by_name(self.source_names),
            "history": [decision.to_dict() for decision in self.history[-_KEPT:]],
            "strategy": {"name": self.strategy.name, "state": self.strategy.state_dict()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off. The mixture restores its own state.

        A checkpoint of another strategy is fine: the present one then starts afresh, with a word in the log. So is one
        of other sources where the mixture allows it: new ones begin with their share of the mixture's first weights,
        and every strategy says what it takes over.

        Raises:
            UserError: the state is of other sources, and the mixture does not allow it.
        """
        self.sources_changed = set(state["sources"]) != set(self.source_names)
        if self.sources_changed and not getattr(self.mixture, "allow_source_changes", False):
            raise UserError(
                f"checkpoint: its mixture has the sources {_listed(state['sources'])}; this run has "
                f"{_listed(self.source_names)}. Resume with the same sources, set train_loader.allow_source_changes to "
                "true to go on with these, or start a new run."
            )
        saved_prior = {name: float(weight) for name, weight in state["prior"].items()}
        self._prior = carried_over(saved_prior, self._configured)
        self._constraints = self._with_prior()
        self.measurements = int(state["measurements"])
        self.totals = Totals.of(state["totals"], self.source_names)
        self._at_decision = Totals.of(state["at_decision"], self.source_names)
        if "excess" in state:  # Checkpoints from before reference models have none.
            self._excess = Totals.of(state["excess"], self.source_names)
            self._excess_at_decision = Totals.of(state["excess_at_decision"], self.source_names)
        self.history = [Decision(**decision) for decision in state["history"]]
        self._reset_strategy()
        saved = state["strategy"]
        if saved["name"] == self.strategy.name:
            self.strategy.load_state_dict(saved["state"])
        else:
            log.warning(
                "mixing strategy was '%s' and is now '%s': it starts afresh",
                saved["name"],
                self.strategy.name,
            )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))
