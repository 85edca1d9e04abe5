"""Scores of sources from accumulated gradients: against autograd; batches cut by source."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer, source_microbatches
from tests.influence.test_forward import autograd_products
from tests.influence.tiny_llama import Batch, probe_loader, random_batch, tiny_llama

NAMES = ("a", "b", "c", "never")


def mixed_batch(count: int, seed: int = 3) -> Batch:
    return {**random_batch(count, seed), "source": torch.arange(count) * 7 % 3}


def directions_of(model: nn.Module, layers: str = "all") -> Directions:
    loaders = {"p": probe_loader(), "q": probe_loader(low=0, high=20)}
    return ProbeBank(loaders).directions(model, 0, select_parameters(model, layers))[0]


def accumulate(model: nn.Module, scorer: MicrobatchScorer, batch: Batch, size: int) -> None:
    """One step's passes, each microbatch's mean weighted by its tokens, as Composer weights them."""
    every = int((batch["labels"][:, 1:] != -100).sum())
    scorer.begin()
    for part in source_microbatches(batch, size):
        sums, tokens = sample_losses(model, part)
        (sums.sum() / every).backward()
        scorer.mark(int(part["source"][0]), tokens.sum(), 1 / every)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_scores_equal_sums_of_autograd_products(dtype: torch.dtype, error: float) -> None:
    model, batches = tiny_llama(dtype=dtype).eval(), [mixed_batch(11), mixed_batch(10, seed=4)]
    directions = directions_of(model)
    scorer = MicrobatchScorer(model, directions, NAMES)
    for batch in batches:
        model.zero_grad()
        accumulate(model, scorer, batch, 2)
    found = scorer.collect()

    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    assert found.directions == ("p", "q")
    assert found.microbatches.tolist() == [4, 4, 4, 0]
    for k in range(2):
        products = autograd_products(model, batch, {n: part[k] for n, part in directions.tensors.items()}).double()
        for source in range(3):
            mine = batch["source"] == source
            tokens = (batch["labels"][mine] != -100).sum()
            assert found.tokens[source] == tokens
            assert float(found.sums[source, k]) == pytest.approx(float(products[mine].sum()), rel=error, abs=error)
            assert float(found.means[source, k]) == pytest.approx(
                float(products[mine].sum() / tokens), rel=error, abs=error
            )
    assert found.means[3].isnan().all()


def test_errors_are_those_of_a_ratio_over_microbatches() -> None:
    model, batch = tiny_llama().eval(), mixed_batch(12)
    scorer = MicrobatchScorer(model, directions_of(model), NAMES)
    sums, tokens = [], []
    for part in source_microbatches(batch, 1):
        accumulate(model, scorer, part, 1)
        if part["source"] == 1:
            one = scorer.collect()
            sums.append(one.sums[1])
            tokens.append(one.tokens[1])
            assert one.errors[1].isnan().all()
        else:
            scorer.collect()
    model.zero_grad()
    accumulate(model, scorer, batch, 1)
    found = scorer.collect()
    values, lengths = torch.stack(sums), torch.stack(tokens).double()
    mean = values.sum(0) / lengths.sum()
    residuals = values - mean * lengths[:, None]
    expected = (4 / 3 * (residuals**2).sum(0)).sqrt() / lengths.sum()
    torch.testing.assert_close(found.errors[1], expected)


def test_steps_may_start_from_gradients_and_layers_be_left_out() -> None:
    model, batch = tiny_llama().eval(), mixed_batch(4)
    directions = directions_of(model, "last_1")
    sample_losses(model, random_batch(2, 9))[0].sum().backward()
    scorer = MicrobatchScorer(model, directions, NAMES)
    accumulate(model, scorer, batch, 2)
    whole = {name: torch.zeros_like(parameter) for name, parameter in select_parameters(model).items()}
    products = autograd_products(model, batch, whole | {n: part[0] for n, part in directions.tensors.items()})
    found = scorer.collect()
    assert float(found.sums[0, 0]) == pytest.approx(float(products[batch["source"] == 0].sum()), rel=1e-9)


def test_training_gradients_are_those_without_a_scorer() -> None:
    plain, watched, batch = tiny_llama().eval(), tiny_llama().eval(), mixed_batch(6)
    accumulate(watched, MicrobatchScorer(watched, directions_of(watched), NAMES), batch, 2)
    every = int((batch["labels"][:, 1:] != -100).sum())
    for part in source_microbatches(batch, 2):
        (sample_losses(plain, part)[0].sum() / every).backward()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_masked_microbatches_count_nothing() -> None:
    model, batch = tiny_llama().eval(), mixed_batch(3)
    scorer = MicrobatchScorer(model, directions_of(model), NAMES)
    scorer.begin()
    for source, masked in ((0, False), (0, True), (1, True)):
        part = {**batch, "labels": torch.full_like(batch["labels"], -100)} if masked else batch
        sums, tokens = sample_losses(model, part)
        sums.sum().backward()
        scorer.mark(source, tokens.sum())
    found = scorer.collect()
    assert found.microbatches.tolist() == [1, 0, 0, 0]
    assert found.sums[1].tolist() == [0, 0]
    assert found.means[0].isfinite().all()


def test_a_step_has_to_begin() -> None:
    model = tiny_llama()
    scorer = MicrobatchScorer(model, directions_of(model), NAMES)
    with pytest.raises(UserError, match=r"expected begin\(\) before"):
        scorer.mark(0, 5)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"trainable parameters, found 'model\.norm\.weight'"):
        MicrobatchScorer(model, directions_of(tiny_llama()), NAMES)


# ---- cutting -----------------------------------------------------------------------------------------------
def test_microbatches_hold_one_source_and_every_row_once() -> None:
    batch = {**mixed_batch(11), "sample_id": torch.arange(11)}
    parts = source_microbatches({**batch, "note": "kept"}, 3)
    assert [part["source"].tolist() for part in parts] == [[0, 0, 0], [0], [1, 1, 1], [1], [2, 2, 2]]
    assert sorted(torch.cat([part["sample_id"] for part in parts]).tolist()) == list(range(11))
    for part in parts:
        assert torch.equal(part["input_ids"], batch["input_ids"][part["sample_id"]])
        assert part["sample_id"].tolist() == sorted(part["sample_id"].tolist())
        assert part["note"] == "kept"


def test_batches_without_sources_are_refused() -> None:
    with pytest.raises(UserError, match="expected 'source' in the batch, found input_ids, labels, position_ids"):
        source_microbatches(random_batch(2, 0), 1)
