"""Universal logit distillation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cheapertraining.distillation.universal import universal_logit_loss
from cheapertraining.errors import UserError


def test_by_hand() -> None:
    """Sorted (0.5, 0.5, 0) against (0.7, 0.2, 0.1): whichever tokens these are, and over two positions."""
    student = torch.tensor([[[0.5, 0.5], [0.1, 0.9], [0.3, 0.7]]]).log().requires_grad_()
    teacher = torch.tensor([[[0.2, 0.7, 0.1], [0.05, 0.05, 0.9], [1, 0, 0]]]).log()
    labels = torch.tensor([[-100, 0, 1]])
    loss = universal_logit_loss(student, teacher, labels, labels)
    assert loss.item() == pytest.approx(((0.2 + 0.3 + 0.1) + (0 + 0.05 + 0.05)) / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, 2].count_nonzero() == 0


def test_order_of_tokens_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 9, generator=generator), torch.randn(2, 4, 7, generator=generator)
    labels = torch.tensor([[-100, 1, 1, 1]]).expand(2, 4)
    permuted = universal_logit_loss(
        student[..., torch.randperm(9, generator=generator)], teacher.flip(-1), labels, labels, temperature=2.0
    )
    torch.testing.assert_close(permuted, universal_logit_loss(student, teacher, labels, labels, temperature=2.0))
    assert universal_logit_loss(student, student.flip(-1), labels, labels) < 1e-6


def test_the_kth_counted_positions_are_paired() -> None:
    """The teacher has a longer prompt and fewer tokens of the answer: its two are paired with the first two."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(1, 5, 6, generator=generator), torch.randn(1, 5, 8, generator=generator)
    student_labels = torch.tensor([[-100, -100, 1, 1, 1]])
    teacher_labels = torch.tensor([[-100, -100, -100, 1, 1]])
    student[0, 4], teacher[0, :2] = math.nan, math.nan
    p, q = (x.softmax(dim=-1).sort(descending=True).values for x in (teacher[0, 2:4], student[0, 1:3]))
    expected = (p[:, :6] - q).abs().sum() + p[:, 6:].sum()
    loss = universal_logit_loss(student, teacher, student_labels, teacher_labels)
    torch.testing.assert_close(loss, expected / 2)
    half = universal_logit_loss(student, teacher, student_labels, teacher_labels, normalizer=4)
    torch.testing.assert_close(half, expected / 4)


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 1]])
    torch.autograd.gradcheck(lambda z: universal_logit_loss(z, teacher, labels, labels), (student,))
    nothing = universal_logit_loss(student, teacher, torch.full((1, 3), -100), labels)
    assert nothing == 0
    assert torch.autograd.grad(nothing, student)[0].count_nonzero() == 0


def test_bad_input_is_refused() -> None:
    logits, labels = torch.zeros(1, 3, 5), torch.tensor([[-100, 1, 1]])
    with pytest.raises(UserError, match="expected as many rows, found 1 and 2"):
        universal_logit_loss(logits, logits.expand(2, 3, 5), labels, labels.expand(2, 3))
    with pytest.raises(UserError, match="not finite at 2 of 2"):
        universal_logit_loss(logits, logits * math.nan, labels, labels)
    with pytest.raises(UserError, match="temperature: expected a number above 0"):
        universal_logit_loss(logits, logits, labels, labels, temperature=0)
