"""The chunked loss is the plain one, in value and gradient, whatever the chunk and whoever wants a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cheapertraining.distillation import (
    DIVERGENCES,
    DenseTargets,
    DistillationLoss,
    Divergence,
    HiddenTargets,
    OutputHead,
    Targets,
    chunked_distillation_loss,
    distillation_loss,
    sample_targets,
    shifted_mask,
    top_k_targets,
)
from cheapertraining.distillation.losses import next_labels
from cheapertraining.errors import UserError

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 7, 19, 6
KINDS = ("dense", "hidden", "top-k", "top-k, all", "sampled")


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    labels[:, 0] = -100
    labels[0, 3] = -100
    labels[2, 4:] = -100
    return labels


def _targets(kind: str, temperature: float, dtype: torch.dtype) -> Targets:
    logits = 2 * _draw(ROWS, LENGTH, VOCABULARY, seed=5, dtype=dtype)
    if kind == "hidden":
        head = OutputHead(_draw(VOCABULARY, 4, seed=6, dtype=dtype), logit_scale=0.5, soft_cap=5.0)
        return HiddenTargets(_draw(ROWS, LENGTH, 4, seed=7, dtype=dtype), head)
    if kind == "sampled":
        return sample_targets(logits, 20, torch.Generator().manual_seed(8), temperature=temperature)
    if kind == "dense":
        return DenseTargets(logits)
    return top_k_targets(logits, 4 if kind == "top-k" else VOCABULARY, temperature=temperature)


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((ROWS, LENGTH, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    hidden, weight, bias = (_draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes))
    return hidden, weight, bias


def _both(
    targets: Targets, dtype: torch.dtype, cap: float | None, chunk: int, **options: object
) -> tuple[list[Tensor], ...]:
    """Values and gradients, plain and chunked."""
    found = []
    for chunked in (False, True):
        hidden, weight, bias = _inputs(dtype)
        head = OutputHead(weight, bias, 0.7, cap)
        if chunked:
            loss = chunked_distillation_loss(hidden, head, targets, _labels(), chunk_tokens=chunk, **options)  # type: ignore[arg-type]
        else:
            loss = distillation_loss(head.logits(hidden), targets, _labels(), **options)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(3 * loss.total, (hidden, weight, bias))
        found.append([loss.total.detach(), loss.cross_entropy, loss.divergence, *gradients])
    return tuple(found)


@pytest.mark.parametrize(("temperature", "alpha", "cap"), [(1.0, 0.4, None), (2.5, 0.4, 3.0), (1.0, 1.0, 3.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_loss(kind: str, temperature: float, alpha: float, cap: float | None) -> None:
    weights = torch.tensor([0.5, 2.0, 1.0])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        targets = _targets(kind, temperature, dtype)
        for name in DIVERGENCES if kind != "sampled" else ("forward_kl",):
            options = {"divergence": Divergence(name), "temperature": temperature, "alpha": alpha}
            for chunk in (1, 4, 64) if name == "forward_kl" else (4,):
                plain, chunked = _both(targets, dtype, cap, chunk, token_weights=weights, **options)
                for expected, found in zip(plain, chunked, strict=True):
                    scale = expected.abs().max().clamp(min=1).item()
                    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    targets = _targets(kind, 1.5, torch.float64)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = OutputHead(weight, bias, 1.3, 4.0)
        return chunked_distillation_loss(hidden, head, targets, _labels(), temperature=1.5, chunk_tokens=5).total

    torch.autograd.gradcheck(total, _inputs(), fast_mode=True)


def test_cross_entropy_alone() -> None:
    hidden, weight, bias = _inputs()
    head = OutputHead(weight, bias)
    loss = chunked_distillation_loss(hidden, head, None, _labels(), alpha=0.9, chunk_tokens=4)
    logits = hidden @ weight.T + bias
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_labels(_labels()).flatten())
    torch.testing.assert_close(loss.total, expected)
    assert loss.divergence == 0
    for mine, theirs in zip(
        *(torch.autograd.grad(x, _inputs_of(head, hidden)) for x in (loss.total, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def _inputs_of(head: OutputHead, hidden: Tensor) -> tuple[Tensor, ...]:
    assert head.bias is not None
    return hidden, head.weight, head.bias


def test_only_what_is_wanted_gets_a_gradient() -> None:
    targets = _targets("top-k", 1.0, torch.float64)
    hidden, weight, bias = _inputs()
    everything = torch.autograd.grad(_loss(hidden, weight, bias, targets).total, (hidden, weight, bias))
    for i, alone in enumerate((hidden, weight, bias)):
        inputs = [x if x is alone else x.detach() for x in (hidden, weight, bias)]
        (gradient,) = torch.autograd.grad(_loss(*inputs, targets).total, alone)
        torch.testing.assert_close(gradient, everything[i])
    assert not _loss(*(x.detach() for x in (hidden, weight, bias)), targets).total.requires_grad
    with torch.no_grad():
        loss = _loss(hidden, weight, bias, targets)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, _loss(hidden, weight, bias, targets).total.detach())
    # Twice through one graph.
    total = _loss(hidden, weight, bias, targets).total
    first = torch.autograd.grad(total, weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, weight), first)


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Targets | None, **options: object) -> DistillationLoss:
    return chunked_distillation_loss(hidden, OutputHead(weight, bias), targets, _labels(), chunk_tokens=4, **options)  # type: ignore[arg-type]


def test_what_does_not_count_is_never_read() -> None:
    targets = _targets("dense", 1.0, torch.float64)
    assert isinstance(targets, DenseTargets)
    hidden, weight, bias = _inputs()
    clean = _loss(hidden, weight, bias, targets)
    counted = shifted_mask(_labels())[..., None]
    dirty = torch.where(counted, hidden, math.nan).detach().requires_grad_()
    loss = _loss(dirty, weight, bias, DenseTargets(torch.where(counted, targets.logits, math.nan)))
    torch.testing.assert_close(loss.total, clean.total)
    expected = torch.autograd.grad(clean.total, (hidden, weight))
    for mine, theirs in zip(torch.autograd.grad(loss.total, (dirty, weight)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    nothing = chunked_distillation_loss(
        dirty, OutputHead(weight, bias), targets, torch.full((ROWS, LENGTH), -100), statistics=True
    )
    assert nothing.total == 0
    assert nothing.statistics is not None
    assert torch.equal(nothing.statistics.acceptance, torch.zeros(ROWS, LENGTH))  # type: ignore[arg-type]
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(nothing.total, (dirty, weight, bias)))


@pytest.mark.parametrize("kind", KINDS)
def test_finite_at_large_logits(kind: str) -> None:
    """Logits of 1e4, also where the teacher's mass is far below the smallest float32 of the student's."""
    targets = _targets(kind, 1.0, torch.float32)
    hidden, weight, bias = (1e4 * x.detach().float() for x in _inputs())
    inputs = [(x / s).requires_grad_() for x, s in ((hidden, 1e4), (weight, 1.0), (bias, 1.0))]
    head = OutputHead(inputs[1], inputs[2])
    loss = chunked_distillation_loss(inputs[0], head, targets, _labels())
    plain = distillation_loss(head.logits(inputs[0]), targets, _labels())
    torch.testing.assert_close(loss.total, plain.total, rtol=1e-5, atol=0)
    for mine, theirs in zip(*(torch.autograd.grad(x.total, inputs) for x in (loss, plain)), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_teacher_and_student_of_different_dtypes() -> None:
    hidden, weight, bias = _inputs()
    wide = _targets("hidden", 1.0, torch.float64)
    narrow = _targets("hidden", 1.0, torch.float32)
    expected = _loss(hidden, weight, bias, wide).total
    torch.testing.assert_close(_loss(hidden, weight, bias, narrow).total, expected, rtol=1e-5, atol=0)
    narrowed = [x.detach().float() for x in (hidden, weight, bias)]
    torch.testing.assert_close(_loss(*narrowed, wide).total, expected.detach().float(), rtol=1e-5, atol=0)


def test_padded_vocabulary() -> None:
    targets = _targets("dense", 1.0, torch.float64)
    assert isinstance(targets, DenseTargets)
    hidden, weight, bias = _inputs()
    expected = torch.autograd.grad(_loss(hidden, weight, bias, targets).total, weight)[0]
    wide = torch.cat([weight.detach(), torch.ones(3, WIDTH)]).requires_grad_()
    padded = DenseTargets(torch.nn.functional.pad(targets.logits, (0, 9), value=50.0))
    loss = _loss(hidden, wide, torch.cat([bias, bias[:3]]), padded, vocab_size=VOCABULARY)
    (gradient,) = torch.autograd.grad(loss.total, wide)
    torch.testing.assert_close(gradient[:VOCABULARY], expected)
    assert gradient[VOCABULARY:].count_nonzero() == 0


def test_statistics_by_position() -> None:
    targets = _targets("dense", 2.0, torch.float64)
    assert isinstance(targets, DenseTargets)
    hidden, weight, bias = _inputs()
    found = _loss(hidden, weight, bias, targets, statistics=True, temperature=2.0).statistics
    assert found is not None
    mask = shifted_mask(_labels())
    z = (hidden @ weight.T + bias).detach()
    p, q = targets.logits.softmax(dim=-1), z.softmax(dim=-1)
    softened = [(x / 2).log_softmax(dim=-1) for x in (targets.logits, z)]
    expected = {
        "cross_entropy": -q.gather(-1, next_labels(_labels()).clamp(min=0)[..., None]).squeeze(-1).log(),
        "divergence": (softened[0].exp() * (softened[0] - softened[1])).sum(dim=-1),
        "agreement": (p.argmax(dim=-1) == q.argmax(dim=-1)).float(),
        "student_entropy": -(q * q.log()).sum(dim=-1),
        "teacher_entropy": -(p * p.log()).sum(dim=-1),
        "acceptance": torch.minimum(p, q).sum(dim=-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.where(mask, values, 0).float(), msg=name)
    top = _loss(hidden, weight, bias, top_k_targets(targets.logits, 3), statistics=True).statistics
    assert top is not None
    assert torch.equal(top.agreement, found.agreement)  # type: ignore[arg-type]
    assert top.acceptance is None
    sampled = _loss(hidden, weight, bias, _targets("sampled", 1.0, torch.float64), statistics=True).statistics
    assert sampled is not None
    assert sampled.agreement is None
    alone = _loss(hidden, weight, bias, None, statistics=True).statistics
    assert alone is not None
    assert alone.divergence is None


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_gradient_error_is_rounding(autocast: bool) -> None:
    """States (and weight, without autocast) in bfloat16, 128k tokens: gradients within 1 % of float64's."""
    vocabulary, width = 131_072, 8
    hidden = _draw(1, 12, width, seed=0, dtype=torch.bfloat16).requires_grad_()
    weight = _draw(vocabulary, width, seed=1, dtype=torch.float32 if autocast else torch.bfloat16).requires_grad_()
    teacher = HiddenTargets(
        _draw(1, 12, 4, seed=2, dtype=torch.bfloat16), OutputHead(_draw(vocabulary, 4, seed=4, dtype=torch.bfloat16))
    )
    labels = torch.randint(vocabulary, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = chunked_distillation_loss(hidden, OutputHead(weight), teacher, labels).total
    found = torch.autograd.grad(total, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wide = HiddenTargets(teacher.hidden.double(), OutputHead(teacher.head.weight.double()))
    loss = chunked_distillation_loss(exact[0], OutputHead(exact[1]), wide, labels)
    for mine, theirs in zip(found, torch.autograd.grad(loss.total, exact), strict=True):
        assert ((mine.double() - theirs).norm() / theirs.norm()).item() < 0.004


def test_bad_input_is_refused() -> None:
    hidden, weight, bias = _inputs()
    logits = _draw(ROWS, LENGTH, VOCABULARY + 5, seed=5)
    with pytest.raises(UserError, match="found 19 of the student and 24 of the teacher"):
        _loss(hidden, weight, bias, DenseTargets(logits))
    with pytest.raises(UserError, match="targets are not finite"):
        _loss(hidden, weight, bias, DenseTargets(logits * math.nan), vocab_size=VOCABULARY)
    with pytest.raises(UserError, match="expected token ids from 0 to 18"):
        _loss(hidden, weight, bias, top_k_targets(logits, 10))
