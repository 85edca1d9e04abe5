"""Probe gradients equal plain backward passes, windows slide as documented, Adam's direction is Adam's."""

from __future__ import annotations

import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.ranks import rank_rows
from cheapertraining.influence.scorers import COMBINED
from tests.influence.tiny_llama import Rows, probe_loader, random_batch, tiny_llama


def backward_gradient(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Reference: the gradient of the token-mean loss by ``loss.backward()``."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    logits = model(**inputs, use_cache=False).logits  # With a cache, documents of a row would see each other.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    gradient = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_the_mean_loss_on_the_window(microbatch_size: int | None, tied: bool) -> None:
    model = tiny_llama(tied=tied).eval()
    loader = probe_loader()
    bank = ProbeBank({"p": loader}, samples=5)
    directions, every = bank.directions(model, 3, select_parameters(model), microbatch_size)
    losses = every["p"]
    window = [loader.dataset[index] for index in bank.window("p", 3)]
    batch = {name: torch.stack([row[name] for row in window]) for name in window[0]}
    assert directions.names == ("p",)
    for found, expected in zip(directions.tensors.values(), backward_gradient(model, batch), strict=True):
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
    counted = (batch["labels"] != -100).sum(dim=1)
    assert losses.tokens.tolist() == counted.tolist()
    assert losses.indices == bank.window("p", 3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_windows_slide_over_the_whole_split_and_overlap_by_two_thirds() -> None:
    bank = ProbeBank({"p": probe_loader(count=20)}, samples=6)
    seen = [bank.window("p", update) for update in range(10)]
    assert seen[0] == (0, 1, 2, 3, 4, 5)
    assert seen[1] == (2, 3, 4, 5, 6, 7)
    assert seen[9] == (18, 19, 0, 1, 2, 3)
    assert set().union(*map(set, seen)) == set(range(20))
    small = ProbeBank({"p": probe_loader(count=3)}, samples=6)
    assert {tuple(sorted(small.window("p", update))) for update in range(5)} == {(0, 1, 2)}


def test_datasets_that_give_many_rows_at_once_are_asked_once() -> None:
    class ManyRows(Rows):
        calls = 0

        def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
            self.calls += 1
            return [self[index] for index in indices]

    dataset = ManyRows(random_batch(8, 1))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    plain = torch.utils.data.DataLoader(Rows(random_batch(8, 1)), batch_size=2)
    model = tiny_llama().eval()
    one, _ = ProbeBank({"p": loader}, samples=4).directions(model, 0, select_parameters(model))
    other, _ = ProbeBank({"p": plain}, samples=4).directions(model, 0, select_parameters(model))
    assert dataset.calls == 1
    assert all(torch.equal(part, other.tensors[name]) for name, part in one.tensors.items())


def test_directions_are_over_the_selected_layers() -> None:
    model = tiny_llama().eval()
    model.model.layers[0].requires_grad_(False)
    bank = ProbeBank({"p": probe_loader()})
    whole, _ = bank.directions(model, 0, select_parameters(model))
    assert len(whole.tensors) == sum(parameter.requires_grad for parameter in model.parameters())
    some, _ = bank.directions(model, 0, select_parameters(model, "last_1"))
    assert {name.split(".")[2] for name in some.tensors} == {"1"}
    assert all(torch.equal(part, whole.tensors[name]) for name, part in some.tensors.items())


def test_several_probes_and_their_weighted_sum() -> None:
    model, loaders = tiny_llama(), {"p": probe_loader(), "q": probe_loader(seed=7)}
    bank, parameters = ProbeBank(loaders, {"p": 3.0, "q": 1.0}, samples=4), select_parameters(model)
    apart, losses = bank.directions(model, 0, parameters)
    together, _ = bank.directions(model, 0, parameters, combine=True)
    assert apart.names == ("p", "q") == tuple(losses)
    assert together.names == (COMBINED,)
    for name, part in together.tensors.items():
        torch.testing.assert_close(part[0], 0.75 * apart.tensors[name][0] + 0.25 * apart.tensors[name][1])


def test_half_precision_gradients_are_summed_in_float32() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    directions, _ = ProbeBank({"p": probe_loader()}).directions(model, 0, select_parameters(model), 2)
    assert {part.dtype for part in directions.tensors.values()} == {torch.float32}


# ---- refresh -----------------------------------------------------------------------------------------------
def moved(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    return model


def test_directions_are_kept_until_they_are_old_and_over_a_resumption() -> None:
    model = tiny_llama()
    parameters = select_parameters(model)
    bank = ProbeBank({"p": probe_loader()}, samples=6, refresh_every=3)
    first, losses = bank.current(model, 4, parameters)
    assert losses["p"].indices == bank.window("p", 1)
    moved(model, 0.9)
    assert bank.current(model, 6, parameters)[0] is first

    resumed = ProbeBank({"p": probe_loader()}, samples=6, refresh_every=3)
    resumed.load_state_dict(bank.state_dict())
    resumed.load_state_dict(resumed.state_dict())  # Saved again before the first step.
    again, same = resumed.current(model, 6, parameters)
    assert again.names == first.names
    assert all(torch.equal(part, first.tensors[name]) for name, part in again.tensors.items())
    assert same["p"].sums.tolist() == losses["p"].sums.tolist()

    later, losses = resumed.current(model, 7, parameters)
    assert losses["p"].indices == bank.window("p", 2)
    fresh, _ = bank.directions(model, 2, parameters)
    assert all(torch.equal(part, fresh.tensors[name]) for name, part in later.tensors.items())


def test_state_without_directions_or_over_others() -> None:
    model = tiny_llama()
    each = ProbeBank({"p": probe_loader()})
    each.current(model, 0, select_parameters(model))
    assert each.state_dict() == {"version": 1}
    each.load_state_dict(each.state_dict())
    kept = ProbeBank({"p": probe_loader()}, refresh_every=2)
    kept.current(model, 0, select_parameters(model))
    other = ProbeBank({"p": probe_loader()}, refresh_every=2)
    other.load_state_dict(kept.state_dict())
    with pytest.raises(UserError, match=r"saved directions over the 9 parameters of this run, found them over 20"):
        other.current(model, 1, select_parameters(model, "last_1"))


# ---- bad input ---------------------------------------------------------------------------------------------
def test_no_trace_is_left_even_by_a_probe_that_is_refused() -> None:
    model = moved(tiny_llama().train(), float("nan"))
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"data\.probes\.p: expected a finite gradient, found NaN"):
        ProbeBank({"p": probe_loader()}).directions(model, 0, select_parameters(model))
    assert model.training
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert torch.equal(state, torch.get_rng_state())


def test_a_probe_without_labels_is_refused() -> None:
    batch = random_batch(4, 0)
    loader = torch.utils.data.DataLoader(Rows({**batch, "labels": torch.full_like(batch["labels"], -100)}))
    with pytest.raises(UserError, match=r"data\.probes\.p: .* found every label masked in samples 0 to 3"):
        ProbeBank({"p": loader}).directions(tiny_llama(), 0, select_parameters(tiny_llama()))


def test_a_probe_of_another_tokenizer_is_refused() -> None:
    loader = torch.utils.data.DataLoader(Rows(random_batch(4, 0, low=90, high=91)))
    with pytest.raises(
        UserError, match=r"data\.probes\.p: expected token ids from 0 to below .* vocabulary of 50, found 90"
    ):
        ProbeBank({"p": loader}).directions(tiny_llama(), 0, select_parameters(tiny_llama()))


def test_rows_of_one_rank_are_all_rows() -> None:
    assert rank_rows(3) == [(0, 1.0), (1, 1.0), (2, 1.0)]


@pytest.mark.parametrize(
    ("loaders", "weights", "message"),
    [
        ({}, None, "expected at least one probe"),
        ({"p": 4}, {"q": 1.0}, "no probe is named 'q'"),
        ({"p": 4, "q": 4}, {"p": 1.0}, "found none for q"),
        ({"p": 4}, {"p": -1.0}, r"data\.probes\.p\.weight"),
        ({"p": 4}, {"p": 0.0}, "expected a probe with a positive weight"),
    ],
)
def test_bad_probes_are_refused(loaders: dict[str, int], weights: dict[str, float] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProbeBank({name: probe_loader(count) for name, count in loaders.items()}, weights)


def test_an_empty_probe_is_refused() -> None:
    empty = {name: rows[:0] for name, rows in random_batch(1, 0).items()}
    with pytest.raises(UserError, match=r"data\.probes\.p: expected at least one sample"):
        ProbeBank({"p": torch.utils.data.DataLoader(Rows(empty), batch_size=1)})
