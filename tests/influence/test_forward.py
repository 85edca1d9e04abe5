"""Scores from forward passes: against autograd, as the step shrinks, in half precision, by document."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank, forward_scores
from cheapertraining.influence.aggregation import unit_index
from cheapertraining.influence.model_access import model_losses, sample_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers.forward import Method
from tests.influence.tiny_llama import VOCABULARY, Batch, probe_loader, random_batch, tiny_llama


def autograd_products(model: nn.Module, batch: Batch, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Reference: ``<g_i, u>`` by one backward pass for each sample."""
    products = []
    for row in range(len(batch["input_ids"])):
        one = {name: rows[row : row + 1] for name, rows in batch.items()}
        sums, _ = sample_losses(model, one)
        grads = torch.autograd.grad(sums.sum(), list(select_parameters(model).values()))
        products.append(sum((g * u).sum() for g, u in zip(grads, direction.values(), strict=True)))
    return torch.stack(products)


def probe_directions(model: nn.Module, layers: str = "all") -> Directions:
    loaders = {"p": probe_loader(), "q": probe_loader(low=0, high=20)}
    return ProbeBank(loaders).directions(model, 0, select_parameters(model, layers))[0]


def one(directions: Directions, row: int) -> dict[str, torch.Tensor]:
    return {name: part[row] for name, part in directions.tensors.items()}


def reference(model: nn.Module, batch: Batch, directions: Directions) -> torch.Tensor:
    return torch.stack([autograd_products(model, batch, one(directions, k)) for k in range(2)], dim=1)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten().double(), second.flatten().double()]))[0, 1])


@pytest.mark.parametrize(
    ("method", "step_size", "error"), [("central", 1e-6, 1e-6), ("difference", 1e-8, 1e-5), ("jvp", 1.0, 1e-10)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_float64_scores_equal_autograd(method: Method, step_size: float, error: float, tied: bool) -> None:
    model, batch = tiny_llama(tied=tied).eval(), random_batch(8, 7)
    directions = probe_directions(model)
    expected = reference(model, batch, directions)
    found = forward_scores(model.train(), directions, batch, method=method, step_size=step_size)
    assert ((found.scores - expected).abs() / expected.abs().mean()).max() < error
    assert found.tokens.tolist() == (batch["labels"] != -100).sum(dim=1).tolist()


@pytest.mark.parametrize(("method", "order"), [("difference", 1), ("central", 2)])
def test_the_error_falls_with_the_step(method: Method, order: int) -> None:
    """One-sided: with the step itself; central: with its square; until rounding takes over."""
    model, batch = tiny_llama().eval(), random_batch(8, 7)
    directions = probe_directions(model)
    exact = forward_scores(model, directions, batch, method="jvp").scores
    errors = [
        float((forward_scores(model, directions, batch, method=method, step_size=step).scores - exact).norm())
        for step in (4e-4, 2e-4, 1e-4, 1e-14)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.05)
    assert errors[3] > errors[2]


@pytest.mark.parametrize("method", ["difference", "central"])
def test_float32_differences_rank_like_autograd(method: Method) -> None:
    model, batch = tiny_llama(dtype=torch.float32).eval(), random_batch(32, 7)
    directions = probe_directions(model)
    found = forward_scores(model, directions, batch, method=method).scores
    exact = tiny_llama().eval()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    wide = Directions(directions.names, {name: part.double() for name, part in directions.tensors.items()})
    expected = forward_scores(exact, wide, batch, method="jvp").scores
    assert correlation(found[:, 0], expected[:, 0]) > 0.9999
    assert correlation(found[:, 1], expected[:, 1]) > 0.9999


def test_forward_mode_in_bfloat16_is_that_in_float32() -> None:
    model, batch = tiny_llama(dtype=torch.bfloat16).eval(), random_batch(32, 7)
    exact = tiny_llama(dtype=torch.float32).eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    directions = probe_directions(exact)
    found = forward_scores(model, directions, batch, method="jvp").scores
    expected = forward_scores(exact, directions, batch, method="jvp").scores
    assert correlation(found[:, 0], expected[:, 0]) > 0.9999
    with pytest.raises(UserError, match=r"in float32, found model\.embed_tokens\.weight in torch\.bf.* method 'jvp'"):
        forward_scores(model, directions, batch)


@pytest.mark.parametrize(("method", "error"), [("central", 1e-6), ("jvp", 1e-10)])
def test_documents_of_a_row_are_scored_apart(method: Method, error: float) -> None:
    model, batch = tiny_llama().eval(), random_batch(3, 7)
    directions, (units, count) = probe_directions(model), unit_index(batch, "document")
    found = forward_scores(model, directions, batch, method=method, step_size=1e-6, by="document")
    losses, counted = model_losses(model, batch)
    for unit in range(count):
        mine = units == unit
        assert found.tokens[unit] == (counted & mine).sum()
        if not found.tokens[unit]:
            assert found.scores[unit].tolist() == [0, 0]
            continue
        grads = torch.autograd.grad(losses[mine].sum(), list(model.parameters()), retain_graph=True)
        for k in range(2):
            expected = sum((g * u).sum() for g, u in zip(grads, one(directions, k).values(), strict=True))
            assert float(found.scores[unit, k]) == pytest.approx(float(expected), rel=error, abs=error)


@pytest.mark.parametrize("method", ["difference", "central", "jvp"])
def test_directions_over_some_layers(method: Method) -> None:
    model, batch = tiny_llama().eval(), random_batch(4, 7)
    directions = probe_directions(model, "last_1")
    found = forward_scores(model, directions, batch, method=method, step_size=1e-7).scores[:, 0]
    whole = {name: torch.zeros_like(parameter) for name, parameter in select_parameters(model).items()}
    expected = autograd_products(model, batch, whole | one(directions, 0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_known_losses_save_a_pass() -> None:
    model, batch = tiny_llama(dtype=torch.float32).eval(), random_batch(4, 7)
    directions, calls = probe_directions(model), []
    first = forward_scores(model, directions, batch)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = forward_scores(model, directions, batch, base_losses=first.losses)
    assert len(calls) == len(directions.names)
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(first.losses, again.losses)


def test_parameters_come_back_bit_for_bit_even_after_an_error() -> None:
    model = tiny_llama(dtype=torch.float32).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    directions = probe_directions(model)
    forward_scores(model, directions, random_batch(3, 0), step_size=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    broken = {**random_batch(3, 0), "labels": torch.full((3, 24), VOCABULARY + 1)}
    base = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(IndexError):
        forward_scores(model, directions, broken, step_size=1e-2, base_losses=base)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


@pytest.mark.parametrize("method", ["difference", "central", "jvp"])
def test_directions_of_no_length_or_without_end(method: Method) -> None:
    model, batch = tiny_llama().eval(), random_batch(3, 0)
    parts = {
        name: torch.stack([torch.zeros_like(parameter), torch.full_like(parameter, math.nan)])
        for name, parameter in select_parameters(model).items()
    }
    scores = forward_scores(model, Directions(("zero", "bad"), parts), batch, method=method).scores
    assert scores[:, 0].tolist() == [0, 0, 0]
    assert scores[:, 1].isnan().all()


def test_autocast_around_it_does_not_reach_the_perturbed_passes() -> None:
    model = tiny_llama(dtype=torch.float32).eval()
    directions, batch = probe_directions(model), random_batch(6, 1)
    plain = forward_scores(model, directions, batch).scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = forward_scores(model, directions, batch).scores
    assert torch.equal(plain, inside)


def test_unknown_method_and_directions_of_another_model_are_refused() -> None:
    model, batch = tiny_llama(), random_batch(1, 0)
    directions = probe_directions(model)
    with pytest.raises(UserError, match=r"expected method .*, found 'diference'\. Did you mean 'difference'"):
        forward_scores(model, directions, batch, method="diference")  # type: ignore[arg-type]
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"found 'model\.norm\.weight' of shape \(16,\), where .* no such trainable"):
        forward_scores(model, directions, batch)
