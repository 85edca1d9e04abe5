"""Layers cut over two ranks (``tp``), and over two times two with FSDP2 (``fsdp2_tp``), score what one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.influence.sharded_ranks import unwatched
from tests.influence.tensor_ranks import CASES, MOMENTS, TENSOR, TRIED, moments, run, whole
from tests.processes import run_on_ranks

pytestmark = pytest.mark.slow
Found = dict[str, Any]


@pytest.fixture(scope="module", params=[2, 4], ids=["tp", "fsdp2_tp"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    run_on_ranks(run, str(folder), ranks=world)
    return [torch.load(folder / f"{world} ranks, {rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    found = {case: unwatched(whole(case), 0, 1) for case in CASES}
    return {
        case: each | ({"moments": moments(whole(case))} if case in MOMENTS[2] else {}) for case, each in found.items()
    }


def close(found: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= error * float(expected.abs().max())


def exact(case: str) -> float:
    return 1e-9 if CASES[case] == torch.float64 else 1e-5


def test_directions_and_probe_losses_are_those_of_one_process(ranks: list[Found], alone: dict[str, Found]) -> None:
    for case in TRIED[len(ranks)]:
        expected = alone[case]
        for rank in ranks:
            assert list(rank[case]["directions"]) == list(expected["directions"])
            for name, part in expected["directions"].items():
                close(rank[case]["directions"][name], part, exact(case))
                assert torch.equal(rank[case]["state"][name], rank[case]["directions"][name])
            close(rank[case]["losses"], expected["losses"], exact(case))


def test_scores_and_their_errors_are_those_of_one_process(ranks: list[Found], alone: dict[str, Found]) -> None:
    own = ranks[::TENSOR]  # those that read samples of their own
    for case in TRIED[len(ranks)]:
        expected = alone[case]
        # Differences of float32 losses carry 1e-3 of noise; that they mean the same here is seen in float64.
        noise = 1e-9 if CASES[case] == torch.float64 else 1e-2
        by_row = torch.stack([rank[case]["difference"] for rank in own], dim=1).flatten(0, 1)
        close(by_row, expected["difference"], noise)
        for rank, copy in zip(own, ranks[1::TENSOR], strict=True):
            assert torch.equal(rank[case]["difference"], copy[case]["difference"])
        for rank in ranks:
            for name in ("look-ahead", "look-ahead errors"):
                close(rank[case][name], expected[name], noise)
                assert torch.equal(rank[case][name], ranks[0][case][name])  # Or ranks would decide differently.
            for name, values in expected["microbatch"].items():
                close(rank[case]["microbatch"][name], values, exact(case))


def test_moments_of_gradients_are_those_of_watched_layers_in_one_process(
    ranks: list[Found], alone: dict[str, Found]
) -> None:
    """Differences along a direction against products of what went through single layers."""
    for case in MOMENTS[len(ranks)]:
        for name, values in alone[case]["moments"].items():
            for rank in ranks:
                # Each sample's own difference has a bias, of which sums are free, and errors of sums are not.
                close(rank[case]["moments"][name], values, 1e-2 if name.endswith("errors") else 1e-3)
                assert torch.equal(rank[case]["moments"][name], ranks[0][case]["moments"][name])


def test_what_backward_leaves_counts_samples_once(ranks: list[Found]) -> None:
    data = len(ranks) // TENSOR
    for rank in ranks:
        for case in TRIED[len(ranks)]:
            assert rank[case]["copies"] == TENSOR
            assert rank[case]["scale"] in (1.0, 1.0 / data)


def test_scorers_that_watch_layers_are_refused(ranks: list[Found]) -> None:
    for rank in ranks:
        assert "found them cut by tensor parallelism" in rank["refusals"]["hook"]
        assert "found them cut by tensor parallelism" in rank["refusals"]["fused"]
        assert "expected whole parameters on each rank" in rank["refusals"]["loop"]
