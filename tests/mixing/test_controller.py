"""The control loop: when it decides, what reaches the mixture, what is written down, and exact resumption."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.mixing import (
    LOSSES,
    Constraints,
    InfluenceStrategy,
    MixtureController,
    ProportionalStrategy,
    ScheduleStrategy,
    Signals,
    SourceInfo,
    StaticStrategy,
    Strategy,
    UniMaxStrategy,
)
from tests.mixing.plan_mixture import PlanMixture, measured

SIZES = {"a": 100, "b": 400, "c": 1600}
ROWS_TOKENS = 10 * 4


class Recorder:
    """Wishes for what it is told and keeps what it was told."""

    name = "recorder"
    needs = frozenset({LOSSES})

    def __init__(self, wish: list[float] | None = None) -> None:
        self.wish = wish
        self.seen: list[Signals] = []

    def reset(self, sources: list[SourceInfo], prior: NDArray[np.float64], horizon_tokens: int) -> None:
        self.sources, self.prior, self.horizon = sources, prior, horizon_tokens

    def propose(self, signals: Signals) -> NDArray[np.float64] | None:
        self.seen.append(signals)
        return None if self.wish is None else np.array(self.wish)

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def controller_of(
    strategy: Strategy, mixture: PlanMixture | None = None, constraints: Constraints | None = None, **options: int
) -> MixtureController:
    settings = {"interval": 5, "warmup": 10, "horizon_tokens": 100 * ROWS_TOKENS} | options
    return MixtureController(mixture or PlanMixture(SIZES), strategy, constraints or Constraints(), **settings)


def train(controller: MixtureController, until: int, scores: NDArray[np.float64] | None = None) -> None:
    """A plain loop: batches from the plan, losses that depend on the batch, decisions when due."""
    mixture = controller.mixture
    assert isinstance(mixture, PlanMixture)
    while mixture.consumed < until:
        source = mixture.next_batch()
        tokens = np.bincount(source, minlength=3) * 4.0
        controller.record(tokens * (3.0 - 0.01 * mixture.consumed), tokens)
        if controller.due(mixture.consumed):
            measurement = None
            if controller.needs_influence:
                base = np.array([1.0, 0.3, 0.0]) if scores is None else scores
                generator = np.random.default_rng(controller.measurements)
                values = base + 0.1 * generator.standard_normal(3)
                changes = np.array([-0.1 if controller.measurements else math.nan])
                measurement = measured(mixture.source_names, values, np.full(3, 0.1), changes=changes)
            controller.step(mixture.consumed, measurement, learning_rate=1e-2)


def test_decisions_come_at_their_interval_after_the_warm_up() -> None:
    controller = controller_of(Recorder())
    train(controller, 27)
    assert [decision.batch for decision in controller.history] == [10, 15, 20, 25]
    assert not controller.due(0)


def test_signals_carry_losses_since_the_last_decision_and_the_moment_of_effect() -> None:
    strategy = Recorder()
    controller = controller_of(strategy)
    train(controller, 15)
    first, second = strategy.seen
    assert (first.batch, first.effective_batch, first.tokens) == (10, 18, 10 * ROWS_TOKENS)
    assert first.effective_tokens == 18 * ROWS_TOKENS
    assert second.loss_tokens.sum() == 5 * ROWS_TOKENS
    np.testing.assert_allclose(second.losses, np.mean([3 - 0.01 * batch for batch in range(11, 16)]), atol=3e-2)
    assert second.tokens_seen.sum() == 15 * ROWS_TOKENS
    np.testing.assert_allclose(second.epochs, second.tokens_seen / 4 / np.array(list(SIZES.values())))
    assert second.objective_weights.tolist() == [1, 1, 1]
    assert strategy.horizon == 100 * ROWS_TOKENS
    assert strategy.prior.tolist() == pytest.approx([1 / 3] * 3)
    assert [source.available_tokens for source in strategy.sources] == [400, 1600, 6400]


def test_new_weights_count_lag_batches_later_and_not_before() -> None:
    controller = controller_of(Recorder([8.0, 1.0, 1.0]))
    train(controller, 10)
    mixture = controller.mixture
    assert controller.history[-1].from_batch == 18
    assert mixture.weights_at(17)["a"] == pytest.approx(1 / 3)
    assert mixture.weights_at(18)["a"] == pytest.approx(0.8)


def test_constraints_bind_every_wish() -> None:
    controller = controller_of(Recorder([1.0, 0.0, 0.0]), constraints=Constraints(floor=0.05, ceiling=0.7))
    train(controller, 10)
    assert controller.history[-1].weights == pytest.approx({"a": 0.7, "b": 0.15, "c": 0.15}, abs=1e-6)
    assert controller.history[-1].wish == {"a": 1.0, "b": 0.0, "c": 0.0}


def test_strategies_without_needs_hold_from_the_first_batch() -> None:
    controller = controller_of(ProportionalStrategy(), constraints=Constraints(floor=0, kl_step=0.01))
    decision = controller.start()
    assert decision is not None
    assert decision.from_batch == 0
    assert controller.mixture.weights_at(0) == pytest.approx({"a": 1 / 21, "b": 4 / 21, "c": 16 / 21}, abs=1e-8)
    train(controller, 20)
    assert [decision.from_batch for decision in controller.history] == [0, None, None, None, None]


def test_static_and_adaptive_strategies_start_with_the_configured_weights() -> None:
    for strategy in (StaticStrategy(), InfluenceStrategy()):
        controller = controller_of(strategy, PlanMixture(SIZES, {"a": 0.005, "b": 0.5, "c": 0.495}))
        assert controller.start() is None
        assert controller.mixture.weights_at(0)["a"] == pytest.approx(0.005, abs=1e-8)
    train(controller_of(StaticStrategy(), mixture := PlanMixture(SIZES, {"a": 0.005, "b": 0.5, "c": 0.495})), 30)
    assert len(mixture.plan.ledger) == 1


def test_a_schedule_read_every_batch_is_followed_batch_by_batch() -> None:
    points = [{"batch": 10, "weights": {"a": 1, "b": 1}}, {"batch": 20, "weights": {"a": 1, "c": 1}}]
    controller = controller_of(ScheduleStrategy(points), constraints=Constraints(floor=0), interval=1)
    controller.start()
    train(controller, 30)
    for batch in range(9, 30):
        share = min(max((batch - 10) / 10, 0), 1)
        expected = {"a": 0.5, "b": 0.5 * (1 - share), "c": 0.5 * share}
        assert controller.mixture.weights_at(batch) == pytest.approx(expected, abs=1e-9)


def test_predicted_and_realized_changes_meet_in_the_record() -> None:
    controller = controller_of(InfluenceStrategy())
    train(controller, 20)
    first, second = controller.history[:2]
    drawn = [controller.mixture.weights_at(batch) for batch in range(10, 15)]
    scores = first.scores["p0"]
    expected = -1e-2 * sum(weights[name] * (scores[name] or 0) for weights in drawn for name in weights)
    assert first.predicted["p0"] == pytest.approx(expected)
    assert first.realized == {"p0": -0.1}
    assert second.realized == {"p0": -0.1}
    assert controller.history[-1].realized is None
    assert controller.measurements == len(controller.history)


def test_a_capped_source_lasts_to_the_end_and_is_never_overdrawn() -> None:
    mixture = PlanMixture({"a": 60, "b": 900, "c": 900}, max_epochs={"a": 2.0})
    controller = controller_of(Recorder([0.9, 0.05, 0.05]), mixture, interval=1, warmup=0)
    train(controller, 100)
    counts = mixture.counts()
    assert counts.epochs[0] <= 2.0
    assert counts.epochs[0] > 1.95
    assert mixture.weights_at(80)["a"] > 0.0
    late = [mixture.plan.plan(batch).source for batch in range(90, 100)]
    assert sum((source == 0).sum() for source in late) > 0


def test_the_default_cap_is_that_of_the_constraints() -> None:
    mixture = PlanMixture({"a": 60, "b": 9000, "c": 9000})
    controller = controller_of(Recorder([0.9, 0.05, 0.05]), mixture, Constraints(max_epochs=1.0), interval=1, warmup=0)
    train(controller, 100)
    assert 0.95 < mixture.counts().epochs[0] < 1.05


def test_all_sources_spent_leaves_the_end_to_the_mixture() -> None:
    mixture = PlanMixture({"a": 30, "b": 30, "c": 60}, max_epochs={"a": 1, "b": 1, "c": 1}, on_exhaustion="renormalize")
    controller = controller_of(Recorder([0.8, 0.1, 0.1]), mixture, interval=1, warmup=0)
    train(controller, 12)
    assert mixture.counts().epochs.tolist() == [1, 1, 1]


def test_a_resumed_run_decides_bit_for_bit_like_an_undisturbed_one() -> None:
    straight = controller_of(InfluenceStrategy(), PlanMixture(SIZES), Constraints(kl_step=0.2))
    train(straight, 60)

    stopped = controller_of(InfluenceStrategy(), PlanMixture(SIZES), Constraints(kl_step=0.2))
    train(stopped, 33)
    assert isinstance(stopped.mixture, PlanMixture)
    saved = json.loads(json.dumps(stopped.state_dict(), allow_nan=False))
    plan = json.loads(json.dumps(stopped.mixture.plan.state_dict(33)))
    resumed = controller_of(InfluenceStrategy(), mixture := PlanMixture(SIZES), Constraints(kl_step=0.2))
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == stopped.state_dict()
    mixture.plan.load_state_dict(plan)
    mixture.consumed = 33
    train(resumed, 60)

    assert resumed.history == straight.history
    assert resumed.state_dict() == straight.state_dict()
    assert straight.history[-1].weights["a"] > 0.6


def test_state_is_keyed_by_name_so_the_order_of_sources_may_change() -> None:
    one = controller_of(InfluenceStrategy())
    train(one, 20)
    turned = PlanMixture(dict(reversed(SIZES.items())))
    other = MixtureController(turned, InfluenceStrategy(), Constraints(), 5, 10, 4000)
    other.load_state_dict(one.state_dict())
    assert other.totals.tokens.tolist() == one.totals.tokens.tolist()[::-1]


def test_a_checkpoint_of_other_sources_is_refused() -> None:
    saved = controller_of(StaticStrategy()).state_dict()
    other = controller_of(StaticStrategy(), PlanMixture({"a": 10, "d": 10}))
    with pytest.raises(UserError, match=r"sources a, b, c; this run has a, d"):
        other.load_state_dict(saved)


def test_another_strategy_starts_afresh_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    saved = controller_of(StaticStrategy()).state_dict()
    other = controller_of(InfluenceStrategy())
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(saved)
    assert "was 'static' and is now 'influence'" in caplog.text


def test_losses_that_are_not_finite_survive_a_checkpoint() -> None:
    controller = controller_of(Recorder())
    controller.record(np.array([np.nan, 1.0, 1.0]), np.ones(3))
    other = controller_of(Recorder())
    other.load_state_dict(json.loads(json.dumps(controller.state_dict(), allow_nan=False)))
    assert np.isnan(other.totals.losses[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"interval": 0}, "interval: expected at least 1"), ({"warmup": -1}, "warmup: expected at least 0")],
)
def test_bad_numbers_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        controller_of(StaticStrategy(), **options)


def test_constraints_that_cannot_hold_are_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"floors of 3 sources sum to 1\.5"):
        controller_of(StaticStrategy(), constraints=Constraints(floor=0.5))
    with pytest.raises(UserError, match="kl_step"):
        controller_of(
            InfluenceStrategy(), PlanMixture(SIZES, {"a": 0.0, "b": 1, "c": 1}), Constraints(floor=0.01, kl_step=0.5)
        )


def test_a_strategy_needs_what_it_says() -> None:
    assert controller_of(InfluenceStrategy()).needs_influence
    assert not controller_of(UniMaxStrategy()).needs_influence
