"""Probe gradients equal plain backward passes, windows slide as documented, Adam's direction is Adam's."""

from __future__ import annotations

import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank, adam_direction
from cheapertraining.influence.probes import rank_rows
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
    gradient, losses = bank.gradient(model, "p", 3, microbatch_size)
    window = [loader.dataset[index] for index in bank.window("p", 3)]
    batch = {name: torch.stack([row[name] for row in window]) for name in window[0]}
    for found, expected in zip(gradient, backward_gradient(model, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
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
    one, _ = ProbeBank({"p": loader}, samples=4).gradient(model, "p", 0)
    other, _ = ProbeBank({"p": plain}, samples=4).gradient(model, "p", 0)
    assert dataset.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_frozen_parameters_have_no_direction() -> None:
    model = tiny_llama().eval()
    model.model.layers[0].requires_grad_(False)
    gradient, _ = ProbeBank({"p": probe_loader()}).gradient(model, "p", 0)
    assert len(gradient) == sum(parameter.requires_grad for parameter in model.parameters())


def test_adam_s_direction_is_the_step_that_adam_would_take_without_momentum() -> None:
    """Reference: torch's own Adam with beta1 = 0, stepped once with the probe's gradient at frozen second moments."""
    model = tiny_llama().eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        batch = random_batch(4, step)
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    bank = ProbeBank({"p": probe_loader()})
    gradient, _ = bank.gradient(model, "p", 0)
    direction = adam_direction(model, [part.clone() for part in gradient], optimizer)
    for parameter, part, found in zip(model.parameters(), gradient, direction, strict=True):
        state = optimizer.state[parameter]
        corrected = state["exp_avg_sq"] / (1 - 0.95 ** float(state["step"]))
        torch.testing.assert_close(found, part / (corrected.sqrt() + 1e-8))


def test_adam_s_direction_needs_adam() -> None:
    model = tiny_llama()
    gradient = [torch.ones_like(parameter) for parameter in model.parameters()]
    with pytest.raises(UserError, match=r"expected an optimizer with Adam's second moments .* found SGD"):
        adam_direction(model, gradient, torch.optim.SGD(model.parameters(), lr=0.1))


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
