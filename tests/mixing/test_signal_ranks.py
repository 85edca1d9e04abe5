"""Two ranks, replicated (DDP) or sharded (FSDP2), get the signals of one process."""

from __future__ import annotations

import pytest
import torch

from tests.influence.sharded_ranks import CASES as DTYPES
from tests.influence.sharded_ranks import plain
from tests.mixing.signal_ranks import CASES, HALF, moments, results, run
from tests.processes import run_on_ranks

WORLD = 2
Found = dict[str, dict[str, torch.Tensor]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(run, str(folder), ranks=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_signals_are_those_of_one_process(case: str, ranks: list[Found]) -> None:
    expected = results(plain(DTYPES[case]), 0, 1)
    double = DTYPES[case] == torch.float64
    for name, values in expected.items():
        if name == "microbatch errors":
            continue  # Other microbatches: two ranks fill theirs with other rows.
        for rank in ranks:
            # A difference of nearly equal numbers, in squared norms and errors, keeps fewer digits of float32.
            error = 1e-6 if double else 1e-3
            assert float((rank[case][name] - values).abs().max()) <= error * float(values.abs().max()), name
    for name, values in ranks[0][case].items():
        assert torch.equal(values, ranks[1][case][name])  # Or ranks would decide differently.
    assert bool(ranks[0][case]["microbatch errors"].isfinite().all())


def test_bfloat16_gives_finite_moments_near_those_of_float32(ranks: list[Found]) -> None:
    expected = moments(plain(torch.float32).eval())
    for name in ("products", "variances", "probe losses"):
        found = ranks[0][HALF][name]
        assert float((found - expected[name]).abs().max()) <= 0.1 * float(expected[name].abs().max())
