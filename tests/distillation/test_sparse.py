"""Targets of a few tokens: what they keep of the whole distribution, and what they do to a student."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cheapertraining.distillation import (
    DIVERGENCES,
    DenseTargets,
    Divergence,
    SampledTargets,
    Targets,
    TopKTargets,
    distillation_loss,
    renormalized,
    sample_targets,
    top_k_targets,
)
from cheapertraining.errors import UserError

VOCABULARY = 13
REPEATS, STEPS = 32, 100


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _labels(rows: int, length: int) -> Tensor:
    labels = torch.randint(VOCABULARY, (rows, length), generator=_generator(3))
    labels[:, 0] = -100
    return labels


def _gradient(z: Tensor, targets: Targets, **options: object) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = distillation_loss(z, targets, _labels(*z.shape[:2]), alpha=1.0, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss.total, z)
    return loss.divergence, gradient


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_are_the_whole_distribution(name: str) -> None:
    z, t = _draw(2, 5, VOCABULARY, seed=1), _draw(2, 5, VOCABULARY, seed=2)
    whole, gradient = _gradient(z, DenseTargets(t), divergence=Divergence(name))
    value, sparse = _gradient(z, top_k_targets(t, VOCABULARY), divergence=Divergence(name))
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(sparse, gradient)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_is_a_lower_bound_that_grows(name: str) -> None:
    z, t = _draw(2, 5, VOCABULARY, seed=1), _draw(2, 5, VOCABULARY, seed=2)
    values = [_gradient(z, top_k_targets(t, k), divergence=Divergence(name))[0] for k in (1, 4, 12)]
    whole, _ = _gradient(z, DenseTargets(t), divergence=Divergence(name))
    assert 0 <= values[0] < values[1] < values[2] <= whole + 1e-12


def test_top_k_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), the first kept: KL of (1/2, 1/2) from a student's (1/4, 3/4)."""
    t, z = torch.tensor([2.0, 1.0, 1.0]).log(), torch.tensor([1.0, 1.0, 2.0]).log()
    targets = top_k_targets(t.expand(1, 2, 3), 1)
    torch.testing.assert_close(targets.tail, torch.full((1, 2), math.log(0.5)))
    logits = z.expand(1, 2, 3).contiguous().requires_grad_()
    labels = torch.tensor([[-100, 0]])
    loss = distillation_loss(logits, targets, labels, alpha=1.0)
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert loss.divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    # i kept: q_i - p_i; others: q_j (1 - p_t / q_t) = q_j / 3.
    torch.testing.assert_close(gradient[0, 0], torch.tensor([-1 / 4, 1 / 12, 1 / 6]))


def test_tail_is_exact_where_one_minus_the_sum_is_rounding() -> None:
    targets = top_k_targets(torch.tensor([[[40.0, 0.0, -1.0]]]), 1)
    assert targets.tail.item() == pytest.approx(math.log(1 + math.exp(-1)) - 40, rel=1e-6)


def test_sampled_gradient_is_unbiased() -> None:
    """The mean over many draws lies within its own interval (99.99 %, all entries at once) of the whole gradient."""
    z, t = _draw(1, 2, VOCABULARY, seed=1), _draw(1, 2, VOCABULARY, seed=2)
    _, gradient = _gradient(z, DenseTargets(t))
    q, p = z[0, 0].softmax(dim=-1), t[0, 0].softmax(dim=-1)
    draws, rounds = 20_000, 12
    targets = sample_targets(t[:, :1].expand(draws, 1, VOCABULARY), rounds, _generator(5))
    weights = torch.zeros(draws, VOCABULARY, dtype=torch.float64).scatter_add(
        1, targets.ids[:, 0], targets.weights[:, 0]
    )
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(draws, dtype=torch.float64))
    mean, error = (q - weights).mean(dim=0), weights.std(dim=0) / math.sqrt(draws)
    torch.testing.assert_close(gradient[0, 0], q - p)
    assert ((mean - gradient[0, 0]).abs() < 4.5 * error).all()
    # The spread is that of a multinomial of 12 rounds, not less: draws are independent.
    torch.testing.assert_close(weights.var(dim=0), p * (1 - p) / rounds, rtol=0.1, atol=1e-5)
    # One target's gradient is q - t.
    one = SampledTargets(targets.ids[:1].expand(1, 2, -1), targets.weights[:1].expand(1, 2, -1))
    torch.testing.assert_close(_gradient(z, one)[1][0, 0], q - weights[0])


def test_proposal_weights_are_importance_weights() -> None:
    t = _draw(1, 1, VOCABULARY, seed=2)
    p = t[0, 0].softmax(dim=-1)
    targets = sample_targets(t.expand(4000, 1, VOCABULARY), 200, _generator(5), proposal_temperature=1.5)
    weights = torch.zeros(4000, VOCABULARY, dtype=torch.float64).scatter_add(
        1, targets.ids[:, 0], targets.weights[:, 0]
    )
    # Self-normalised: a bias of order 1 / rounds, beside an error of the mean of 1e-3.
    torch.testing.assert_close(weights.mean(dim=0), p, rtol=0, atol=3e-3)


def test_sampling_is_seeded_and_merged() -> None:
    t = _draw(2, 3, VOCABULARY)
    one, again = (sample_targets(t, 50, _generator(1)) for _ in range(2))
    other = sample_targets(t, 50, _generator(2))
    assert torch.equal(one.ids, again.ids)
    assert torch.equal(one.weights, again.weights)
    assert not torch.equal(one.weights, other.weights[..., : one.weights.shape[-1]])
    for ids, weights in zip(one.ids.flatten(0, 1), one.weights.flatten(0, 1), strict=True):
        used = ids[weights > 0]
        assert len(used.unique()) == len(used)
        torch.testing.assert_close((weights * 50).round(), weights * 50)


def test_reverse_kl_needs_a_tail() -> None:
    z, targets = _draw(1, 4, VOCABULARY, seed=1), renormalized(top_k_targets(_draw(1, 4, VOCABULARY, seed=2), 3))
    with pytest.raises(UserError, match="reverse_kl of truncated targets is infinite"):
        _gradient(z, targets, divergence=Divergence("reverse_kl"))
    value, gradient = _gradient(z, targets, divergence=Divergence("skew_reverse_kl"))
    assert value.isfinite()
    assert gradient.isfinite().all()


def _changed(targets: TopKTargets, **tensors: Tensor) -> TopKTargets:
    return TopKTargets(**{"ids": targets.ids, "log_probs": targets.log_probs, "tail": targets.tail, **tensors})


def test_bad_targets_are_refused() -> None:
    z, t = _draw(1, 4, VOCABULARY, seed=1), _draw(1, 4, VOCABULARY, seed=2)
    good = top_k_targets(t, 3)
    cases = {
        "expected 1 to 13 .*, found 14": lambda: top_k_targets(t, 14),
        "hold 14 tokens a position, but the vocabulary has 13": lambda: _gradient(
            z, top_k_targets(_draw(1, 4, 20, seed=2), 14)
        ),
        "expected token ids from 0 to 12, found 0 to 13": lambda: _gradient(
            z, _changed(good, ids=torch.tensor([0, 1, 13]).expand(1, 4, 3))
        ),
        "found NaN or another sum at 3 of 3": lambda: _gradient(z, _changed(good, log_probs=good.log_probs * math.nan)),
        "sum to 1 with the tail, found NaN or another": lambda: _gradient(z, _changed(good, tail=good.tail - 9)),
        "rounds: expected at least 1": lambda: sample_targets(t, 0, _generator()),
        "logits have NaN": lambda: sample_targets(t * math.nan, 5, _generator()),
        "weights that sum to 1, found 3 of 3": lambda: _gradient(
            z, SampledTargets(good.ids, torch.zeros_like(good.log_probs))
        ),
        "found -1 to": lambda: _gradient(
            z, SampledTargets(good.ids.clamp(max=0) - 1, torch.full_like(good.log_probs, 1 / 3))
        ),
    }
    for message, run in cases.items():
        with pytest.raises(UserError, match=message):
            run()


def _trained(t: Tensor, make: Callable[[Tensor], Targets]) -> tuple[float, float]:
    """KL from the teachers, and mass on their first 12 tokens, of a table of logits trained on fresh targets."""
    z = torch.zeros_like(t, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    # Many draws a step: what is left over is bias.
    teacher = t.repeat(REPEATS, 1)[:, None].expand(-1, 2, -1)
    labels = torch.tensor([[-100, 0]]).expand(len(teacher), 2)
    for _ in range(STEPS):
        logits = z.repeat(REPEATS, 1)[:, None].expand(-1, 2, -1)
        optimizer.zero_grad()
        distillation_loss(logits, make(teacher), labels, alpha=1.0).total.backward()
        optimizer.step()
        schedule.step()
    log_p, log_q = t.log_softmax(dim=-1), z.detach().log_softmax(dim=-1)
    head = log_q.gather(1, t.topk(12, dim=-1).indices).exp().sum(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item(), head.mean().item()


def test_bias_of_sparse_targets() -> None:
    """Zipf teachers over 200 tokens, twelve kept or 50 rounds drawn: renormalised top-k puts all mass on what it keeps,
    sampling finds the whole distribution, the tail bucket finds its mass but not its shape."""
    orders = torch.stack([torch.randperm(200, generator=_generator(seed)) for seed in range(4)])
    t = (-1.2 * torch.arange(1, 201, dtype=torch.float32).log()).expand(4, 200).gather(1, orders)
    truth = t.softmax(dim=-1).topk(12, dim=-1).values.sum(dim=-1).mean().item()
    kept = top_k_targets(t.repeat(REPEATS, 1)[:, None].expand(-1, 2, -1), 12)
    generator = _generator(9)
    full = _trained(t, DenseTargets)
    sampled = _trained(t, lambda logits: sample_targets(logits, 50, generator))
    tail = _trained(t, lambda _: kept)
    biased = _trained(t, lambda _: renormalized(kept))
    assert full[0] < 0.001
    assert sampled[0] < 0.01
    assert abs(sampled[1] - truth) < 0.02
    assert abs(tail[1] - truth) < 0.02
    assert tail[0] > 10 * sampled[0]
    assert biased[1] > 0.98
    assert biased[0] > 50 * sampled[0]
