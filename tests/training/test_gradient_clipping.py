"""ZClip: scores against the past, cuts what stands out, forgets spikes, the same on every rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.training import ZClip, ZClipStats
from tests.processes import run_on_ranks
from tests.training import sharded_loop


class Gradients:
    """A model whose gradient has a norm of one's choice, spread over two tensors."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 4)
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(parameter.shape, generator=generator) for parameter in self.model.parameters()]
        length = math.sqrt(sum(float(part.square().sum()) for part in direction))
        self.direction = [part / length for part in direction]

    def clip(self, zclip: ZClip, norm: float) -> ZClipStats:
        for parameter, part in zip(self.model.parameters(), self.direction, strict=True):
            parameter.grad = part * norm
        return zclip.clip(self.model)

    def norm(self) -> float:
        return math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in self.model.parameters()))


NORMS = (1.0 + 0.2 * torch.randn(60, generator=torch.Generator().manual_seed(3)).double()).tolist()


@pytest.fixture
def gradients() -> Gradients:
    return Gradients()


def warmed_up(gradients: Gradients, zclip: ZClip | None = None) -> ZClip:
    zclip = zclip or ZClip(z_threshold=3.0, ema_decay=0.99)
    for norm in NORMS:
        gradients.clip(zclip, norm)
    return zclip


@pytest.mark.parametrize("factor", [10.0, 100.0, 1000.0])
def test_a_spike_is_cut_to_the_past_however_large_it_is(gradients: Gradients, factor: float) -> None:
    zclip = warmed_up(gradients)
    mean, std = zclip.ema_mean, math.sqrt(zclip.ema_var)
    stats = gradients.clip(zclip, factor)
    assert stats.was_clipped
    assert stats.raw_norm == pytest.approx(factor, rel=1e-5)
    assert mean < stats.clipped_norm < mean + 3 * std
    assert stats.clipped_norm == pytest.approx(mean + 9 / ((factor - mean) / std) * std, rel=1e-5)
    assert gradients.norm() == pytest.approx(stats.clipped_norm, rel=1e-5)
    for parameter, part in zip(gradients.model.parameters(), gradients.direction, strict=True):
        torch.testing.assert_close(parameter.grad, part * stats.clipped_norm)
    assert (stats.ema_mean, stats.ema_std) == (mean, std)


def test_a_spike_moves_neither_mean_nor_spread(gradients: Gradients) -> None:
    zclip = warmed_up(gradients)
    mean, var = zclip.ema_mean, zclip.ema_var
    for _ in range(5):
        gradients.clip(zclip, 100.0)
    assert zclip.ema_mean == pytest.approx(mean, rel=0.05)
    assert zclip.ema_var <= var
    assert gradients.clip(zclip, 100.0).clipped_norm < mean + 3 * math.sqrt(var)


def test_moments_are_those_of_the_formula(gradients: Gradients) -> None:
    zclip = ZClip(z_threshold=2.0, ema_decay=0.9, warmup_steps=10)
    mean = var = None
    for count, norm in enumerate(NORMS, start=1):
        stats = gradients.clip(zclip, norm)
        if count <= 10:
            assert (stats.was_clipped, stats.z_score, stats.ema_mean) == (False, None, None)
            first = torch.tensor(NORMS[:count], dtype=torch.float64)
            mean, var = float(first.mean()), float(first.var(unbiased=False))
            assert (zclip.ema_mean is None) == (count < 10)
            continue
        score = (norm - mean) / math.sqrt(var)
        kept = mean + 4 / score * math.sqrt(var) if score > 2 else norm
        assert stats.was_clipped == (score > 2)
        mean = 0.9 * mean + 0.1 * kept
        var = 0.9 * var + 0.1 * (kept - mean) ** 2
        assert (zclip.ema_mean, zclip.ema_var) == (pytest.approx(mean, rel=1e-5), pytest.approx(var, rel=1e-4))


def test_ordinary_norms_pass_bit_for_bit(gradients: Gradients) -> None:
    zclip = warmed_up(gradients)
    stats = gradients.clip(zclip, 1.1)
    assert not stats.was_clipped
    assert stats.clipped_norm == stats.raw_norm
    for parameter, part in zip(gradients.model.parameters(), gradients.direction, strict=True):
        assert torch.equal(parameter.grad, part * 1.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["warm-up", "later"])
def test_norms_that_are_not_finite_are_passed_over(gradients: Gradients, bad: float, when: str) -> None:
    zclip = ZClip() if when == "warm-up" else warmed_up(gradients)
    before = json.dumps(zclip.state_dict())
    stats = gradients.clip(zclip, bad)
    assert not math.isfinite(stats.raw_norm)
    assert not stats.was_clipped
    assert json.dumps(zclip.state_dict()) == before
    warmed_up(gradients, zclip)
    assert gradients.clip(zclip, 50.0).clipped_norm < 2.0


@pytest.mark.parametrize("at", [7, 40])
def test_resumed_clipping_goes_on_the_same(gradients: Gradients, at: int) -> None:
    whole, resumed = ZClip(), ZClip()
    for norm in NORMS[:at]:
        gradients.clip(whole, norm)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for norm in [*NORMS[at:], 30.0, 1.0]:
        assert gradients.clip(whole, norm) == gradients.clip(resumed, norm)
    assert whole.state_dict() == resumed.state_dict()


def test_a_model_without_gradients_has_norm_zero() -> None:
    stats = ZClip().clip(nn.Linear(2, 2))
    assert (stats.raw_norm, stats.was_clipped) == (0.0, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"z_threshold": 0}, "z_threshold: expected a positive number"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number between 0 and 1"),
        ({"warmup_steps": 1}, "warmup_steps: expected at least 2"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ZClip(**settings)


@pytest.mark.slow
def test_shards_are_clipped_by_the_norm_of_the_whole(tmp_path: Path) -> None:
    """FSDP2 and FSDP on two processes: the norms and what becomes of them are those of one process."""
    run_on_ranks(sharded_loop.run, str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = sharded_loop.clipped(sharded_loop.make_model())
    assert alone[-1][2]
    for kind in ("fsdp2", "fsdp1"):
        for ours, theirs in zip(first[kind], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert first["stops"] == [False, False, True]
