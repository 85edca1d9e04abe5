"""Scores of sources: against autograd, without a trace, and through every kind of model."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank, SourceEstimator
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.parameters import select_parameters
from tests.influence.test_forward import autograd_products
from tests.influence.tiny_llama import VOCABULARY, Batch, Sources, probe_loader, random_batch, tiny_llama


def estimator(probes: Mapping[str, DataLoader[Batch]] | None = None, **options: Any) -> SourceEstimator:
    return SourceEstimator(Sources(), probes or {"p": probe_loader(low=0, high=20)}, **options)


def test_scores_are_token_weighted_means_of_autograd_products() -> None:
    model = tiny_llama().eval()
    probes = {"p": probe_loader(low=0, high=20), "q": probe_loader(low=30, high=50)}
    measured = estimator(probes, source_samples=4, step_size=1e-6).measure(model, update_index=2)
    assert measured.scores.shape == measured.errors.shape == (2, 3)
    assert measured.directions == measured.probes == ("p", "q")
    bank = ProbeBank(probes)
    for row, probe in enumerate(("p", "q")):
        direction, losses = bank.gradient(model, probe, 2, select_parameters(model))
        assert measured.probe_losses[row] == pytest.approx(losses.mean)
        for column, source in enumerate(("a", "b", "c")):
            batch = Sources().draw(source, 4, 2)
            products = autograd_products(model, batch, direction)
            tokens = (batch["labels"] != -100).sum(dim=1)
            score = float(products.sum() / tokens.sum())
            assert measured.scores[row, column] == pytest.approx(score, rel=1e-5)
            residuals = (products - score * tokens).numpy()
            error = np.sqrt(4 / 3 * (residuals**2).sum()) / float(tokens.sum())
            assert measured.errors[row, column] == pytest.approx(error, rel=1e-4)


def test_positive_helps_and_the_source_of_the_probe_s_kind_scores_best() -> None:
    """Sign and meaning, end to end: a small step on the best source lowers the probe's loss by score times step."""
    model = tiny_llama().eval()
    loader = probe_loader(count=12, low=0, high=20)
    measured = estimator({"p": loader}, source_samples=16, probe_samples=12).measure(model, update_index=0)
    assert measured.scores[0].argmax() == 0
    assert measured.scores[0, 0] > 0

    batch = Sources().draw("a", 16, 0)
    sums, tokens = sample_losses(model, batch)
    grads = torch.autograd.grad(sums.sum() / tokens.sum(), list(model.parameters()))
    step = 1e-5
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter -= step * grad
    after = ProbeBank({"p": loader}, samples=12).directions(model, 0, select_parameters(model))[1]["p"].mean
    assert measured.probe_losses[0] - after == pytest.approx(step * measured.scores[0, 0], rel=1e-2)


def test_combined_is_the_weighted_sum_of_the_probes() -> None:
    model = tiny_llama().eval()
    probes = {"p": probe_loader(low=0, high=20), "q": probe_loader(low=30, high=50)}
    weights = {"p": 3.0, "q": 1.0}
    apart = estimator(probes, probe_weights=weights).measure(model, update_index=0)
    together = estimator(probes, probe_weights=weights, combine=True).measure(model, update_index=0)
    assert together.directions == ("combined",)
    assert together.direction_weights.tolist() == [1.0]
    assert apart.direction_weights.tolist() == [0.75, 0.25]
    np.testing.assert_allclose(together.scores[0], apart.direction_weights @ apart.scores, rtol=1e-5)
    np.testing.assert_allclose(together.probe_losses, apart.probe_losses)


def test_the_change_of_the_probe_s_loss_is_that_on_the_common_samples() -> None:
    model = tiny_llama().eval()
    loader = probe_loader(count=9)
    measure = estimator({"p": loader}, probe_samples=6)
    assert np.isnan(measure.measure(model, update_index=0).probe_changes[0])
    saved = json.loads(json.dumps(measure.state_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.9
    found = measure.measure(model, update_index=1).probe_changes[0]
    common = [loader.dataset[index] for index in (2, 3, 4, 5)]
    batch = {name: torch.stack([row[name] for row in common]) for name in common[0]}
    before, tokens = sample_losses(tiny_llama().eval(), batch)
    after, _ = sample_losses(model, batch)
    assert found == pytest.approx(float((after - before).sum() / tokens.sum()), rel=1e-9)

    resumed = estimator({"p": loader}, probe_samples=6)
    resumed.load_state_dict(saved)
    assert resumed.measure(model, update_index=1).probe_changes[0] == found


def test_samples_follow_the_update_index_alone() -> None:
    model = tiny_llama().eval()
    first = estimator().measure(model, update_index=4)
    again = estimator().measure(model, update_index=4, microbatch_size=2)
    np.testing.assert_allclose(first.scores, again.scores, rtol=1e-7)
    assert not np.allclose(first.scores, estimator().measure(model, update_index=5).scores)
    assert not np.allclose(first.scores, estimator(seed=1).measure(model, update_index=4).scores)


def test_adam_metric_scales_each_parameter() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sample_losses(model, random_batch(4, 0))[0].sum().backward()
    optimizer.step()
    measured = estimator(metric="adam").measure(model, optimizer, update_index=0)
    raw = estimator().measure(model, optimizer, update_index=0)
    assert np.isfinite(measured.scores).all()
    assert not np.allclose(measured.scores / raw.scores, (measured.scores / raw.scores)[0, 0])
    with pytest.raises(UserError, match="expected the optimizer, found none"):
        estimator(metric="adam").measure(model, update_index=0)


# ---- no trace ----------------------------------------------------------------------------------------------
def test_measuring_leaves_no_trace() -> None:
    """Parameters, gradients, flags, modes, generators and optimizer are afterwards as before, bit for bit."""
    model = tiny_llama(dtype=torch.float32).train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sample_losses(model, random_batch(4, 0))[0].sum().backward()
    optimizer.step()

    def trace() -> list[Any]:
        # Cloned: `state_dict` hands out the tensors themselves.
        moments = [
            value.clone() if torch.is_tensor(value) else value
            for state in optimizer.state.values()
            for value in state.values()
        ]
        return [
            *(value.clone() for value in model.state_dict().values()),
            *(None if p.grad is None else p.grad.clone() for p in model.parameters()),
            *moments,
            [p.requires_grad for p in model.parameters()],
            [module.training for module in model.modules()],
            torch.get_rng_state().clone(),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
            torch.backends.cuda.matmul.allow_tf32,
            torch.is_grad_enabled(),
        ]

    before = trace()
    for metric in ("raw", "adam"):
        estimator(metric=metric).measure(model, optimizer, update_index=0)
    for old, new in zip(before, trace(), strict=True):
        assert torch.equal(old, new) if torch.is_tensor(old) else old == new


def test_a_run_with_measurements_is_the_run_without() -> None:
    """Three training steps with dropout on, with and without a measurement after each: the same weights to the bit."""

    def run(measure: bool) -> list[torch.Tensor]:
        model = tiny_llama(dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        look = estimator()
        for step in range(3):
            optimizer.zero_grad()
            sample_losses(model, random_batch(4, step))[0].sum().backward()
            optimizer.step()
            if measure:
                look.measure(model, optimizer, update_index=step)
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


# ---- models ------------------------------------------------------------------------------------------------
class BatchModel(nn.Module):
    """Called with the batch, as Composer models are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        outputs = self.inner(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        return {"logits": outputs.logits}


def test_models_that_take_the_batch_score_the_same() -> None:
    model = tiny_llama().eval()
    plain = estimator().measure(model, update_index=0)
    wrapped = estimator().measure(BatchModel(model), update_index=0)
    np.testing.assert_array_equal(plain.scores, wrapped.scores)


def test_documents_packed_together_do_not_see_each_other() -> None:
    """A sample's loss does not change when the text of another document in its row does."""
    model = tiny_llama().eval()
    batch = random_batch(1, 3)
    cut = int((batch["position_ids"][0] == 0).nonzero()[1])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :cut] = (other["input_ids"][0, :cut] + 1) % VOCABULARY
    first_only = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    first_only["labels"][0, cut + 1 :] = batch["labels"][0, cut + 1 :]
    changed = {**other, "labels": first_only["labels"]}
    assert sample_losses(model, first_only)[0].item() == pytest.approx(sample_losses(model, changed)[0].item())


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=r"in float32, found model\.embed_tokens\.weight in torch\.bf"):
        estimator().measure(tiny_llama(dtype=torch.bfloat16), update_index=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, "needs the norm of each source's gradient"),
        ({"metric": "rav"}, r"expected one of raw, adam, .* ekfac, found 'rav'\. Did you mean 'raw'"),
        ({"source_samples": 1}, "expected at least 2"),
        ({"step_size": 0.0}, "expected a relative step"),
        ({"probe_samples": 0}, "expected at least 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimator(**options)
