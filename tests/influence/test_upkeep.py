"""K-FAC and EK-FAC kept up during training: what passes by is what a fit sees, and training does not notice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import token_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners import EKFAC, KFAC, Schedule, upkeep
from cheapertraining.influence.preconditioners.factors import Basis, Sums
from cheapertraining.influence.scorers.fused import FusedScorer
from tests.influence.tiny_llama import Batch, random_batch, tiny_llama

WHOLE = Schedule(fraction=1.0, decay=1.0)


def backward(model: nn.Module, batch: Batch, scale: float) -> None:
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    (token_losses(logits, batch["labels"])[0].sum() * scale).backward()


def some_directions(parameters: dict[str, nn.Parameter]) -> Directions:
    g = torch.Generator().manual_seed(5)
    return Directions(("p",), {n: torch.randn(1, *p.shape, generator=g, dtype=p.dtype) for n, p in parameters.items()})


def close(found: Directions, expected: Directions, rtol: float = 1e-7) -> None:
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=rtol, atol=rtol * float(tensor.abs().max()))


@pytest.mark.parametrize("accumulated", [False, True])
def test_observed_microbatches_are_what_a_fit_sees(accumulated: bool) -> None:
    model = tiny_llama().eval()  # without dropout, which a fit leaves out
    parameters = select_parameters(model)
    batches = [random_batch(4, 1), random_batch(4, 2)]
    kept = KFAC(parameters, schedule=WHOLE)
    for batch in batches:
        with kept.observing(model, batch, loss_scale=1 / 64):
            backward(model, batch, 1 / 64)
        if not accumulated:
            model.zero_grad()
    u = some_directions(parameters)
    close(kept.apply(u), KFAC(parameters, labels="given").fit(model, batches).apply(u))


def test_training_gradients_stay_as_they_are() -> None:
    batch = random_batch(4, 1)
    found: list[dict[str, torch.Tensor]] = []
    for observed in (False, True):
        model = tiny_llama().train()
        torch.manual_seed(3)
        if observed:
            with EKFAC(select_parameters(model)).observing(model, batch, loss_scale=0.1):
                backward(model, batch, 0.1)
        else:
            backward(model, batch, 0.1)
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-12)


def test_lambda_starts_from_kfacs_and_moves_to_what_is_measured() -> None:
    model = tiny_llama(tied=False).eval()
    parameters = select_parameters(model, ["*proj.weight", "lm_head.weight"])
    batch = random_batch(4, 1)
    kept = EKFAC(parameters, schedule=Schedule(fraction=1.0, decay=1.0, first=1, lag=1))
    for _ in range(3):  # two for the factors, the third in the basis of the first, which is due then
        with kept.observing(model, batch):
            backward(model, batch, 1.0)
    state = kept._kept.current()
    kfac, ekfac = (kind(parameters, labels="given").fit(model, [batch])._kept.current() for kind in (KFAC, EKFAC))
    assert state is not None
    assert kfac is not None
    assert ekfac is not None
    for name in parameters:
        prior = torch.outer(kfac[1][name].left_values, kfac[1][name].right_values)
        measured = ekfac[0].tensors[f"squares/{name}"] / 4
        found = state[0].tensors[f"squares/{name}"] / state[0].count("corrected")
        torch.testing.assert_close(found, (2 * prior + measured) / 3, rtol=1e-6, atol=1e-9)


def test_a_part_of_the_rows_takes_its_turn() -> None:
    kept = upkeep.Upkeep(Schedule(fraction=0.25), corrected=True)
    rows = []
    for _ in range(5):
        rows.append(list(range(8))[kept.rows(8)])
        kept.end(Sums())
    assert rows == [[0, 4], [1, 5], [2, 6], [3, 7], [0, 4]]
    assert list(range(2))[kept.rows(2)] == [1]
    assert [step for step in range(40) if EKFAC({}).wants(step)] == [0, 16, 32]


SMALL = Schedule(first=2, refresh=4, lag=2, fraction=0.5)


def trained(model: nn.Module, kept: EKFAC, steps: range) -> None:
    for step in steps:
        batch = random_batch(4, step)
        with kept.observing(model, batch):
            backward(model, batch, 1.0)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 1e-3 * p.grad
        model.zero_grad()


def test_a_new_basis_comes_in_where_it_was_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(sums: Sums) -> dict[str, Basis]:
        time.sleep(0.3)
        return original(sums)

    original = upkeep.decomposed
    model = tiny_llama().eval()
    quick = EKFAC(select_parameters(model, ["*q_proj*"]), schedule=SMALL)
    trained(model, quick, range(9))
    monkeypatch.setattr(upkeep, "decomposed", slowly)
    model = tiny_llama().eval()
    slow = EKFAC(select_parameters(model, ["*q_proj*"]), schedule=SMALL)
    seen: list[Any] = []
    for step in range(9):
        trained(model, slow, range(step, step + 1))
        seen.append(slow._kept._bases.get("model.layers.0.self_attn.q_proj.weight"))
    # Launched after observations 2, 4 (waiting: none new), 8; taken over two observations later.
    changes = [step for step in range(1, 9) if seen[step] is not seen[step - 1]]
    assert changes == [4]
    u = some_directions(slow.parameters)
    close(slow.apply(u), quick.apply(u), 0.0)


@pytest.mark.parametrize("cut", [1, 3, 9])  # before the first basis, while one is pending, after
def test_a_resumed_run_goes_on_as_it_would_have(cut: int, tmp_path: Path) -> None:
    undisturbed, resumed = tiny_llama().eval(), tiny_llama().eval()
    parameters = select_parameters(undisturbed)
    kept = EKFAC(parameters, schedule=SMALL)
    trained(undisturbed, kept, range(12))
    before = EKFAC(select_parameters(resumed), schedule=SMALL)
    trained(resumed, before, range(cut))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after = EKFAC(select_parameters(resumed), schedule=SMALL)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), resumed)
    trained(resumed, after, range(cut, 12))
    u = some_directions(parameters)
    close(after.apply(u), kept.apply(u), 1e-12)
    other = EKFAC(select_parameters(resumed, ["*q_proj*"]))
    with pytest.raises(UserError, match=r"same 2 parameters, found one that differs in 'model\.embed_tokens\.weight'"):
        other.load_state_dict(before.state_dict(), resumed)


def test_it_can_be_applied_at_any_time_after_the_first_observation() -> None:
    model = tiny_llama().eval()
    kept = EKFAC(select_parameters(model))
    with pytest.raises(UserError, match=r"or wrap a training pass in observing"):
        kept.apply(some_directions(kept.parameters))
    trained(model, kept, range(1))
    applied = kept.apply(some_directions(kept.parameters))
    assert all(bool(torch.isfinite(part).all()) and bool(part.any()) for part in applied.tensors.values())


def test_an_observation_that_is_not_finite_teaches_nothing() -> None:
    model = tiny_llama().eval()
    kept = EKFAC(select_parameters(model))
    u = some_directions(kept.parameters)
    batch = random_batch(4, 0)
    with kept.observing(model, batch):
        backward(model, batch, 1.0)
    expected = kept.apply(u)
    with kept.observing(model, batch):
        backward(model, batch, float("inf"))
    close(kept.apply(u), expected, 1e-12)


def test_fused_scores_and_observation_share_a_pass() -> None:
    model, batch = tiny_llama().eval(), random_batch(4, 1)
    parameters = select_parameters(model)
    u = some_directions(parameters)
    alone, both, kept = FusedScorer(model, u), FusedScorer(model, u), KFAC(parameters, schedule=WHOLE)
    with alone.armed(batch):
        backward(model, batch, 1.0)
    with both.armed(batch), kept.observing(model, batch):
        backward(model, batch, 1.0)
    torch.testing.assert_close(both.collect().scores, alone.collect().scores, rtol=1e-10, atol=1e-10)
    close(kept.apply(u), KFAC(parameters, labels="given").fit(model, [batch]).apply(u))


def test_checkpointed_blocks_count_once() -> None:
    model, batch = tiny_llama().train(), random_batch(4, 1)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.0
    parameters = select_parameters(model)
    u, kept = some_directions(parameters), KFAC(parameters, schedule=WHOLE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with kept.observing(model, batch):
        backward(model, batch, 1.0)
    model.gradient_checkpointing_disable()
    close(kept.apply(u), KFAC(parameters, labels="given").fit(model, [batch]).apply(u))


def test_under_autocast_factors_are_nearly_those_in_full_precision() -> None:
    model, batch = tiny_llama(dtype=torch.float32).eval(), random_batch(4, 1)
    parameters = select_parameters(model)
    u, kept = some_directions(parameters), KFAC(parameters, schedule=WHOLE)
    with kept.observing(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        token_losses(logits, batch["labels"])[0].sum().backward()
    expected = KFAC(parameters, labels="given").fit(model, [batch]).apply(u)
    for name, part in kept.apply(u).tensors.items():
        assert part.dtype == torch.float32
        assert torch.cosine_similarity(part.flatten(), expected.tensors[name].flatten(), dim=0) > 0.98


def test_a_pass_without_backward_is_refused() -> None:
    model = tiny_llama()
    kept = EKFAC(select_parameters(model))
    with (
        pytest.raises(UserError, match=r"ekfac\.observing: expected a backward pass inside, found none"),
        kept.observing(model, random_batch(2, 0)),
    ):
        pass


def test_bad_schedules() -> None:
    with pytest.raises(UserError, match=r"schedule\.every: expected at least 1, found 0"):
        Schedule(every=0)
    with pytest.raises(UserError, match=r"fraction and decay above 0 and at most 1, found 0\.0 and 0\.97"):
        Schedule(fraction=0.0)
