"""Projections are exact: against brute force, against the optimality conditions, and by their algebra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.mixing.constraints import Ball, Constraints, kl_divergence, project_kl, repetition_caps

Array = NDArray[np.float64]


def simplex(count: int, smallest: float = 1e-3) -> st.SearchStrategy[Array]:
    weights = st.lists(st.floats(smallest, 1.0), min_size=count, max_size=count)
    return weights.map(lambda values: np.array(values) / math.fsum(values))


@st.composite
def problems(draw: st.DrawFn, most: int = 8) -> tuple[Array, Array, Array, list[Ball]]:
    """A wish, bounds and up to two balls whose centres satisfy all of it, so that a solution exists."""
    count = draw(st.integers(2, most))
    inside = draw(simplex(count))
    shrink = draw(st.lists(st.floats(0.0, 1.0), min_size=2 * count, max_size=2 * count))
    lower = inside * np.array(shrink[:count])
    upper = inside + (1 - inside) * np.array(shrink[count:])
    balls = []
    for _ in range(draw(st.integers(0, 2))):
        center = draw(simplex(count))
        radius = kl_divergence(inside, center) + draw(st.floats(1e-4, 1.0))
        balls.append(Ball(center, radius))
    wish = draw(simplex(count, 1e-6))
    return wish, lower, upper, balls


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_result_is_allowed_and_projecting_it_again_changes_nothing(
    problem: tuple[Array, Array, Array, list[Ball]],
) -> None:
    wish, lower, upper, balls = problem
    result = project_kl(wish, lower, upper, balls)
    assert abs(math.fsum(result) - 1) < 1e-12
    assert np.all(result >= lower - 1e-12)
    assert np.all(result <= upper + 1e-12)
    for ball in balls:
        assert kl_divergence(result, ball.center) <= ball.radius
    assert project_kl(result, lower, upper, balls).tobytes() == result.tobytes()


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_sources_does_not_change_a_bit(
    problem: tuple[Array, Array, Array, list[Ball]], random: object
) -> None:
    wish, lower, upper, balls = problem
    order = np.random.default_rng(len(wish)).permutation(len(wish))
    straight = project_kl(wish, lower, upper, balls)
    shuffled = project_kl(wish[order], lower[order], upper[order], [Ball(b.center[order], b.radius) for b in balls])
    assert shuffled.tobytes() == straight[order].tobytes()


@settings(max_examples=150, deadline=None)
@given(problems(most=5), st.integers(0, 2**31))
def test_no_allowed_mixture_is_nearer(problem: tuple[Array, Array, Array, list[Ball]], seed: int) -> None:
    """Outside reference: the variational inequality of a convex minimum, on random allowed mixtures.

    ``w`` is the minimum if and only if moving towards any allowed ``v`` does not descend:
    ``<log(w / wish), v - w> >= 0``.
    """
    wish, lower, upper, balls = problem
    result = project_kl(wish, lower, upper, balls)
    positive = result > 0
    slope = np.where(positive, np.log(np.where(positive, result, 1.0) / wish), 0.0)
    generator = np.random.default_rng(seed)
    tried = 0
    for _ in range(60):
        other = project_kl(generator.dirichlet(np.ones(len(wish)) * 0.7) + 1e-9, lower, upper)
        if all(kl_divergence(other, ball.center) <= ball.radius for ball in balls):
            tried += 1
            assert slope @ (other - result) > -1e-7
    if not balls:
        assert tried == 60


@pytest.mark.parametrize("seed", range(12))
def test_three_sources_against_brute_force(seed: int) -> None:
    """Outside reference: all mixtures on a fine grid, refined around the best."""
    generator = np.random.default_rng(seed)
    inside, wish = generator.dirichlet(np.ones(3)), generator.dirichlet(np.ones(3) * 0.4) + 1e-6
    lower, upper = inside * generator.random(3), inside + (1 - inside) * generator.random(3)
    centers = [generator.dirichlet(np.ones(3) * 2) for _ in range(seed % 3)]
    balls = [Ball(center, kl_divergence(inside, center) + 0.02 * generator.random()) for center in centers]
    result = project_kl(wish, lower, upper, balls)

    center, width = np.array([0.5, 0.5]), 0.5
    for _ in range(14):
        axis = np.linspace(-width, width, 81)
        first, second = np.meshgrid(center[0] + axis, center[1] + axis)
        grid = np.stack([first.ravel(), second.ravel(), 1 - first.ravel() - second.ravel()], axis=1)
        allowed = ((grid >= lower) & (grid <= upper) & (grid > 0)).all(axis=1)
        logs = np.log(np.where(grid > 0, grid, 1.0))
        for ball in balls:
            allowed &= (grid * (logs - np.log(ball.center))).sum(axis=1) <= ball.radius
        if not allowed.any():
            width *= 1.7
            continue
        distance = np.where(allowed, (grid * (logs - np.log(wish / wish.sum()))).sum(axis=1), np.inf)
        center, width = grid[distance.argmin(), :2], width * 0.6
    best = np.array([*center, 1 - center.sum()])
    normal = wish / wish.sum()
    assert kl_divergence(result, normal) <= kl_divergence(best, normal) + 1e-9
    np.testing.assert_allclose(result, best, atol=5e-3)


def test_bounds_alone_scale_the_wish_between_them() -> None:
    result = project_kl(np.array([0.7, 0.2, 0.1]), np.full(3, 0.15), np.full(3, 0.5))
    np.testing.assert_allclose(result, [0.5, 0.5 * 2 / 3, 0.5 / 3], atol=1e-15)


def test_a_ball_alone_lies_on_the_exponential_path() -> None:
    """With no bound active the answer is ``wish**(1-a) * last**a`` normalized, and its divergence is the radius."""
    wish, last = np.array([0.9, 0.05, 0.05]), np.array([0.2, 0.3, 0.5])
    result = project_kl(wish, np.zeros(3), np.ones(3), [Ball(last, 0.1)])
    assert kl_divergence(result, last) == pytest.approx(0.1, abs=1e-11)
    exponents = np.log(result / last) - np.log(result / last).mean()
    direction = np.log(wish / last) - np.log(wish / last).mean()
    np.testing.assert_allclose(exponents / exponents[0], direction / direction[0], atol=1e-9)


def test_two_active_balls_are_both_met_exactly() -> None:
    wish = np.array([0.9, 0.05, 0.03, 0.02])
    first, second = np.array([0.2, 0.3, 0.25, 0.25]), np.array([0.3, 0.1, 0.3, 0.3])
    balls = [Ball(first, 0.1), Ball(second, 0.07)]
    result = project_kl(wish, np.full(4, 0.01), np.ones(4), balls)
    for ball in balls:
        assert kl_divergence(result, ball.center) == pytest.approx(ball.radius, abs=1e-10)
    swapped = project_kl(wish, np.full(4, 0.01), np.ones(4), balls[::-1])
    np.testing.assert_allclose(result, swapped, atol=1e-9)


def test_a_wish_of_zero_is_kept_where_it_is_allowed_and_shares_the_rest_where_it_is_not() -> None:
    np.testing.assert_array_equal(project_kl(np.array([1.0, 1.0, 0.0]), np.zeros(3), np.ones(3)), [0.5, 0.5, 0])
    filled = project_kl(np.array([1.0, 0.0, 0.0]), np.zeros(3), np.array([0.4, 1.0, 1.0]))
    np.testing.assert_allclose(filled, [0.4, 0.3, 0.3], atol=1e-15)
    near = project_kl(np.array([1.0, 0.0]), np.zeros(2), np.ones(2), [Ball(np.array([0.5, 0.5]), 0.1)])
    assert kl_divergence(near, np.array([0.5, 0.5])) == pytest.approx(0.1, abs=1e-9)
    assert near[0] > near[1] > 0


def test_extreme_wishes_stay_finite() -> None:
    wish = np.array([1.0, 1e-300, 1e-12, 1e-30])
    result = project_kl(wish, np.full(4, 0.01), np.ones(4), [Ball(np.full(4, 0.25), 0.2)])
    assert np.isfinite(result).all()
    assert kl_divergence(result, np.full(4, 0.25)) <= 0.2


def names(weights: Array) -> dict[str, float]:
    return {f"s{index}": float(weight) for index, weight in enumerate(weights)}


def test_project_by_name_does_not_care_about_order() -> None:
    constraints = Constraints(floor={"s1": 0.2}, ceiling={"s0": 0.5}, kl_step=0.1)
    wish, last = names(np.array([0.8, 0.1, 0.1])), names(np.array([0.3, 0.4, 0.3]))
    straight = constraints.project(wish, last)
    backwards = constraints.project(dict(reversed(wish.items())), last)
    assert straight == backwards
    assert straight["s1"] >= 0.2 - 1e-12


def test_repetition_caps_spread_what_is_left_over_the_horizon() -> None:
    caps = repetition_caps({"a": 50.0, "b": 5.0, "c": 0.0}, {"a": 50.0, "b": 25.0, "c": math.inf}, 100.0)
    assert caps == {"a": 0.0, "b": 0.2}
    assert repetition_caps({"a": 1.0}, {"a": 1.0}, 0.0) == {}


def test_a_cap_goes_before_the_floor_and_widens_the_trust_region() -> None:
    constraints = Constraints(floor=0.05, kl_step=0.01)
    last = names(np.array([0.8, 0.1, 0.1]))
    result = constraints.project(last, last, {"s0": 0.0})
    np.testing.assert_allclose([result[name] for name in last], [0, 0.5, 0.5], atol=1e-6)


def test_caps_that_cannot_fill_the_horizon_run_dry_together() -> None:
    constraints = Constraints(floor=0.01, ceiling=0.6)
    result = constraints.project(names(np.ones(2)), None, {"s0": 0.3, "s1": 0.1})
    np.testing.assert_allclose([result["s0"], result["s1"]], [0.75, 0.25], atol=1e-12)
    with pytest.raises(UserError, match="every source has reached it"):
        constraints.project(names(np.ones(2)), None, {"s0": 0.0, "s1": 0.0})


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(floor=0.6), r"constraints.floor: the floors of 2 sources sum to 1.2"),
        (Constraints(floor=0, ceiling=0.4), r"constraints.ceiling: the ceilings of 2 sources sum to 0.8"),
        (Constraints(floor={"s0": 0.5}, ceiling={"s0": 0.3}), r"floor 0.5 of source 's0' is above its ceiling"),
        (Constraints(floor=0.3, kl_step=0.01), r"kl_step: 0.01 .* the last weights lie outside .*'s1' 0.1"),
        (Constraints(floor=0.3, kl_prior=0.01, prior={"s0": 9, "s1": 1}), r"kl_prior: 0.01 .* the prior lie outside"),
        (Constraints(kl_prior=0.1), r"kl_prior: expected prior weights"),
        (Constraints(floor={"s2": 0.1}), r"floor: no source is named 's2' \(sources: s0, s1\)"),
        (
            Constraints(floor=0, kl_step=0.01, kl_prior=0.01, prior={"s0": 0.1, "s1": 0.9}),
            r"kl_step: 0.01 leaves no mixture: no mixture within kl_prior 0.01",
        ),
    ],
)
def test_conflicting_bounds_are_named(constraints: Constraints, message: str) -> None:
    last = {"s0": 0.9, "s1": 0.1}
    with pytest.raises(UserError, match=message):
        constraints.check(last)


def test_a_weight_of_zero_under_a_floor_and_a_trust_region_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="a weight of 0 cannot grow"):
        Constraints(floor=0.01, kl_step=0.5).check({"s0": 1.0, "s1": 0.0})


@pytest.mark.parametrize("bad", [{"floor": -0.1}, {"ceiling": 1.5}, {"kl_step": 0}, {"floor": {"a": math.nan}}])
def test_values_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"algorithms\.online_mixing\.constraints"):
        Constraints(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("wish", [{"s0": math.nan, "s1": 1}, {"s0": -1, "s1": 1}, {"s0": 0, "s1": 0}])
def test_bad_wishes_are_refused(wish: dict[str, float]) -> None:
    with pytest.raises(UserError, match="the wished weights"):
        Constraints().project(wish)


def test_a_decision_is_cheap_with_everything_active() -> None:
    """Twenty sources and two active balls: worked out in well under a training step."""
    import time

    generator = np.random.default_rng(0)
    wish, last, prior = (generator.dirichlet(np.ones(20)) for _ in range(3))
    constraints = Constraints(floor=0.001, kl_step=0.3, kl_prior=0.3, prior=names(prior))
    started = time.process_time()
    result = constraints.project(names(wish), names(last))
    assert time.process_time() - started < 2.0
    assert sum(result.values()) == pytest.approx(1)


def test_permutations_of_a_small_problem_all_agree() -> None:
    wish, lower = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 0.1, 0.2, 0.05])
    upper, center = np.array([0.4, 1.0, 1.0, 0.3]), np.array([0.1, 0.2, 0.3, 0.4])
    straight = project_kl(wish, lower, upper, [Ball(center, 0.05)])
    for order in map(list, itertools.permutations(range(4))):
        turned = project_kl(wish[order], lower[order], upper[order], [Ball(center[order], 0.05)])
        assert turned.tobytes() == straight[order].tobytes()
