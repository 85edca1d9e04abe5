"""The plain losses against closed forms written anew, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cheapertraining.distillation import (
    DIVERGENCES,
    DenseTargets,
    Divergence,
    SampledTargets,
    distillation_loss,
    divergence_of_logits,
    shifted_mask,
    token_mean,
    top_k_targets,
)
from cheapertraining.errors import UserError

VOCABULARY = 11


def _draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _labels(rows: int, length: int) -> Tensor:
    """A document begins in the middle of row 0, and row 1 ends in padding."""
    labels = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    labels[:, 0] = -100
    labels[0, length // 2] = -100
    labels[1:, length - 2 :] = -100
    return labels


def _closed_form(name: str, p: Tensor, q: Tensor, weight: float) -> Tensor:
    """From probabilities, written without regard to rounding; KL is torch's."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a, reduction="none").sum(dim=-1)

    mixture = weight * p + (1 - weight) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: weight * kl(p, mixture) + (1 - weight) * kl(q, mixture),
        "skew_kl": lambda: kl(p, mixture),
        "skew_reverse_kl": lambda: kl(q, (1 - weight) * p + weight * q),
        "total_variation": lambda: 1 - torch.minimum(p, q).sum(dim=-1),
    }[name]()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_and_slope(name: str) -> None:
    kind = Divergence(name)
    z, t = _draw(2, 5, VOCABULARY, seed=1).requires_grad_(), _draw(2, 5, VOCABULARY, seed=2)
    value = divergence_of_logits(z, t, kind, temperature=1.7)
    p, q = (t / 1.7).softmax(dim=-1), (z / 1.7).softmax(dim=-1)
    torch.testing.assert_close(value, _closed_form(name, p, q, kind.weight or 0.0), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    slope = kind.slope(p.log(), q.log())
    closed = (slope - q * slope.sum(dim=-1, keepdim=True)) / 1.7
    torch.testing.assert_close(gradient, closed.detach(), rtol=1e-10, atol=1e-12)
    torch.autograd.gradcheck(lambda logits: divergence_of_logits(logits, t, kind), (z,))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_the_teacher(name: str) -> None:
    z = _draw(3, VOCABULARY).requires_grad_()
    value = divergence_of_logits(z, z.detach(), Divergence(name))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.abs().max() < 1e-12
    # The kink of total variation: where p and q round apart, its slope is that of either side.
    assert gradient.abs().max() < (0.51 if name == "total_variation" else 1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_at_large_logits_and_masked_vocabulary(name: str) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0, -math.inf], [0.0, 1e4, 1e4, -math.inf]], requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0.0, -math.inf], [1e4, 0.0, -1e4, -math.inf]])
    value = divergence_of_logits(z, t, Divergence(name))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    without = divergence_of_logits(z[:, :3], t[:, :3], Divergence(name))
    torch.testing.assert_close(value, without)
    if name == "forward_kl":
        torch.testing.assert_close(value, torch.tensor([2e4, 1e4]), rtol=1e-4, atol=0)


def test_total_is_the_formula() -> None:
    z, t, labels = _draw(2, 8, VOCABULARY, seed=1), _draw(2, 8, VOCABULARY, seed=2), _labels(2, 8)
    temperature, alpha = 2.0, 0.3
    mask = labels[:, 1:] != -100
    cross = F.cross_entropy(z[:, :-1][mask], labels[:, 1:][mask])
    divergence = F.kl_div(
        (z[:, :-1][mask] / 2).log_softmax(-1), (t[:, :-1][mask] / 2).log_softmax(-1), log_target=True, reduction="sum"
    ) / int(mask.sum())
    loss = distillation_loss(z, DenseTargets(t), labels, temperature=temperature, alpha=alpha)
    torch.testing.assert_close(loss.cross_entropy, cross)
    torch.testing.assert_close(loss.divergence, divergence)
    torch.testing.assert_close(loss.total, 0.7 * cross + 0.3 * 4 * divergence)
    assert int(loss.tokens) == int(mask.sum()) == int(shifted_mask(labels).sum())


def _gradient(z: Tensor, t: Tensor, labels: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    total = distillation_loss(z, DenseTargets(t), labels, **options).total  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(total, z)
    return total.detach(), gradient


def test_padding_splitting_and_length_change_nothing() -> None:
    z, t, labels = _draw(4, 8, VOCABULARY, seed=1), _draw(4, 8, VOCABULARY, seed=2), _labels(4, 8)
    total, gradient = _gradient(z, t, labels)
    # Whatever stands where no loss counts, NaN included, in padding within and added.
    dirty = torch.where(shifted_mask(labels)[..., None], t, math.nan)
    long = [F.pad(x, (0, 0, 0, 5), value=math.nan) for x in (z, dirty)]
    padded, padded_gradient = _gradient(*long, F.pad(labels, (0, 5), value=-100))
    torch.testing.assert_close(padded, total)
    torch.testing.assert_close(padded_gradient[:, :8], gradient)
    assert padded_gradient[:, 8:].count_nonzero() == 0
    # Ragged parts with the normalizer of the whole.
    tokens = shifted_mask(labels).sum()
    parts = [_gradient(z[rows], t[rows], labels[rows], normalizer=tokens) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], total)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient)
    # The same positions in twice as many rows: a mean does not grow with what it is over.
    twice, _ = _gradient(torch.cat([z, z]), torch.cat([t, t]), torch.cat([labels, labels]))
    torch.testing.assert_close(twice, total)


def test_nothing_counts() -> None:
    z = _draw(2, 4, VOCABULARY)
    total, gradient = _gradient(z, torch.full_like(z, math.nan), torch.full((2, 4), -100))
    assert total == 0
    assert gradient.count_nonzero() == 0


def test_gradient_keeps_its_scale_with_temperature() -> None:
    """T^2 KL(p_T, q_T) tends to the squared distance of centred logits / 2V: gradient (z - t - mean) / V."""
    z, t = _draw(2, 8, VOCABULARY, seed=1), _draw(2, 8, VOCABULARY, seed=2)
    labels = _labels(2, 8)
    sizes = [_gradient(z, t, labels, alpha=1.0, temperature=T)[1].norm().item() for T in (1.0, 2.0, 4.0, 16.0)]
    assert max(sizes) / min(sizes) < 4
    _, limit = _gradient(z, t, labels, alpha=1.0, temperature=1e5)
    difference = z - t
    expected = (difference - difference.mean(dim=-1, keepdim=True)) / VOCABULARY / shifted_mask(labels).sum()
    expected = torch.where(shifted_mask(labels)[..., None], expected, 0)
    torch.testing.assert_close(limit, expected, rtol=1e-3, atol=1e-6)


def test_token_weights_scale_the_divergence_alone() -> None:
    z, t, labels = _draw(2, 8, VOCABULARY, seed=1), _draw(2, 8, VOCABULARY, seed=2), _labels(2, 8)
    plain = distillation_loss(z, DenseTargets(t), labels)
    weighted = distillation_loss(z, DenseTargets(t), labels, token_weights=torch.tensor([2.0, 0.0]))
    each = divergence_of_logits(z, t)
    mask = shifted_mask(labels)
    torch.testing.assert_close(weighted.cross_entropy, plain.cross_entropy)
    torch.testing.assert_close(weighted.divergence, 2 * each[0][mask[0]].sum() / mask.sum())
    torch.testing.assert_close(weighted.total, 0.5 * (weighted.cross_entropy + weighted.divergence))
    by_position = torch.tensor([2.0, 0.0])[:, None].expand(2, 8)
    again = distillation_loss(z, DenseTargets(t), labels, token_weights=by_position)
    torch.testing.assert_close(again.total, weighted.total)


def test_padded_vocabulary_is_left_out() -> None:
    z, t, labels = _draw(2, 8, VOCABULARY, seed=1), _draw(2, 8, VOCABULARY, seed=2), _labels(2, 8)
    total, _ = _gradient(z, t, labels)
    wide, gradient = _gradient(F.pad(z, (0, 2), value=7.0), F.pad(t, (0, 5), value=9.0), labels, vocab_size=VOCABULARY)
    torch.testing.assert_close(wide, total)
    assert gradient[..., VOCABULARY:].count_nonzero() == 0


def test_low_precision_inputs_are_widened() -> None:
    z, t, labels = _draw(2, 8, VOCABULARY, seed=1), _draw(2, 8, VOCABULARY, seed=2), _labels(2, 8)
    low = distillation_loss(z.bfloat16(), DenseTargets(t.bfloat16()), labels)
    exact = distillation_loss(z.bfloat16().double(), DenseTargets(t.bfloat16().double()), labels)
    assert low.total.dtype == torch.float32
    torch.testing.assert_close(low.total.double(), exact.total, rtol=1e-6, atol=1e-6)


def test_token_mean_counts() -> None:
    values, mask = torch.tensor([[1.0, math.nan], [4.0, 3.0]]), torch.tensor([[True, False], [True, True]])
    assert token_mean(values, mask) == pytest.approx(8 / 3)
    assert token_mean(values, mask, 16) == 0.5
    assert token_mean(values, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1, found 1.5"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"vocab_size": 12}, "vocab_size is 12, but the student has logits for 11 tokens only"),
        ({"token_weights": torch.ones(3)}, r"token_weights: expected shape \[2\] or \[2, 8\], found \[3\]"),
    ],
)
def test_settings_are_refused(options: dict[str, object], message: str) -> None:
    z = _draw(2, 8, VOCABULARY)
    with pytest.raises(UserError, match=message):
        distillation_loss(z, DenseTargets(z), _labels(2, 8), **options)  # type: ignore[arg-type]


def test_targets_are_refused() -> None:
    z, labels = _draw(2, 8, VOCABULARY), _labels(2, 8)
    with pytest.raises(UserError, match=r"11 of the student and 12 of the teacher: give\s+vocab_size"):
        distillation_loss(z, DenseTargets(_draw(2, 8, 12)), labels)
    bad = z.clone()
    bad[0, 1, 3] = math.nan
    with pytest.raises(UserError, match="targets are not finite at 1 of"):
        distillation_loss(z, DenseTargets(bad), labels)
    with pytest.raises(UserError, match="stored at 2 and cannot be turned into those at 1"):
        distillation_loss(z, top_k_targets(z, 3, temperature=2.0), labels)
    sampled = SampledTargets(torch.zeros(2, 8, 1, dtype=torch.int64), torch.ones(2, 8, 1))
    with pytest.raises(UserError, match="linear in the teacher's probabilities, reverse_kl is not"):
        distillation_loss(z, sampled, labels, divergence=Divergence("reverse_kl"))


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("forward_lk", None, "found 'forward_lk'. Did you mean 'forward_kl'?"),
        ("reverse_kl", 0.5, "reverse_kl takes no weight"),
        ("jensen_shannon", 0.0, "between 0 and 1, both excluded, found 0.0"),
        ("jensen_shannon", 1.0, "both excluded"),
        ("skew_kl", 1.0, "both excluded"),
    ],
)
def test_divergences_are_refused(name: str, weight: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        Divergence(name, weight)
