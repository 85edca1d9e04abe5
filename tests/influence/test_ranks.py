"""Work spread over ranks gives what one rank finds alone, the same on each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cheapertraining.influence import SourceEstimator
from tests.influence.tiny_llama import Sources, probe_loader, tiny_llama
from tests.influence.two_ranks import measure
from tests.processes import run_on_ranks


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    run_on_ranks(measure, str(tmp_path))
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    look = SourceEstimator(Sources(), {"p": probe_loader()}, probe_samples=5, source_samples=3)
    alone = [look.measure(tiny_llama(), update_index=update) for update in range(2)]
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes()
    np.testing.assert_allclose(first["scores"], [each.scores for each in alone], rtol=1e-6)
    np.testing.assert_allclose(first["errors"], [each.errors for each in alone], rtol=1e-5)
    np.testing.assert_allclose(first["losses"], [each.probe_losses for each in alone], rtol=1e-12)
    np.testing.assert_allclose(first["changes"], alone[1].probe_changes, atol=1e-12)
