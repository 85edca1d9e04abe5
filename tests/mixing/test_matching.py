"""Gradient matching: against another solver, against autograd, and on cases whose answer is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.scorers.gram import GradientEstimator, SourceGradients
from cheapertraining.mixing import MatchingStrategy
from cheapertraining.mixing.signals import SourceInfo
from cheapertraining.mixing.strategies.matching import nearest_mixture
from tests.influence.tiny_llama import Sources, probe_loader, tiny_llama
from tests.mixing.test_ports import signals

Float64 = NDArray[np.float64]
EVEN = np.full(3, 1 / 3)


def measured(gradients: Float64, target: Float64, noise: float = 0.0, samples: int = 4) -> SourceGradients:
    """What would be measured of these mean gradients ``[K, D]`` if each sample's had variance ``noise``."""
    products = gradients @ gradients.T
    return SourceGradients(
        sources=("a", "b", "c")[: len(gradients)],
        products=products + np.diag(np.full(len(gradients), noise / samples)),
        errors=np.zeros_like(products),
        squared_norms=np.diag(products).copy(),
        variances=np.full(len(gradients), noise),
        samples=samples,
        seconds=0.0,
        target_products=gradients @ target,
    )


def wish_of(gradients: Float64, target: Float64, noise: float = 0.0, **settings: Any) -> Float64:
    strategy = MatchingStrategy(**settings)
    names = ("a", "b", "c")[: len(gradients)]
    prior = np.full(len(names), 1 / len(names))
    strategy.reset([SourceInfo(name, 10_000) for name in names], prior, 10_000)
    wish = strategy.propose(signals(gradients=measured(gradients, target, noise)))
    assert wish is not None
    return wish


@pytest.mark.parametrize("seed", range(5))
def test_solves_as_scipy_does(seed: int) -> None:
    """The same problem by sequential least squares."""
    rng = np.random.default_rng(seed)
    gradients, target = rng.standard_normal((6, 40)), rng.standard_normal(40)
    pull, prior = rng.uniform(0.1, 2.0, 6), rng.dirichlet(np.ones(6))
    gram, products = gradients @ gradients.T, 10 * gradients @ target

    def loss(w: Float64) -> float:
        return float(w @ gram @ w - 2 * w @ products + pull @ (w - prior) ** 2)

    found = nearest_mixture(gram, products, pull, prior)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)
    expected = minimize(
        loss, prior, bounds=[(0, 1)] * 6, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12
    )
    assert loss(found) <= loss(expected.x / expected.x.sum()) + 1e-9
    np.testing.assert_allclose(found, expected.x, atol=1e-3)


def test_a_source_that_is_known_by_heart_is_not_called_on_for_its_short_gradient() -> None:
    """Its direction is the target's own, but a step on it is a hundredth of one on the other."""
    gradients = np.array([[0.01, 0.0], [0.8, 0.6]])
    # By hand: the least of (1 - 0.01 (1 - w) - 0.8 w)**2 + (0.6 w)**2.
    assert wish_of(gradients, np.array([1.0, 0.0]))[1] == pytest.approx(0.79 * 0.99 / (0.79**2 + 0.36), abs=1e-4)


def test_a_target_that_is_the_mean_of_the_sources_keeps_them_even() -> None:
    """However long their gradients are: here the scores <g_k, g_T> differ by a factor of 25."""
    gradients = np.diag([1.0, 5.0, 2.0])
    np.testing.assert_allclose(wish_of(gradients, gradients.mean(axis=0)), EVEN, atol=1e-6)


def test_the_target_s_own_source_gets_all_and_a_useless_one_nothing() -> None:
    gradients = np.array([[1.0, 0.2, 0.0], [0.3, 1.0, 0.0], [0.0, -0.1, 1.0]])
    np.testing.assert_allclose(wish_of(gradients, gradients[0]), [1, 0, 0], atol=1e-5)


def test_a_source_that_repeats_another_shares_its_weight() -> None:
    gradients = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    wish = wish_of(gradients, np.array([0.5, 0.5]), noise=1e-3)
    np.testing.assert_allclose(wish, [0.25, 0.25, 0.5], atol=1e-3)


def test_noise_pulls_to_the_prior_and_the_unit_of_the_gradients_does_not_matter() -> None:
    gradients = np.array([[1.0, 0.2], [0.2, 1.0], [-0.5, 0.1]])
    target = np.array([1.0, 0.2])
    shares = [wish_of(gradients, target, noise)[0] for noise in (0.0, 1.0, 10.0, 1e6)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] == pytest.approx(1 / 3, abs=1e-3)
    np.testing.assert_allclose(
        wish_of(1e-3 * gradients, 1e-3 * target, 1e-6), wish_of(gradients, target, 1.0), atol=1e-9
    )


def test_only_what_two_halves_of_the_samples_agree_on_is_followed() -> None:
    target = np.array([1.0, 0.0, 0.0])
    best, other = np.eye(3), np.eye(3)[[1, 0, 2]]

    def wish(first: Float64, second: Float64) -> Float64:
        halves = (measured(first, target), measured(second, target))
        strategy = MatchingStrategy()
        strategy.reset([SourceInfo(name, 10_000) for name in ("a", "b", "c")], EVEN, 10_000)
        found = strategy.propose(signals(gradients=dataclasses.replace(measured(best, target), halves=halves)))
        assert found is not None
        return found

    np.testing.assert_allclose(wish(best, best), [1, 0, 0], atol=1e-6)
    # One half is for the first source, one for the second: moves (2, -1, -1) / 3 and (-1, 2, -1) / 3 disagree.
    np.testing.assert_allclose(wish(best, other), EVEN, atol=1e-6)
    # Against (1, 1, -2) / 6, from a target between the two: r = 2 * 3 / (6 + 6 / 4) by hand, in units of 1 / 9.
    between = np.array([[0.5, 0.5, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 1.0]])
    agreement = 2 * 1.5 / (6 + 1.5)
    trust = 2 * agreement / (1 + agreement)
    np.testing.assert_allclose(wish(best, between), EVEN + trust * (np.array([1, 0, 0]) - EVEN), atol=1e-4)


def test_averages_over_decisions_and_takes_its_state_along() -> None:
    rng = np.random.default_rng(0)
    looks = [measured(rng.standard_normal((3, 5)), rng.standard_normal(5), 1.0) for _ in range(4)]
    names = ("a", "b", "c")

    def fresh() -> MatchingStrategy:
        strategy = MatchingStrategy()
        strategy.reset([SourceInfo(name, 10_000) for name in names], EVEN, 10_000)
        return strategy

    straight, begun, resumed = fresh(), fresh(), fresh()
    wishes = [straight.propose(signals(gradients=look)) for look in looks]
    for look in looks[:2]:
        begun.propose(signals(gradients=look))
    resumed.load_state_dict(begun.state_dict())
    for look, wish in zip(looks[2:], wishes[2:], strict=True):
        np.testing.assert_array_equal(resumed.propose(signals(gradients=look)), wish)
    # The average forgets its start: after equal looks, the error is that of the average of a half and its powers.
    for _ in range(60):
        straight.propose(signals(gradients=looks[0]))
    scale = looks[0].squared_norms.mean()
    errors = straight._averages["all"].errors
    np.testing.assert_allclose(errors, (0.5 / 1.5) * looks[0].variances / 4 / scale, rtol=1e-9)


def test_products_with_the_probes_are_those_of_autograd() -> None:
    model = tiny_llama(dtype=torch.float64).eval()
    loaders = {"p": probe_loader(low=0, high=20), "q": probe_loader(low=30, high=50)}
    bank = ProbeBank(loaders, {"p": 3.0, "q": 1.0}, samples=5)
    found = GradientEstimator(Sources(), 3, probes=bank).measure(model, update_index=2)
    parameters = dict(model.named_parameters())
    target = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for probe, weight in (("p", 0.75), ("q", 0.25)):
        gradient, _ = bank.gradient(model, probe, 2, parameters)
        for name, part in gradient.items():
            target[name] += weight * part
    assert found.target_products is not None
    for k, source in enumerate(("a", "b", "c")):
        sums, tokens = sample_losses(model, Sources().draw(source, 3, 2))
        gradients = torch.autograd.grad(sums.sum() / tokens.sum(), list(parameters.values()))
        product = sum(float((one * target[name]).sum()) for one, name in zip(gradients, parameters, strict=True))
        assert found.target_products[k] == pytest.approx(product, rel=1e-6)


def test_bad_settings_are_refused() -> None:
    for settings in ({"ridge": -1.0}, {"ema": 1.0}):
        with pytest.raises(UserError, match=f"matching.{next(iter(settings))}: expected"):
            MatchingStrategy(**settings)
