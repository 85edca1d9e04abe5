"""Hidden-state losses by hand and through a projection."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cheapertraining.distillation.hidden import HiddenProjection, hidden_loss
from cheapertraining.errors import UserError

MASK = torch.tensor([[True, True, False]])


def test_by_hand() -> None:
    student = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [math.nan, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 2.0], [3.0, 4.0], [0.0, math.nan]]])
    loss = hidden_loss(student, teacher, MASK)
    assert loss.item() == pytest.approx((1 + 4) / 2 / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    # 2 (h_s - h_t) / width / positions; nothing where nothing counts, whatever stands there.
    student = student.detach()
    torch.testing.assert_close(gradient, torch.tensor([[[0.5, -1.0], [0.0, 0.0], [0.0, 0.0]]]))
    assert hidden_loss(student, teacher, MASK, form="cosine") == pytest.approx((1 + 0) / 2)
    assert hidden_loss(student, teacher, MASK, normalizer=10) == pytest.approx(0.25)
    assert hidden_loss(student, teacher, torch.zeros_like(MASK)) == 0


def test_cosine_does_not_see_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 3, 5, generator=generator) for _ in range(2))
    torch.testing.assert_close(
        hidden_loss(3 * student, teacher, MASK, form="cosine"), hidden_loss(student, 7 * teacher, MASK, form="cosine")
    )


def test_projection_is_seeded_orthogonal_and_learned() -> None:
    before = torch.get_rng_state()
    projection = HiddenProjection(4, 6, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(projection.weight, HiddenProjection(4, 6, seed=1).weight)
    assert not torch.equal(projection.weight, HiddenProjection(4, 6, seed=2).weight)
    torch.testing.assert_close(projection.weight.T @ projection.weight, torch.eye(4))
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 16, 4, generator=generator)
    teacher = student @ torch.randn(4, 6, generator=generator)
    mask = torch.ones(2, 16, dtype=torch.bool)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.05)
    losses: list[Tensor] = []
    for _ in range(200):
        losses.append(hidden_loss(student, teacher, mask, projection=projection))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 1e-3 * losses[0]


def test_low_precision_is_widened() -> None:
    states = torch.full((1, 3, 4), 300.0, dtype=torch.float16)
    # The square, 90,000, is beyond float16.
    assert hidden_loss(states, torch.zeros_like(states), MASK) == 90_000


def test_bad_input_is_refused() -> None:
    student, teacher = torch.zeros(1, 3, 4), torch.zeros(1, 3, 6)
    with pytest.raises(
        UserError, match=r"found 4 of the student and 6 of the teacher: give a HiddenProjection\(4, 6\)"
    ):
        hidden_loss(student, teacher, MASK)
    with pytest.raises(UserError, match="form: expected 'mse' or 'cosine', found 'l1'"):
        hidden_loss(student, student, MASK, form="l1")  # type: ignore[arg-type]
