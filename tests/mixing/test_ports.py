"""The ported strategies: each against its formula or a hand-worked example in float64, and resumed exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.influence.scorers.gram import SourceGradients, moments_of
from cheapertraining.mixing import (
    ADOStrategy,
    AioliStrategy,
    DoGEStrategy,
    DoGETargetStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    ODMStrategy,
    PiKEStrategy,
    ProbeReading,
    RnBStrategy,
    Signals,
    SkillItStrategy,
    SourceInfo,
    Strategy,
)
from cheapertraining.mixing.strategies.ado import fit_law
from tests.mixing.plan_mixture import measured

Array = NDArray[np.float64]
NAMES = ("a", "b", "c")
UNIFORM = np.full(3, 1 / 3)
BATCH_TOKENS = 100


def signals(batch: int = 10, weights: Array = UNIFORM, seen: Array | None = None, **given: Any) -> Signals:
    base = Signals(
        sources=NAMES,
        batch=batch,
        tokens=batch * BATCH_TOKENS,
        effective_batch=batch + 2,
        effective_tokens=(batch + 2) * BATCH_TOKENS,
        horizon_tokens=10**6,
        sampling_weights=weights,
        objective_weights=np.ones(3),
        losses=np.array([2.0, 3.0, 4.0]),
        loss_tokens=np.full(3, 10.0),
        tokens_seen=batch * BATCH_TOKENS * weights if seen is None else seen,
        epochs=np.zeros(3),
        batch_size=8,
    )
    return dataclasses.replace(base, **given)


def gradients(vectors: Array, variances: Array | None = None, samples: int = 4) -> SourceGradients:
    products = vectors @ vectors.T
    spread = np.zeros(len(vectors)) if variances is None else variances
    norms = np.diag(products) - spread / samples
    return SourceGradients(NAMES, products, np.zeros_like(products), norms, spread, samples, 0.0)


def ready(strategy: Strategy, prior: Array = UNIFORM) -> Strategy:
    strategy.reset([SourceInfo(name, 1000) for name in NAMES], prior, 10**6)
    return strategy


def proposed(strategy: Strategy, given: Signals) -> Array:
    wish = strategy.propose(given)
    assert wish is not None
    return np.asarray(wish / wish.sum())


def softmax(values: Any) -> Array:
    exponentials = np.exp(np.asarray(values, dtype=np.float64))
    return np.asarray(exponentials / exponentials.sum())


VECTORS = np.array([[3.0, 0.0], [1.0, 1.0], [-1.0, 2.0]])


def test_doge_by_hand() -> None:
    """Products ab = 3, ac = -3, bc = 1; norms 3, sqrt 2, sqrt 5. Scores 0, 4, -2 (counts as 0) over the mean norm."""
    strategy = ready(DoGEStrategy(mu=0.5, smoothing=0.1))
    weights = np.array([0.5, 0.3, 0.2])
    norm = (3 + math.sqrt(2) + math.sqrt(5)) / 3
    wish = proposed(strategy, signals(10, weights, gradients=gradients(VECTORS), learning_rate=0.1))
    expected = weights * np.exp([0.0, 0.1 * (4 / norm) / 0.5, 0.0])
    np.testing.assert_allclose(wish, 0.9 * expected / expected.sum() + 0.1 / 3, rtol=1e-12)
    later = proposed(strategy, signals(15, weights, gradients=gradients(VECTORS), learning_rate=0.1))
    expected = weights * np.exp([0.0, 5 * 0.1 * (4 / norm) / 0.5, 0.0])
    np.testing.assert_allclose(later, 0.9 * expected / expected.sum() + 0.1 / 3, rtol=1e-12)
    capped = proposed(ready(DoGEStrategy(max_score=0.5)), signals(gradients=gradients(VECTORS), learning_rate=0.1))
    np.testing.assert_allclose(capped, softmax([0, 0.1 * 0.5 / 0.05, 0]), rtol=1e-12)


def test_doremi_by_hand() -> None:
    strategy = ready(DoReMiStrategy(step=2.0, smoothing=0.01))
    weights = np.array([0.5, 0.3, 0.2])
    wish = proposed(strategy, signals(weights=weights, excess_losses=np.array([0.1, math.nan, 0.4])))
    expected = weights * np.exp([0.2, 0.0, 0.8])
    np.testing.assert_allclose(wish, 0.99 * expected / expected.sum() + 0.01 / 3, rtol=1e-12)
    wish = proposed(strategy, signals(weights=weights, excess_losses=np.array([math.nan, 0.3, math.nan])))
    expected = weights * np.exp([0.2, 0.6, 0.8])
    np.testing.assert_allclose(wish, 0.99 * expected / expected.sum() + 0.01 / 3, rtol=1e-12)


def test_odm_is_exp3() -> None:
    strategy = ready(ODMStrategy(ema=0.5))
    weights = np.array([0.5, 0.25, 0.25])
    wish = proposed(strategy, signals(4, weights, losses=np.array([2.0, 3.0, math.nan])))
    rewards = np.array([0.5 * 2 / 0.5, 0.5 * 3 / 0.25, 0.0])
    first = min(1 / 3, math.sqrt(math.log(3) / 12))
    np.testing.assert_allclose(wish, (1 - 3 * first) * softmax(rewards / 3) + first, rtol=1e-12)
    wish = proposed(strategy, signals(100, weights, losses=np.array([1.0, math.nan, 1.0])))
    rewards = np.array([0.5 * 2 + 0.5 * 1 / 0.5, 6.0, 0.5 * 1 / 0.25])
    second = math.sqrt(math.log(3) / 300)
    np.testing.assert_allclose(wish, (1 - 3 * second) * softmax(first * rewards) + second, rtol=1e-12)


def test_pike_by_hand() -> None:
    variances = np.array([8.0, 4.0, 0.0])
    found = gradients(VECTORS, variances)
    weights = np.array([0.5, 0.3, 0.2])
    wish = proposed(ready(PiKEStrategy(0.1, 0.2)), signals(weights=weights, gradients=found))
    norms = np.array([9 - 2, 2 - 1, 5])
    expected = weights * np.exp(0.1 * norms - 0.2 / (2 * 8) * variances)
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-12)


def test_fair_pike_is_pike_on_the_tilted_loss() -> None:
    """Losses 2, 3, 4 and tilt log 2: y = 1/7, 2/7, 4/7. Outside reference for y: the tilted loss's derivative."""
    found = gradients(VECTORS, np.array([8.0, 4.0, 0.0]))
    strategy = ready(PiKEStrategy(0.1, 0.2, tilt=math.log(2)))
    wish = proposed(strategy, signals(gradients=found))
    shares = 3 * np.array([1, 2, 4]) / 7
    losses, step = np.array([2.0, 3.0, 4.0]), 1e-6
    for k, share in enumerate(shares):
        ahead, behind = (losses + sign * step * np.eye(3)[k] for sign in (1, -1))
        slope = (np.log(np.exp2(ahead).mean()) - np.log(np.exp2(behind).mean())) / math.log(2) / (2 * step)
        assert 3 * slope == pytest.approx(share, rel=1e-6)
    exponents = shares**2 * (0.1 * np.array([7, 1, 5]) - 0.2 / 16 * np.array([8, 4, 0]))
    np.testing.assert_allclose(wish, softmax(exponents), rtol=1e-12)
    # A source that did not come keeps its last loss, also across a resume.
    again = ready(PiKEStrategy(0.1, 0.2, tilt=math.log(2)))
    again.load_state_dict(json.loads(json.dumps(strategy.state_dict())))
    wish = proposed(again, signals(losses=np.array([math.nan, 3.0, math.nan]), gradients=found))
    np.testing.assert_allclose(wish, softmax(exponents), rtol=1e-12)


def test_doge_towards_probes_is_aligned_with_them() -> None:
    """Scores on two probes of weights 1/2: 1, -1, 40 in the mean; over the mean norm; the last is clipped."""
    scores = np.array([[2.0, 0.0, 40.0], [0.0, -2.0, 40.0]])
    weights = np.array([0.5, 0.3, 0.2])
    norm = (3 + math.sqrt(2) + math.sqrt(5)) / 3
    strategy = ready(DoGETargetStrategy(mu=0.5))
    found = measured(NAMES, scores, np.zeros((2, 3)))
    given = signals(10, weights, gradients=gradients(VECTORS), influence=found, learning_rate=0.1)
    wish = proposed(strategy, given)
    expected = weights * np.exp([0.1 / norm / 0.5, 0.0, 0.1 * 5 / 0.5])
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-12)
    assert strategy.propose(signals(12, weights, gradients=gradients(VECTORS))) is None
    assert strategy.state_dict()["last_batch"] == 10


def test_rnb_averages_its_matrix() -> None:
    """A moving average of 2 and of 4 times G, corrected for its start: (0.25 * 1 * 2 + 0.5 * 4) / 0.75."""
    strategy = ready(RnBStrategy(2.0, {"a": 3, "c": 3}, ema=0.5))
    one, other = (gradients(math.sqrt(size) * VECTORS) for size in (2, 4))
    np.testing.assert_allclose(proposed(strategy, signals(gradients=one)), softmax([3, 2, 1]), rtol=1e-9)
    factor = (0.25 * 2 + 0.5 * 4) / 0.75
    resumed = ready(RnBStrategy(2.0, {"a": 3, "c": 3}, ema=0.5))
    resumed.load_state_dict(json.loads(json.dumps(strategy.state_dict())))
    for each in (strategy, resumed):
        wish = proposed(each, signals(gradients=other))
        np.testing.assert_allclose(wish, softmax(factor * np.array([1.5, 1, 0.5])), rtol=1e-9)


def test_rnb_by_hand() -> None:
    """Target half a, half c: G p = (9 - 3, 3 + 1, -3 + 5) / 2."""
    strategy = ready(RnBStrategy(2.0, {"a": 3, "c": 3}))
    np.testing.assert_allclose(proposed(strategy, signals(gradients=gradients(VECTORS))), softmax([1.5, 1, 0.5]))
    equal = proposed(ready(RnBStrategy(1.0)), signals(gradients=gradients(VECTORS)))
    np.testing.assert_allclose(equal, softmax([9 / 3, 6 / 3, 3 / 3]))
    with pytest.raises(UserError, match=r"rnb\.target\.d: no such source"):
        ready(RnBStrategy(1.0, {"d": 1}))


def test_grape_turns_to_the_probe_that_lags() -> None:
    scores = np.array([[2.0, 0.0, 1.0], [0.0, 0.2, 0.1]])
    losses = np.array([2.0, 4.0])
    weights = np.array([0.5, 0.3, 0.2])
    given = signals(
        weights=weights, influence=measured(NAMES, scores, np.zeros((2, 3)), losses=losses), learning_rate=0.1
    )
    strategy = ready(GRAPEStrategy(mu_weights=0.5, mu_probes=0.2))
    wish = proposed(strategy, given)
    urgency = softmax([-0.1 * 0.6 / 0.2, -0.1 * (0.08 / 4) / 0.2])
    expected = weights * np.exp(0.1 * (urgency @ scores) / 0.5)
    np.testing.assert_allclose(wish, expected / expected.sum(), rtol=1e-12)
    again = proposed(strategy, dataclasses.replace(given, batch=given.batch + 3))
    urgency = urgency * np.exp([-0.3 * 0.6 / 0.2, -0.3 * 0.02 / 0.2])
    expected = weights * np.exp(0.3 * (urgency / urgency.sum() @ scores) / 0.5)
    np.testing.assert_allclose(again, expected / expected.sum(), rtol=1e-12)


# ---- ADO ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("law", [(1.0, 0.7, 0.4), (0.3, 1.2, 0.25), (2.0, 0.6, 0.6)])
def test_ado_finds_the_law_behind_losses(law: tuple[float, float, float]) -> None:
    places = np.linspace(25, 1000, 40)
    losses = np.exp(law[1]) + np.exp(law[0]) * places ** -law[2]
    np.testing.assert_allclose(fit_law(places, losses), law, rtol=2e-2)
    noisy = losses * np.exp(0.01 * np.random.default_rng(0).standard_normal(40))
    noisy[7] *= 1.5  # An outlier, which Huber's loss shrugs off.
    fitted = fit_law(places, noisy)
    curve = np.exp(fitted[1]) + np.exp(fitted[0]) * places ** -fitted[2]
    np.testing.assert_allclose(curve, losses, rtol=2e-2)


def test_ado_by_formula() -> None:
    laws = np.array([[1.0, 0.7, 0.4], [0.3, 1.2, 0.25], [2.0, 0.6, 0.6]])
    prior = np.array([0.5, 0.3, 0.2])
    strategy = ready(ADOStrategy(), prior)
    recent, average, wish = prior, prior, None
    for batch in range(20, 220, 20):
        place = batch - 10
        losses = np.exp(laws[:, 1]) + np.exp(laws[:, 0]) * place ** -laws[:, 2]
        wish = strategy.propose(signals(batch, prior, losses=losses))
        recent = 0.9**20 * recent + (1 - 0.9**20) * prior
        if batch < 80:
            assert wish is None
            continue
        slopes = laws[:, 2] * np.exp(laws[:, 0]) * float(batch) ** -laws[:, 2] / batch
        instant = prior * np.sqrt(recent) * slopes
        instant = np.maximum(instant / instant.sum(), 0.01)
        instant = instant / instant.sum()
        assert wish is not None
        if batch >= 140:  # Four points leave some play for the law.
            np.testing.assert_allclose(wish, 0.9 * average + 0.1 * instant, rtol=1e-2)
        average = (1 - 20 / (batch + 1)) * average + 20 / (batch + 1) * instant
    assert wish is not None
    assert wish[2] > prior[2]


# ---- Aioli, Skill-it ---------------------------------------------------------------------------------------
EFFECTS = np.array([[0.04, 0.01, 0.0], [0.0, 0.02, 0.03]])  # A, [P, K]: drop of each probe's loss in a decision.


def simulate(strategy: Strategy, decisions: int, lag: int = 1, keep: float = 1.0) -> list[Array]:
    """A run in which the linear law holds: one batch a decision, and weights in force ``lag`` batches late.

    ``keep``: how far the weights may go towards a wish, as a constraint would have it.
    """
    planned = [UNIFORM] * lag
    seen, losses, wishes = np.zeros(3), np.array([5.0, 6.0]), []
    for batch in range(decisions):
        given = signals(batch, planned[-1] if planned else UNIFORM, seen, effective_batch=batch + lag)
        reading = ProbeReading(("p", "q"), np.full(2, 0.5), losses)
        wish = strategy.propose(dataclasses.replace(given, probe_losses=reading))
        assert wish is not None
        wishes.append(wish)
        planned.append(UNIFORM + keep * (wish - UNIFORM))
        drawn = planned[batch]
        seen, losses = seen + BATCH_TOKENS * drawn, losses - EFFECTS @ drawn
    return wishes


@pytest.mark.parametrize(("lag", "keep"), [(0, 1.0), (1, 1.0), (3, 1.0), (1, 0.5)])
def test_aioli_recovers_the_effects_and_takes_its_step(lag: int, keep: float) -> None:
    """Whatever the delay, and although the constraints let it go only part of the way."""
    strategy = ready(AioliStrategy(eta=0.5, one_hot=0.8, hold=4))
    wishes = simulate(strategy, 3 + lag + 4, lag, keep)
    leant = sorted(int(wish.argmax()) for wish in wishes[:3])
    assert leant == [0, 1, 2]
    np.testing.assert_allclose(np.sort(wishes[0]), [0.1, 0.1, 0.8])
    gains = 2 * np.full(2, 0.5) @ EFFECTS / EFFECTS.sum()
    np.testing.assert_allclose(wishes[3 + lag], softmax(0.5 * gains), rtol=1e-6)
    np.testing.assert_array_equal(wishes[3 + lag : 7 + lag], [wishes[3 + lag]] * 4)


def test_aioli_averages_effects_and_begins_anew() -> None:
    strategy = ready(AioliStrategy(eta=0.5, hold=2, ema=0.5, rounds=2))
    wishes = simulate(strategy, 20)
    gains = EFFECTS.sum(axis=0) / EFFECTS.sum()
    np.testing.assert_allclose(wishes[7], softmax(0.5 * gains), rtol=1e-6)
    np.testing.assert_allclose(wishes[16], softmax(0.5 * gains), rtol=1e-6)  # The average of the same effects.


def test_skillit_by_hand() -> None:
    strategy = ready(SkillItStrategy(eta=0.1, window=2, graph={"a": {"p": 1.0}, "b": {"p": 0.5, "q": 1.0}}))
    for losses in ([9.0, 9.0], [2.0, 3.0], [1.0, 2.0]):
        reading = ProbeReading(("p", "q"), np.full(2, 0.5), np.array(losses))
        wish = proposed(strategy, signals(probe_losses=reading))
    np.testing.assert_allclose(wish, softmax([0.3, 0.1 * (0.5 * 3 + 5), 0]), rtol=1e-12)
    strategy = ready(SkillItStrategy(graph={"a": {"x": 1.0}}))
    with pytest.raises(UserError, match="no probe is named 'x'"):
        strategy.propose(signals(probe_losses=reading))
    with pytest.raises(UserError, match="no such source"):
        ready(SkillItStrategy(graph={"z": {"p": 1.0}}))


def test_skillit_learns_its_graph() -> None:
    strategy = ready(SkillItStrategy(eta=0.1, window=1))
    wishes = simulate(strategy, 5)
    losses = np.array([5.0, 6.0])
    for drawn in [UNIFORM, *wishes[:3]]:
        losses = losses - EFFECTS @ drawn
    strengths = EFFECTS / losses[:, None]
    np.testing.assert_allclose(wishes[4], softmax(0.1 * (losses @ strengths / strengths.max())), rtol=1e-6)


# ---- all of them -------------------------------------------------------------------------------------------
STRATEGIES = [
    ADOStrategy,
    AioliStrategy,
    DoGEStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    ODMStrategy,
    PiKEStrategy,
    RnBStrategy,
    SkillItStrategy,
]


def course(strategy: Strategy, start: int, end: int) -> list[Array | None]:
    wishes: list[Array | None] = []
    for decision in range(start, end):
        draw = np.random.default_rng(decision)
        batch = 10 * (decision + 1)
        vectors = draw.standard_normal((3, 2))
        given = signals(
            batch,
            softmax(draw.standard_normal(3)),
            float(batch * BATCH_TOKENS) * UNIFORM,
            losses=np.array([4.0, 5.0, 6.0]) * batch**-0.1 + 0.01 * draw.standard_normal(3),
            gradients=gradients(vectors, np.ones(3)),
            influence=measured(NAMES, draw.standard_normal((2, 3)), np.ones((2, 3))),
            probe_losses=ProbeReading(("p", "q"), np.full(2, 0.5), 5 - 0.1 * decision + 0.01 * draw.random(2)),
            excess_losses=draw.random(3),
            learning_rate=1e-2,
        )
        wishes.append(strategy.propose(given))
    return wishes


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_exactly(kind: Any, stop: int) -> None:
    undisturbed = ready(kind())
    assert isinstance(undisturbed, Strategy)
    assert undisturbed.needs
    expected = course(undisturbed, 0, 12)
    stopped = ready(kind())
    course(stopped, 0, stop)
    state = json.loads(json.dumps(stopped.state_dict(), allow_nan=False))
    resumed = ready(kind())
    resumed.load_state_dict(state)
    for wish, other in zip(course(resumed, stop, 12), expected[stop:], strict=True):
        assert (wish is None) == (other is None)
        if wish is not None and other is not None:
            assert wish.tobytes() == other.tobytes()
            assert np.all(wish >= 0)
    assert resumed.state_dict() == undisturbed.state_dict()


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.name)
def test_without_its_signal_nothing_changes(kind: Any) -> None:
    strategy = ready(kind())
    before = strategy.state_dict()
    assert strategy.propose(signals(losses=np.full(3, math.nan))) is None
    assert strategy.state_dict() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: AioliStrategy(eta=0),
        lambda: AioliStrategy(one_hot=0),
        lambda: AioliStrategy(hold=0),
        lambda: AioliStrategy(ema=1),
        lambda: DoGEStrategy(mu=0),
        lambda: DoGEStrategy(smoothing=2),
        lambda: DoReMiStrategy(step=0),
        lambda: DoReMiStrategy(smoothing=-1),
        lambda: GRAPEStrategy(mu_probes=0),
        lambda: ODMStrategy(ema=1),
        lambda: PiKEStrategy(noise=-1),
        lambda: RnBStrategy(temperature=0),
        lambda: RnBStrategy(target={"a": 0}),
        lambda: SkillItStrategy(window=0),
        lambda: SkillItStrategy(graph={"a": {"p": -1}}),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"algorithms\.online_mixing"):
        make()


def test_moments_are_those_of_the_gradients_themselves() -> None:
    """From explicit gradients of 3 sources with 5 samples, by the plain formulas of a ratio of means."""
    draw = np.random.default_rng(1)
    rows, tokens = draw.standard_normal((3, 5, 7)), draw.integers(1, 9, (3, 5)).astype(np.float64)
    flat = rows.reshape(15, 7)
    products, errors, norms, variances = moments_of(flat @ flat.T, tokens)
    total = tokens.sum(axis=1)
    means = rows.sum(axis=1) / total[:, None]
    residuals = rows - tokens[:, :, None] * means[:, None]
    np.testing.assert_allclose(products, means @ means.T)
    np.testing.assert_allclose(variances, 25 / 4 * (residuals**2).sum(axis=(1, 2)) / total**2)
    np.testing.assert_allclose(norms, (means**2).sum(axis=1) - variances / 5)
    first = ((residuals[0] @ means[1]) ** 2).sum() / total[0] ** 2 + ((residuals[1] @ means[0]) ** 2).sum() / total[
        1
    ] ** 2
    assert errors[0, 1] == pytest.approx(math.sqrt(5 / 4 * first))
    assert errors[2, 2] == pytest.approx(2 * math.sqrt(5 / 4 * ((residuals[2] @ means[2]) ** 2).sum()) / total[2])


def test_squared_norms_and_variances_are_without_bias() -> None:
    draw = np.random.default_rng(2)
    truth = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.3, 0.3, 0.3]])
    found = []
    for _ in range(4000):
        flat = (truth[:, None] + draw.standard_normal((3, 4, 3))).reshape(12, 3)
        found.append(moments_of(flat @ flat.T, np.ones((3, 4)))[2:])
    norms, variances = np.mean(found, axis=0)
    np.testing.assert_allclose(norms, (truth**2).sum(axis=1), atol=0.06)
    np.testing.assert_allclose(variances, 3.0, rtol=0.03)
