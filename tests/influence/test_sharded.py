"""Two ranks, replicated (DDP) or sharded (FSDP, FSDP2), score what one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.influence.sharded_ranks import CASES, plain, results, run
from tests.processes import run_on_ranks

WORLD = 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(run, str(folder), ranks=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, dict[str, Any]]:
    return {dtype: results(plain(dtype), 0, 1) for dtype in (torch.float64, torch.float32)}


def close(found: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= error * float(expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_directions_are_those_of_one_process(
    case: str, ranks: list[dict[str, Any]], alone: dict[torch.dtype, dict[str, Any]]
) -> None:
    expected = alone[CASES[case]]
    for rank in ranks:
        assert list(rank[case]["directions"]) == list(expected["directions"])
        for name, part in expected["directions"].items():
            close(rank[case]["directions"][name], part, 1e-5)
            assert torch.equal(rank[case]["state"][name], rank[case]["directions"][name])
        torch.testing.assert_close(rank[case]["losses"], expected["losses"])


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_process(
    case: str, ranks: list[dict[str, Any]], alone: dict[torch.dtype, dict[str, Any]]
) -> None:
    expected = alone[CASES[case]]
    # Differences of float32 losses carry 1e-3 of noise; that they mean the same in shards is seen in float64.
    noise = 1e-5 if CASES[case] == torch.float64 else 1e-2
    close(by_row(ranks, case, "difference"), expected["difference"], noise)
    for rank in ranks:
        close(rank[case]["look-ahead"], expected["look-ahead"], noise)
        for name, values in expected["microbatch"].items():
            close(rank[case]["microbatch"][name], values, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_watched_backward_passes_are_those_of_one_process(
    case: str, ranks: list[dict[str, Any]], alone: dict[torch.dtype, dict[str, Any]]
) -> None:
    expected = alone[CASES[case]]
    for name in ("hook", "fused"):
        close(by_row(ranks, case, name), expected[name], 1e-5)
    for rank in ranks:
        for name, grad in expected["grads"].items():
            close(rank[case]["grads"][name], grad, 1e-5)


def by_row(ranks: list[dict[str, Any]], case: str, name: str) -> torch.Tensor:
    return torch.stack([rank[case][name] for rank in ranks], dim=1).flatten(0, 1)


@pytest.mark.parametrize("name", ["documents", "hook documents"])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] == torch.float64])
def test_documents_are_those_of_one_process(
    case: str, name: str, ranks: list[dict[str, Any]], alone: dict[torch.dtype, dict[str, Any]]
) -> None:
    found = torch.cat([rank[case][name] for rank in ranks])
    expected = alone[torch.float64][name]
    assert len(found) == len(expected)
    close(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()], 1e-5)


def test_what_backward_leaves_is_told_from_what_it_is_taken_for(ranks: list[dict[str, Any]]) -> None:
    """Torch 2.7 on gloo: FSDP2 sums float32 and averages float64; later versions average both."""
    scales = {case: ranks[0][case]["scale"] for case in CASES}
    assert scales == {case: ranks[1][case]["scale"] for case in CASES}
    assert {scales["ddp"], scales["fsdp"], scales["fsdp2"], scales["fsdp in float32"]} == {0.5}
    assert scales["fsdp2 in float32"] in (0.5, 1.0)


@pytest.mark.parametrize("case", ["ddp", "fsdp", "fsdp2"])
def test_ranks_that_differ_are_refused_on_all(case: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["refusals"][case] for rank in ranks)
    assert first == second
    assert "equally many samples of probe 'p' on each rank, found [3, 4]" in first["window"]
    assert "equally many passes over probe 'p' on each rank, found [4, 2]" in first["passes"]
    assert "equally many microbatches marked for influence on each rank, found [1, 2]" in first["marks"]
    assert "the same source on all ranks at a time, found sources 0 to 1 in microbatch 1" in first["sources"]
    assert ("jvp" in first) == ("put off" in first) == (case != "ddp")
    if case != "ddp":
        assert "method 'jvp': expected whole parameters on each rank" in first["jvp"]
        assert "expected FSDP to reduce the gradients of every microbatch" in first["put off"]


def test_other_ways_to_spread_a_model_are_refused(ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["wrappings"]
    assert "with use_orig_params=True, found flat parameters" in found["flat"]
    assert "found model.layers.0.mlp.down_proj.weight as (Shard(dim=0),)" in found["tensor parallel"]
    for name in ("fsdp in half", "fsdp2 in half"):
        assert "gather parameters in float32, found mixed precision torch.bfloat16" in found[name]
