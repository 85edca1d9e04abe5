"""Ranks that hold a part of the vocabulary each find what one process finds from whole logits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distillation.vocabulary_ranks import cases, work
from tests.processes import run_on_ranks

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of two, and of four, has found."""
    folder = tmp_path_factory.mktemp("parts")
    for ranks in (2, 4):
        run_on_ranks(work, str(folder), ranks=ranks)
    return {n: [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [name for name, _, _ in cases()])
def test_loss_gradient_and_statistics_are_those_of_whole_logits(case: str, ranks: int, found: Found) -> None:
    """In float64, with ragged masks, weights by source, and chunks that do not divide the positions."""
    for rank in found[ranks]:
        numbers, gradients, statistics = rank["errors"][case]
        assert numbers <= 1e-12
        assert gradients <= 1e-12
        assert statistics <= 1e-6  # they are kept in float32


def test_rows_without_loss(found: Found) -> None:
    assert all(rank["nothing"] == [0.0, 0.0] for ranks in found.values() for rank in ranks)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("not finite", "not finite at 1 of"),
        ("another tokenizer", "expected token ids from 0 to 19"),
        ("more than there are", "targets hold 30 tokens a position, but the vocabulary has 20"),
        ("padding", "vocab_size: expected none"),
    ],
)
def test_bad_targets_are_refused_on_every_rank(what: str, words: str, found: Found) -> None:
    """Also where only one of them sees what is wrong, or the others would wait for it."""
    assert all(words in rank["refusals"][what] for ranks in found.values() for rank in ranks)
