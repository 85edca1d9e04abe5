"""Parity with Liger, a second implementation, where it is installed (`pip install liger-kernel`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cheapertraining.distillation import Divergence, HiddenTargets, OutputHead, chunked_distillation_loss
from cheapertraining.distillation.fused import fits
from cheapertraining.distillation.losses import next_labels


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """States, weight and ragged labels."""
    labels = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
    labels[:, 0] = -100
    labels[0, 5:] = -100
    hidden, weight = (_draw(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(((2, 9, 6), (50, 6))))
    return hidden, weight, labels.to(device)


def test_fits_nothing_but_float32_on_cuda() -> None:
    hidden, weight, _ = _inputs()
    assert not fits(hidden, OutputHead(weight))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "beta"),
    [
        (Divergence("forward_kl"), 0.0),
        (Divergence("reverse_kl"), 1.0),
        (Divergence("jensen_shannon", 0.5), 0.5),
        (Divergence("jensen_shannon", 0.2), 0.2),
    ],
)
def test_chunked_divergences(kind: Divergence, beta: float, alpha: float) -> None:
    """On the CPU too. Liger leaves T^2 out, so ours is divided by it."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, weight, labels = _inputs()
    teacher, head = _draw(2, 9, 4, seed=5), _draw(50, 4, seed=6)
    targets = HiddenTargets(teacher, OutputHead(head))
    options = {"divergence": kind, "temperature": 2.0, "chunk_tokens": 5}
    ours = chunked_distillation_loss(hidden, OutputHead(weight), targets, labels, alpha=1.0, **options).total / 4
    cross_entropy = chunked_distillation_loss(hidden, OutputHead(weight), None, labels, chunk_tokens=5).total
    loss = liger.LigerFusedLinearJSDLoss(1 - alpha, alpha, beta=beta, compiled=False, temperature=2.0)
    inputs = (hidden.flatten(0, 1), weight, teacher.flatten(0, 1), head, next_labels(labels).flatten())
    theirs = loss(*inputs)
    total = alpha * ours + (1 - alpha) * cross_entropy
    torch.testing.assert_close(total, theirs)
    for mine, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (total, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need CUDA")
@pytest.mark.parametrize("cap", [None, 5.0])
def test_fused_cross_entropy(cap: float | None) -> None:
    pytest.importorskip("liger_kernel")
    hidden, weight, labels = _inputs("cuda")
    head = OutputHead(weight, soft_cap=cap)
    assert fits(hidden, head)
    fused = chunked_distillation_loss(hidden, head, None, labels, normalizer=7)
    ours = chunked_distillation_loss(hidden, head, None, labels, normalizer=7, chunk_tokens=5)
    assert fused.cross_entropies is None
    torch.testing.assert_close(fused.total, ours.total)
    for mine, other in zip(*(torch.autograd.grad(x.total, (hidden, weight)) for x in (ours, fused)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
