"""Each strategy against its formula; all of them against the protocol."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.mixing import (
    InfluenceStrategy,
    ProportionalStrategy,
    ScheduleStrategy,
    Signals,
    SourceInfo,
    StaticStrategy,
    Strategy,
    UniMaxStrategy,
)
from cheapertraining.mixing.strategies.unimax import unimax_budgets
from tests.mixing.plan_mixture import measured

Array = NDArray[np.float64]
NAMES = ("a", "b", "c")
SOURCES = [SourceInfo("a", 100), SourceInfo("b", 400), SourceInfo("c", 1600)]
UNIFORM = np.full(3, 1 / 3)


def signals(
    *, tokens: int = 0, batch: int = 0, weights: Array = UNIFORM, influence: SourceInfluence | None = None
) -> Signals:
    return Signals(
        sources=NAMES,
        batch=batch,
        tokens=tokens,
        effective_batch=batch,
        effective_tokens=tokens,
        horizon_tokens=10_000,
        sampling_weights=weights,
        objective_weights=np.ones(3),
        losses=np.full(3, 2.0),
        loss_tokens=np.full(3, 10.0),
        tokens_seen=np.zeros(3),
        epochs=np.zeros(3),
        influence=influence,
    )


def ready(strategy: Strategy, horizon: int = 10_000) -> Strategy:
    strategy.reset(SOURCES, UNIFORM, horizon)
    return strategy


def proposed(strategy: Strategy, given_signals: Signals) -> Array:
    wish = strategy.propose(given_signals)
    assert wish is not None
    return wish


@pytest.mark.parametrize(
    "strategy",
    [
        StaticStrategy(),
        ProportionalStrategy(),
        UniMaxStrategy(),
        ScheduleStrategy([{"batch": 0, "weights": {"a": 1}}]),
        InfluenceStrategy(),
    ],
    ids=lambda strategy: strategy.name,
)
def test_every_strategy_keeps_the_protocol(strategy: Strategy) -> None:
    assert isinstance(strategy, Strategy)
    ready(strategy)
    measurement = measured(NAMES, np.array([1.0, 0.0, 0.0]), np.full(3, 1e-3))
    first = strategy.propose(signals(influence=measurement))
    state = json.loads(json.dumps(strategy.state_dict()))
    assert state["version"] >= 1
    second = strategy.propose(signals(influence=measurement))
    ready(strategy)
    strategy.load_state_dict(state)
    again = strategy.propose(signals(influence=measurement))
    assert (first is None) == (second is None) == (again is None)
    if second is not None and again is not None:
        assert again.tobytes() == second.tobytes()
        assert np.all(second >= 0)


def test_static_asks_for_nothing() -> None:
    assert ready(StaticStrategy()).propose(signals()) is None


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [1 / 21, 4 / 21, 16 / 21]), (2.0, [1 / 7, 2 / 7, 4 / 7]), (1e9, [1 / 3, 1 / 3, 1 / 3])],
)
def test_proportional_flattens_sizes_by_temperature(temperature: float, expected: list[float]) -> None:
    np.testing.assert_allclose(proposed(ready(ProportionalStrategy(temperature)), signals()), expected, rtol=1e-8)


def test_unimax_caps_small_sources_and_is_uniform_above() -> None:
    """Worked by hand: 3000 tokens over sizes 100, 400, 1600 with 2 epochs: 200, 800, and the rest 2000."""
    np.testing.assert_allclose(unimax_budgets(np.array([200.0, 800.0, 3200.0]), 3000), [200, 800, 2000])
    np.testing.assert_allclose(unimax_budgets(np.array([3200.0, 200.0, 5000.0]), 3000), [1400, 200, 1400])
    assert unimax_budgets(np.array([1.0, 2.0]), 100).tolist() == [1.0, 2.0]
    wish = proposed(ready(UniMaxStrategy(2.0), horizon=3000), signals())
    np.testing.assert_allclose(wish, np.array([200, 800, 2000]) / 3000)


@settings(deadline=None)
@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=10), st.floats(1, 1e7))
def test_unimax_is_water_filling(limits: list[float], budget: float) -> None:
    """Defining property: none above its limit, and those below theirs are equal and not less than the others."""
    caps = np.array(limits)
    budgets = unimax_budgets(caps, budget)
    assert np.all(budgets <= caps * (1 + 1e-12))
    assert budgets.sum() == pytest.approx(min(budget, caps.sum()), rel=1e-9)
    below = budgets < caps * (1 - 1e-9)
    if below.any():
        np.testing.assert_allclose(budgets[below], budgets.max(), rtol=1e-9)


def test_unimax_heeds_a_source_s_own_limit() -> None:
    strategy = UniMaxStrategy(4.0)
    strategy.reset([SourceInfo("a", 100, max_epochs=1.0), SourceInfo("b", 1000)], np.full(2, 0.5), 1000)
    np.testing.assert_allclose(proposed(strategy, signals()), [0.1, 0.9])


POINTS = [
    {"tokens": 0, "weights": {"a": 1, "b": 1, "c": 1}},
    {"tokens": 700, "weights": {"a": 0.7, "b": 0.2, "c": 0.1}},
    {"tokens": 1000, "weights": {"c": 5}},
]


def test_schedule_is_exact_at_knots_and_linear_between() -> None:
    strategy = ready(ScheduleStrategy(POINTS))
    knot = np.array([0.7, 0.2, 0.1]) / math.fsum([0.7, 0.2, 0.1])
    assert proposed(strategy, signals(tokens=700)).tobytes() == knot.tobytes()
    assert proposed(strategy, signals(tokens=1000)).tolist() == [0, 0, 1]
    assert proposed(strategy, signals(tokens=99_999)).tolist() == [0, 0, 1]
    np.testing.assert_allclose(proposed(strategy, signals(tokens=350)), (np.full(3, 1 / 3) + knot) / 2, atol=1e-15)
    np.testing.assert_allclose(proposed(strategy, signals(tokens=775)), knot + 0.25 * (np.eye(3)[2] - knot), atol=1e-15)
    by_batch = ready(ScheduleStrategy([{"batch": 5, "tokens": None, "weights": {"b": 1}}]))
    assert proposed(by_batch, signals(batch=0)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "expected at least one point"),
        ([{"tokens": 0, "weights": {"a": 1}}, {"batch": 1, "weights": {"a": 1}}], "either `tokens`"),
        ([{"tokens": 5, "weights": {"a": 1}}] * 2, "expected rising tokens, found 5 after 5"),
        ([{"tokens": 5, "weights": {"d": 1}}], "no source is named 'd'"),
        ([{"tokens": 5, "weights": {"a": -1}}], "expected a weight of at least 0 for 'a'"),
        ([{"tokens": 5, "weights": {"a": 0}}], "expected a positive weight"),
    ],
)
def test_bad_schedules_are_refused(points: list[dict[str, object]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(ScheduleStrategy(points))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProportionalStrategy(0),
        lambda: UniMaxStrategy(-1),
        lambda: InfluenceStrategy(learning_rate=0),
        lambda: InfluenceStrategy(ema=1.0),
        lambda: InfluenceStrategy(threshold=-1),
    ],
)
def test_settings_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(UserError, match=r"algorithms\.online_mixing"):
        make()  # type: ignore[operator]


# ---- influence ---------------------------------------------------------------------------------------------
def test_clear_scores_step_as_exponentiated_gradient() -> None:
    """With errors of nearly 0 all is beyond doubt, and the step is ``w * exp(eta * c / rms(c))``."""
    weights = np.array([0.5, 0.3, 0.2])
    scores = np.array([3.0, 1.0, -1.0])
    strategy = InfluenceStrategy(learning_rate=0.5, ema=0.0)
    strategy.reset(SOURCES, UNIFORM, 1)
    wish = proposed(strategy, signals(weights=weights, influence=measured(NAMES, scores, np.full(3, 1e-9))))
    centred = scores - weights @ scores
    expected = weights * np.exp(0.5 * centred / np.sqrt((centred**2).mean()))
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-9)


def test_doubtful_scores_only_go_back_towards_the_prior() -> None:
    weights = np.array([0.6, 0.3, 0.1])
    strategy = ready(InfluenceStrategy())
    measurement = measured(NAMES, np.array([1.0, 0.9, 1.1]), np.full(3, 1.0))
    wish = proposed(strategy, signals(weights=weights, influence=measurement))
    expected = weights**0.8
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-12)


def test_the_scale_of_scores_does_not_matter() -> None:
    wishes = []
    for scale in (1e-6, 1.0, 1e6):
        strategy = ready(InfluenceStrategy())
        measurement = measured(NAMES, scale * np.array([3.0, 1.0, 0.0]), scale * np.full(3, 0.1))
        wishes.append(proposed(strategy, signals(influence=measurement)))
    np.testing.assert_allclose(wishes[0], wishes[1], rtol=1e-9)
    np.testing.assert_allclose(wishes[2], wishes[1], rtol=1e-9)


def test_probes_are_combined_by_their_weights() -> None:
    """Two probes that want opposite sources cancel out; what helps both wins."""
    strategy = ready(InfluenceStrategy())
    scores = np.array([[2.0, 0.0, 1.5], [0.0, 2.0, 1.5]])
    wish = proposed(strategy, signals(influence=measured(NAMES, scores, np.full((2, 3), 1e-3))))
    assert wish[2] > wish[0]
    assert wish[0] == pytest.approx(wish[1])


def test_measurements_that_are_not_finite_change_nothing() -> None:
    strategy = ready(InfluenceStrategy())
    before = strategy.state_dict()
    assert strategy.propose(signals(influence=measured(NAMES, np.array([np.nan, 1, 2]), np.ones(3)))) is None
    assert strategy.propose(signals()) is None
    assert strategy.state_dict() == before


def test_equal_scores_change_nothing() -> None:
    strategy = ready(InfluenceStrategy())
    assert strategy.propose(signals(influence=measured(NAMES, np.ones(3), np.zeros(3)))) is None


def test_a_source_without_prior_weight_is_never_wished_for() -> None:
    strategy = InfluenceStrategy()
    strategy.reset(SOURCES, np.array([0.5, 0.5, 0.0]), 1)
    measurement = measured(NAMES, np.array([0.0, 1.0, 9.0]), np.full(3, 1e-3))
    wish = proposed(strategy, signals(weights=np.array([0.5, 0.5, 0.0]), influence=measurement))
    assert wish[2] == 0
