"""The influence strategy's options: the fidelity guard, the KL-proximal step, and robust probes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.influence.scorers import COMBINED
from cheapertraining.mixing import Constraints, InfluenceStrategy, MixtureController
from tests.mixing.plan_mixture import PlanMixture, measured
from tests.mixing.test_strategies import NAMES, SOURCES, UNIFORM, proposed, ready, signals

Array = NDArray[np.float64]
SCORES = np.array([3.0, 1.0, -1.0])


def closed_loop(strategy: InfluenceStrategy, decisions: int, *, honest: bool) -> tuple[MixtureController, list[float]]:
    """Clear scores for the first source; the probe's loss falls as predicted, or the less the more is predicted."""
    mixture = PlanMixture(dict.fromkeys(NAMES, 10_000), lag=1)
    controller = MixtureController(
        mixture, strategy, Constraints(floor=0.01), interval=1, warmup=0, horizon_tokens=10**9
    )
    course = []
    for decision in range(1, decisions + 1):
        change = math.nan
        if controller.history:
            expected = controller.history[-1].predicted["p0"]
            assert expected is not None
            change = expected if honest else -4.0 - expected
        scores = SCORES * (1 + 0.3 * math.sin(decision))
        mixture.consumed += 1
        controller.step(decision, measured(NAMES, scores, np.full(3, 0.05), changes=np.array([change])), 1.0)
        course.append(mixture.get_current_weights()["a"])
    return controller, course


def test_the_guard_lets_predictions_pass_that_come_true() -> None:
    _, guarded = closed_loop(InfluenceStrategy(guard=True), 12, honest=True)
    _, free = closed_loop(InfluenceStrategy(), 12, honest=True)
    assert guarded == free
    assert guarded[-1] > 0.9


def test_the_guard_goes_back_towards_the_prior_where_they_do_not() -> None:
    controller, guarded = closed_loop(InfluenceStrategy(guard=True), 16, honest=False)
    _, free = closed_loop(InfluenceStrategy(), 16, honest=False)
    assert guarded[:4] == free[:4]  # Four comparisons are the fewest.
    assert free[-1] > 0.9
    assert guarded[-1] < guarded[3]
    state = json.loads(json.dumps(controller.state_dict()))
    assert len(state["strategy"]["state"]["looks"]) == 8


def test_the_guard_takes_noise_above_the_spread_for_no_evidence() -> None:
    """One source stands out, but the mean error is above the spread: it must not move alone."""
    scores, errors = np.array([4.0, 0.0, 0.0]), np.array([0.1, 6.0, 6.0])
    given = signals(influence=measured(NAMES, scores, errors, samples=50))
    np.testing.assert_allclose(proposed(ready(InfluenceStrategy(ema=0.0, threshold=0.0, guard=True)), given), UNIFORM)


def test_the_proximal_step_is_its_formula_and_settles() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    strategy = InfluenceStrategy(learning_rate=0.5, ema=0.0, update="kl_proximal")
    strategy.reset(SOURCES, UNIFORM, 1)
    wish = proposed(strategy, signals(weights=weights, influence=measured(NAMES, SCORES, np.full(3, 1e-9))))
    centred = SCORES - weights @ SCORES
    step = 0.5 * centred / np.sqrt((centred**2).mean())
    expected = np.exp((np.log(weights * 3) + step) / 1.1)
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-9)

    def objective(w: Array) -> float:
        return float(step @ w - w @ np.log(w / weights) - 0.1 * w @ np.log(w * 3))

    for seed in range(20):
        other = np.random.default_rng(seed).dirichlet(np.ones(3) * 5)
        assert objective(wish) >= objective(0.99 * wish + 0.01 * other)


def test_robust_probes_follow_what_lags() -> None:
    """Probe p0 has lost 10 % of its loss, p1 nothing: importances exp(-1) and exp(1), over the mean of the two."""
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    changes, losses = np.array([-0.2, 0.0]), np.array([1.8, 3.0])
    given = measured(NAMES, scores, np.full((2, 3), 1e-9), losses=losses, changes=changes)
    strategy = ready(InfluenceStrategy(learning_rate=0.5, ema=0.0, robust=True))
    wish = proposed(strategy, signals(influence=given))
    importance = np.exp([-1.0, 1.0]) / np.exp([-1.0, 1.0]).sum()
    centred = importance @ scores - (importance @ scores).mean()
    expected = np.exp(0.5 * centred / np.sqrt((centred**2).mean()))
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-6)
    urgency = strategy.state_dict()["urgency"]
    assert urgency == {"p0": pytest.approx(-1), "p1": pytest.approx(1)}
    proposed(strategy, signals(influence=given))
    assert strategy.state_dict()["urgency"] == {"p0": pytest.approx(-1.8), "p1": pytest.approx(1.8)}
    combined = dataclasses.replace(given, directions=(COMBINED,))
    with pytest.raises(UserError, match="found them combined"):
        strategy.propose(signals(influence=combined))


def test_state_of_the_options_round_trips() -> None:
    first = InfluenceStrategy(guard=True, robust=True)
    closed_loop(first, 7, honest=False)
    second = ready(InfluenceStrategy(guard=True, robust=True))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    with pytest.raises(UserError, match=r"influence\.update: expected exponentiated or kl_proximal, found 'kl'"):
        InfluenceStrategy(update="kl")
