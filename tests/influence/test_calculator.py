"""Estimators by name against autograd, and what the calculator refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence.calculator import ESTIMATORS, DataInfCalculator, InfluenceCalculator
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.parameters import select_parameters
from tests.influence.tiny_llama import VOCABULARY, Batch, Rows, probe_loader, random_batch, tiny_llama

PROBES = {"low": probe_loader(4, seed=7, high=20), "high": probe_loader(4, seed=8, low=30)}


def rows_of(batch: Batch) -> list[Batch]:
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["labels"]))]


def flat_gradient(model: torch.nn.Module, batch: Batch, *, mean: bool = False) -> torch.Tensor:
    model.eval()
    sums, tokens = sample_losses(model, batch)
    loss = sums.sum() / tokens.sum() if mean else sums.sum()
    parts = torch.autograd.grad(loss, list(select_parameters(model).values()))
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.fixture(scope="module")
def truth() -> dict[str, torch.Tensor]:
    """Of a tied model in float64: sample gradients ``[5, P]``, probe gradients ``[2, P]``."""
    model = tiny_llama()
    samples = torch.stack([flat_gradient(model, row) for row in rows_of(random_batch(5, seed=3))])
    whole = [probe.dataset.batch for probe in PROBES.values()]  # type: ignore[attr-defined]
    return {"samples": samples, "probes": torch.stack([flat_gradient(model, batch, mean=True) for batch in whole])}


@pytest.mark.parametrize("scorer", ["hook", "forward"])
def test_dot_is_the_product_of_gradients(scorer: Any, truth: dict[str, torch.Tensor]) -> None:
    calculator = InfluenceCalculator(tiny_llama(), PROBES, "dot", scorer=scorer)
    calculator.fit([])  # nothing to fit
    calculator.refresh()
    found = calculator.score(random_batch(5, seed=3))
    # One-sided differences have an error in proportion to their step.
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if scorer == "hook" else {"rtol": 0.01, "atol": 0.02}
    torch.testing.assert_close(found.scores, truth["samples"] @ truth["probes"].T, **tolerance)
    assert calculator.columns == ("low", "high")


def test_cosine_and_self(truth: dict[str, torch.Tensor]) -> None:
    calculator = InfluenceCalculator(tiny_llama(), PROBES, "cosine")
    calculator.refresh()
    expected = torch.nn.functional.cosine_similarity(truth["samples"][:, None], truth["probes"][None], dim=2)
    torch.testing.assert_close(calculator.score(random_batch(5, seed=3)).scores, expected)
    alone = InfluenceCalculator(tiny_llama(), estimator="self").score(random_batch(5, seed=3))
    torch.testing.assert_close(alone.scores[:, 0], (truth["samples"] ** 2).sum(1))


def test_documents_add_up_to_their_samples() -> None:
    scores = {}
    for by in ("sample", "document"):
        calculator = InfluenceCalculator(tiny_llama(), PROBES, "dot", by=by)  # type: ignore[arg-type]
        calculator.refresh()
        scores[by] = calculator.score(random_batch(5, seed=3)).scores
    assert len(scores["document"]) > len(scores["sample"])
    torch.testing.assert_close(scores["document"].sum(0), scores["sample"].sum(0))


def test_sources_are_token_means_with_errors(truth: dict[str, torch.Tensor]) -> None:
    batch = random_batch(5, seed=3) | {"source": torch.tensor([0, 2, 0, 2, 2])}
    parts = [{name: value[cut] for name, value in batch.items()} for cut in (slice(0, 2), slice(2, 5))]
    calculator = InfluenceCalculator(tiny_llama(), PROBES, "dot")
    calculator.refresh()
    found = calculator.score_sources(parts, ("a", "b", "c"))
    scores = truth["samples"] @ truth["probes"].T
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    for source, number in {"a": 0, "c": 2}.items():
        rows = batch["source"] == number
        expected = float(scores[rows, 1].sum() / tokens[rows].sum())
        assert found["high"][source][0] == pytest.approx(expected, rel=1e-9)
        assert found["high"][source][1] > 0
    assert all(math.isnan(value) for value in found["low"]["b"])  # it did not come


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"dot", "cosine", "self"}))
def test_every_estimator_prefers_its_own_kind(estimator: str) -> None:
    """Samples of the probe's own tokens help more, whatever the curvature; and nothing is left behind."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(2):
        sample_losses(model, random_batch(8, seed=seed))[0].sum().backward()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    calculator = InfluenceCalculator(model, PROBES, estimator, optimizer=optimizer)
    calculator.fit([random_batch(6, seed=20), random_batch(6, seed=21)])
    calculator.refresh()
    own, other = random_batch(8, seed=30, high=20), random_batch(8, seed=31, low=30)
    assert calculator.score(own).scores[:, 0].mean() > calculator.score(other).scores[:, 0].mean()
    assert calculator.score(other).scores[:, 1].mean() > calculator.score(own).scores[:, 1].mean()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_directions_serve_for_refresh_every_steps_and_survive_a_resume() -> None:
    model = tiny_llama()
    calculator = InfluenceCalculator(model, PROBES, "cosine", refresh_every=4)
    first = calculator.refresh(8)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert calculator.refresh(11) is first
    again = InfluenceCalculator(model, PROBES, "cosine", refresh_every=4)
    again.load_state_dict(calculator.state_dict())
    resumed = again.refresh(11)
    assert all(torch.equal(resumed.tensors[name], part) for name, part in first.tensors.items())
    later = again.refresh(12)
    assert not torch.equal(later.tensors["model.norm.weight"], first.tensors["model.norm.weight"])


def test_bad_input_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match=r"expected one of dot, .*found 'ekfak'.*ekfac"):
        InfluenceCalculator(model, PROBES, "ekfak")
    with pytest.raises(UserError, match="needs the norms of gradients, found scorer 'forward'"):
        InfluenceCalculator(model, PROBES, "cosine", scorer="forward")
    with pytest.raises(UserError, match="expected the optimizer"):
        InfluenceCalculator(model, PROBES, "adam")
    with pytest.raises(UserError, match="matches none"):
        InfluenceCalculator(model, PROBES, "dot", layers="transformer.*")
    with pytest.raises(UserError, match="at least one probe"):
        DataInfCalculator(model, {})
    with pytest.raises(UserError, match=r"Call refresh\(\) first"):
        InfluenceCalculator(model, PROBES, "dot").score(random_batch(2, seed=1))
    with pytest.raises(UserError, match="fitted before it is applied"):
        DataInfCalculator(model, PROBES).refresh()
    with pytest.raises(UserError, match="at least one batch"):
        InfluenceCalculator(model, estimator="self").score_sources([], ("a",))
    frozen = tiny_llama()
    frozen.requires_grad_(False)
    with pytest.raises(UserError, match="found none with requires_grad"):
        InfluenceCalculator(frozen, PROBES, "dot")


def test_probe_of_another_tokenizer_and_masked_probe_are_refused() -> None:
    foreign = random_batch(4, seed=1)
    foreign["input_ids"] = foreign["input_ids"] + VOCABULARY
    with pytest.raises(UserError, match="vocabulary of 50"):
        InfluenceCalculator(tiny_llama(), {"p": DataLoader(Rows(foreign))}, "dot").refresh()
    masked = random_batch(4, seed=1)
    masked["labels"] = torch.full_like(masked["labels"], -100)
    with pytest.raises(UserError, match="every label masked"):
        InfluenceCalculator(tiny_llama(), {"p": DataLoader(Rows(masked))}, "dot").refresh()


def test_what_was_loaded_is_saved_again_before_it_is_used() -> None:
    model = tiny_llama()
    first, second = (
        InfluenceCalculator(model, PROBES, "layer_scale", refresh_every=5, probe_samples=3) for _ in range(2)
    )
    first.fit([random_batch(3, 1)])
    first.refresh(0)
    second.load_state_dict(first.state_dict())
    made = second.state_dict()["made"]
    assert made is not None
    assert made["made_at"] == 0
