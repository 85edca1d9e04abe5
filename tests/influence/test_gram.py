"""Moments of the sources' gradients: against autograd, in parts, and without a trace; and the probes' losses alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.scorers.gram import GradientEstimator
from tests.influence.tiny_llama import Sources, probe_loader, tiny_llama


def test_products_norms_and_variances_are_those_of_autograd() -> None:
    model = tiny_llama().eval()
    found = GradientEstimator(Sources(), 3, seed=1).measure(model, update_index=2)
    means, variances = [], []
    for source in found.sources:
        sums, tokens = sample_losses(model, Sources().draw(source, 3, (1 << 32) + 2))
        rows = []
        for total in sums:
            grads = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([grad.reshape(-1) for grad in grads]).numpy())
        gradients, lengths = np.array(rows), tokens.numpy()
        mean = gradients.sum(axis=0) / lengths.sum()
        residuals = gradients - lengths[:, None] * mean
        means.append(mean)
        variances.append(9 / 2 * (residuals**2).sum() / lengths.sum() ** 2)
    products = np.array(means) @ np.array(means).T
    np.testing.assert_allclose(found.products, products, rtol=1e-8)
    np.testing.assert_allclose(found.variances, variances, rtol=1e-8)
    np.testing.assert_allclose(found.squared_norms, np.diag(products) - np.array(variances) / 3, rtol=1e-6)


@pytest.mark.parametrize("size", [4, 5, 100])
def test_microbatches_do_not_matter_and_nothing_stays_behind(size: int) -> None:
    model = tiny_llama()
    estimator, before = GradientEstimator(Sources(), 3), torch.get_rng_state()
    whole = estimator.measure(model, update_index=0)
    parts = estimator.measure(model, update_index=0, microbatch_size=size)
    np.testing.assert_allclose(parts.products, whole.products, rtol=1e-9)
    np.testing.assert_allclose(parts.errors, whole.errors, rtol=1e-6)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_one_sample_has_no_variance() -> None:
    with pytest.raises(UserError, match="expected at least 2"):
        GradientEstimator(Sources(), 1)


def test_losses_alone_are_those_of_a_direction() -> None:
    model = tiny_llama()
    bank = ProbeBank({"p": probe_loader(low=0, high=20), "q": probe_loader(low=30, high=50)}, samples=5)
    alone = bank.losses(model, 3, 2)
    _, beside = bank.directions(model, 3, select_parameters(model))
    for name in ("p", "q"):
        assert alone[name].indices == beside[name].indices
        np.testing.assert_allclose(alone[name].sums, beside[name].sums, rtol=1e-12)
        np.testing.assert_array_equal(alone[name].tokens, beside[name].tokens)
    assert model.training
