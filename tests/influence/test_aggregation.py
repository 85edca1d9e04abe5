"""Units of a batch, and means of groups with their errors."""

from __future__ import annotations

import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import GroupSums, unit_index
from tests.influence.tiny_llama import random_batch


def test_documents_are_counted_through_the_batch() -> None:
    batch = random_batch(4, seed=1)
    units, count = unit_index(batch, "document")
    starts = (batch["position_ids"] == 0).sum().item()
    assert count == starts
    flat = units.reshape(-1)
    assert flat[0] == 0
    assert ((flat[1:] - flat[:-1]) >= 0).all()
    assert torch.equal(torch.unique(flat), torch.arange(count))
    rows, number = unit_index(batch, "sample")
    assert number == 4
    assert torch.equal(rows[:, 5], torch.arange(4))


def test_documents_need_positions() -> None:
    with pytest.raises(UserError, match="position_ids that restart"):
        unit_index({"labels": torch.zeros(2, 3, dtype=torch.int64)}, "document")


def test_row_that_goes_on_with_a_document_is_a_unit_of_its_own() -> None:
    batch = {"labels": torch.zeros(2, 3, dtype=torch.int64), "position_ids": torch.tensor([[0, 1, 2], [3, 4, 0]])}
    units, count = unit_index(batch, "document")
    assert count == 3
    assert units.tolist() == [[0, 0, 0], [1, 1, 2]]


def mean_by_group(
    scores: torch.Tensor, tokens: torch.Tensor, group: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In two parts, as a run adds them."""
    sums = GroupSums(count, scores.shape[1], scores.device)
    for part in (slice(0, 2), slice(2, None)):
        sums.add(scores[part], tokens[part], group[part])
    return sums.means()


def test_mean_is_that_of_all_tokens_of_the_group() -> None:
    scores = torch.tensor([[2.0, 0.0], [4.0, 1.0], [9.0, 9.0], [7.0, 7.0], [5.0, 5.0]])
    mean, error = mean_by_group(scores, torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0, 0, 2, -1, 0]), 3)
    assert mean[0].tolist() == pytest.approx([2.0, 1 / 3])
    assert error[0].tolist() == pytest.approx([0.0, (2 * ((1 / 3) ** 2 + (1 / 3) ** 2)) ** 0.5 / 3])
    assert torch.isnan(mean[1]).all()
    assert mean[2].tolist() == [3.0, 3.0]
    assert torch.isnan(error[2]).all()


def test_error_is_the_spread_of_the_mean_over_many_draws() -> None:
    """Ratio of means: lengths vary, scores go with them."""
    generator = torch.Generator().manual_seed(3)
    means, errors = [], []
    for _ in range(400):
        tokens = torch.randint(5, 30, (40,), generator=generator)
        scores = (0.3 * tokens + tokens.sqrt() * torch.randn(40, generator=generator))[:, None]
        mean, error = mean_by_group(scores, tokens, torch.zeros(40, dtype=torch.int64), 1)
        means.append(mean.item())
        errors.append(error.item())
    spread = torch.tensor(means).std().item()
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.12)
    assert sum(means) / len(means) == pytest.approx(0.3, abs=3 * spread / 20)


def test_a_unit_without_a_token_is_left_out_whatever_its_score_is() -> None:
    sums = GroupSums(1, 1, torch.device("cpu"))
    sums.add(torch.tensor([[1.0], [torch.nan]]), torch.tensor([2, 0]), torch.tensor([0, 0]))
    assert float(sums.means()[0]) == 0.5


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": torch.zeros(0, 3, dtype=torch.int64)}, r"at least one row of tokens, found \[0, 3\]"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"expected 'labels' .* found input_ids"),
    ],
)
def test_a_batch_that_nothing_can_be_scored_in_is_refused(batch: dict[str, torch.Tensor], message: str) -> None:
    for by in ("sample", "document"):
        with pytest.raises(UserError, match=message):
            unit_index(batch, by)
