"""Loss per sample: against torch's own shifted cross-entropy, and at the edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cheapertraining.influence import per_sample_loss, token_losses
from tests.influence.tiny_llama import VOCABULARY, random_batch, tiny_llama


def test_sums_and_counts_equal_shifted_cross_entropy() -> None:
    batch = random_batch(5, 0)
    logits = torch.randn(5, 24, VOCABULARY, generator=torch.Generator().manual_seed(1))
    sums, tokens = per_sample_loss(logits, batch["labels"])
    assert sums.dtype == torch.float32
    assert tokens.dtype == torch.int64
    for row in range(5):
        expected = F.cross_entropy(logits[row, :-1], batch["labels"][row, 1:], reduction="sum")
        assert sums[row].item() == pytest.approx(expected.item(), rel=1e-6)
        assert tokens[row] == (batch["labels"][row] != -100).sum()


def test_the_batch_s_mean_is_that_of_transformers() -> None:
    model, batch = tiny_llama(), random_batch(4, 2)
    model.eval()
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    sums, tokens = per_sample_loss(model(**inputs).logits, batch["labels"])
    # Hugging Face computes the loss in float32.
    expected = model(**inputs, labels=batch["labels"]).loss
    assert (sums.sum() / tokens.sum()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_sample_without_labels_counts_nothing() -> None:
    logits = torch.randn(2, 4, 7, requires_grad=True)
    labels = torch.tensor([[-100, -100, -100, -100], [-100, 3, 2, 1]])
    sums, tokens = per_sample_loss(logits, labels)
    assert sums[0] == 0
    assert tokens.tolist() == [0, 3]
    sums.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum() == 0
    assert logits.grad[1, 3].abs().sum() == 0


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_logits_are_summed_in_float32(given: torch.dtype, returned: torch.dtype) -> None:
    logits, labels = torch.randn(2, 6, 5).to(given), torch.randint(0, 5, (2, 6))
    losses, counted = token_losses(logits, labels)
    assert losses.dtype == returned
    assert losses.shape == counted.shape == (2, 6)
    assert not counted[:, -1].any()
