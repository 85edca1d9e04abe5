"""Two ranks, replicated or sharded, each with half of the rows, precondition as one process with all rows does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.influence.preconditioned_ranks import CASES, results, run
from tests.influence.tiny_llama import tiny_llama
from tests.processes import run_on_ranks

Found = dict[str, dict[str, torch.Tensor]]
Rank = dict[str, Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(run, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> Found:
    return results(tiny_llama(), 0, 1, sharded=False)


@pytest.mark.parametrize("case", CASES)
def test_ranks_find_what_one_process_does(case: str, ranks: list[Rank], alone: Found) -> None:
    for rank in ranks:
        assert set(rank["found"][case]) == set(alone) - ({"ggn_cg"} if case != "ddp" else set())
        for kind, found in rank["found"][case].items():
            for name, part in alone[kind].items():
                error = float((found[name] - part).abs().max() / part.abs().max())
                assert error < 1e-6, (kind, name)


def test_all_ranks_refuse_in_the_same_words(ranks: list[Rank]) -> None:
    assert ranks[0]["refusals"] == ranks[1]["refusals"]
    numbers, masked = ranks[0]["refusals"][::2], ranks[0]["refusals"][1::2]
    for name, number, mask in zip(("datainf", "ekfac"), numbers, masked, strict=True):
        assert f"expected equally many batches for {name} on each rank, found [1, 2]" in number
        assert mask.startswith(f"{name}: expected batches with tokens that a loss counts for")


def test_a_batch_that_is_masked_on_one_rank_alone_counts_on_the_other(ranks: list[Rank]) -> None:
    for name, part in ranks[0]["masked"].items():
        assert torch.equal(part, ranks[1]["masked"][name])
