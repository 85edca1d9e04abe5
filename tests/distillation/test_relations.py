"""Relation losses against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cheapertraining.distillation.relations import Form, document_mask, relation_loss
from cheapertraining.errors import UserError

ALL = torch.ones(1, 2, dtype=torch.bool)
E = math.e


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_scaled_by_hand() -> None:
    """One head of width 4, sqrt(d) = 2. Teacher: rows (2, 0, ...) and (0, 0, ...), so A A^T / 2 = [[2, 0], [0, 0]].
    Student: nothing but zeros, all relations even."""
    teacher = torch.tensor([[[2.0, 0, 0, 0], [0.0, 0, 0, 0]]])
    loss = relation_loss([torch.zeros(1, 2, 4)], [teacher], ALL, relation_heads=1)
    first = (E**2 / (E**2 + 1), 1 / (E**2 + 1))
    assert loss == pytest.approx((_kl(first, (0.5, 0.5)) + 0) / 2, rel=1e-6)


def test_cosine_by_hand() -> None:
    """Cosines do not see lengths: [[1, 0], [0, 1]] of the teacher, [[1, 1], [1, 1]] of the student."""
    teacher, student = torch.tensor([[[5.0, 0.0], [0.0, 0.1]]]), torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    loss = relation_loss([student], [teacher], ALL, relation_heads=1, form="cosine")
    assert loss == pytest.approx(_kl((E / (E + 1), 1 / (E + 1)), (0.5, 0.5)), rel=1e-5)
    sharper = relation_loss([student], [teacher], ALL, relation_heads=1, form="cosine", temperature=0.5)
    assert sharper == pytest.approx(_kl((E**2 / (E**2 + 1), 1 / (E**2 + 1)), (0.5, 0.5)), rel=1e-5)


def test_heads_are_split_anew() -> None:
    """Width 4 in two heads of 2: the second head's states alone make the loss, halved by the mean over heads."""
    teacher = torch.tensor([[[0.0, 0, 2, 0], [0.0, 0, 0, 0]]])
    loss = relation_loss([torch.zeros(1, 2, 6)], [teacher], ALL, relation_heads=2)
    score = math.exp(4 / math.sqrt(2))
    one = _kl((score / (score + 1), 1 / (score + 1)), (0.5, 0.5))
    assert loss == pytest.approx(one / 2 / 2, rel=1e-6)


@pytest.mark.parametrize("form", ["scaled", "cosine"])
def test_against_torch_sequence_by_sequence(form: Form) -> None:
    """Two packed documents and padding equal their documents alone; kinds of states are added up."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    mask = torch.tensor([[True] * 5 + [False] * 2])
    student = [_draw(1, 7, 8, seed=1), _draw(1, 7, 4, seed=2)]
    teacher = [_draw(1, 7, 12, seed=3), _draw(1, 7, 8, seed=4)]
    loss = relation_loss(student, teacher, mask, relation_heads=2, position_ids=positions, form=form)

    def relations(states: Tensor) -> Tensor:
        heads = states.unflatten(-1, (2, -1)).transpose(0, 1)
        if form == "cosine":
            return F.cosine_similarity(heads[:, :, None], heads[:, None], dim=-1)
        return heads @ heads.transpose(1, 2) / math.sqrt(heads.shape[-1])

    expected = 0.0
    for own, other in zip(student, teacher, strict=True):
        for rows in (slice(0, 3), slice(3, 5)):
            q, p = (relations(x[0, rows]).log_softmax(dim=-1) for x in (own, other))
            expected += F.kl_div(q, p, log_target=True, reduction="sum").item() / 2 / 5
    assert loss.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("form", ["scaled", "cosine"])
def test_zero_at_the_teacher_and_signal_elsewhere(form: Form) -> None:
    states = _draw(2, 5, 8, seed=1).requires_grad_()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    dirty = torch.where(mask[..., None], states, math.nan)
    loss = relation_loss([dirty], [states.detach()], mask, relation_heads=2, form=form)
    (gradient,) = torch.autograd.grad(loss, states, retain_graph=True)
    assert loss.abs() < 1e-12
    assert gradient.abs().max() < 1e-12
    other = relation_loss([dirty], [_draw(2, 5, 8, seed=2)], mask, relation_heads=2, form=form)
    (gradient,) = torch.autograd.grad(other, states)
    assert other > 0.01
    assert gradient.isfinite().all()
    assert gradient[1, 3:].count_nonzero() == 0
    assert gradient.norm() > 1e-3


def test_gradient_and_empty_mask() -> None:
    teacher, mask = _draw(1, 4, 6, seed=2), torch.tensor([[True, True, True, False]])
    for form in ("scaled", "cosine"):
        torch.autograd.gradcheck(
            lambda x, form=form: relation_loss([x], [teacher], mask, relation_heads=3, form=form),
            (_draw(1, 4, 6, seed=1).requires_grad_(),),
        )
    assert relation_loss([teacher], [-teacher], torch.zeros_like(mask), relation_heads=3) == 0


def test_document_mask() -> None:
    found = document_mask(torch.tensor([[0, 1, 0, 0]]), torch.tensor([[True, True, True, False]]))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = expected[2, 2] = True
    assert torch.equal(found[0], expected)


def test_bad_input_is_refused() -> None:
    states = [torch.zeros(1, 2, 6)]
    with pytest.raises(UserError, match="expected a divisor of the states' width 6, found 4"):
        relation_loss(states, states, ALL, relation_heads=4)
    with pytest.raises(UserError, match="as many kinds of states, found 1 and 2"):
        relation_loss(states, states * 2, ALL, relation_heads=2)
    with pytest.raises(UserError, match="found 'dot'"):
        relation_loss(states, states, ALL, relation_heads=2, form="dot")  # type: ignore[arg-type]
