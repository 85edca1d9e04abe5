"""Runs through the front door whose mixture is measured while layers are cut: the decisions of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mixing.tensor_ranks import LAYOUTS, RUNS, measure, work
from tests.processes import run_on_ranks
from tools.bench._layouts import config_of, metrics_of, run_once, tiny_yaml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    mixing = {"interval": "3ba", "warmup": "0ba", "influence": {"probe_samples": 4, "source_samples": 3}}
    path = tiny_yaml(
        tmp_path_factory.mktemp("mixing") / "run.yaml",
        tiny_sample / "data.yaml",
        max_duration="6ba",
        algorithms={"gradient_clipping": {"threshold": 1.0}, "online_mixing": mixing},
    )
    reference = ["run_name=reference", "algorithms.online_mixing=null", "max_duration=2ba", "save_interval=2ba"]
    run_once(config_of(path, "single", *reference))
    checkpoint = path.parent / "runs" / "reference" / "checkpoints" / "ep0-ba2-rank0.pt"
    measure(path, "single", RUNS, checkpoint)
    for layout, (ranks, _) in LAYOUTS.items():
        run_on_ranks(work, path, layout, checkpoint, ranks=ranks)
    return path.parent / "runs"


def metrics(runs: Path, run: str) -> dict[str, list[float]]:
    """Logged numbers of the mixture and losses, by name."""
    kinds = ("weight/", "score", "probe_loss/", "gradient")
    return metrics_of(runs / run, "loss/", *(f"mixture/{kind}" for kind in kinds))


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, (_, names) in LAYOUTS.items() for name in names]
)
def test_decisions_and_losses_are_those_of_one_process(layout: str, name: str, runs: Path) -> None:
    found, expected = metrics(runs, f"{layout}-{name}"), metrics(runs, f"single-{name}")
    assert found.keys() == expected.keys()
    moved = {value for key, values in expected.items() if key.startswith("mixture/weight/") for value in values}
    assert len(moved) > 3
    for key, values in expected.items():
        kind = key.rsplit("/", 1)[0]
        largest = max(abs(each) for other in expected if other.startswith(kind) for each in expected[other])
        # Products of gradients are differences along a direction here, and of watched layers in one process.
        allowed = 1e-3 if name == "gradients" and "gradient" in key else 1e-4
        assert found[key] == pytest.approx(values, abs=allowed * largest), key
        if key == "loss/train/total":
            assert found[key] == pytest.approx(values, rel=1e-5)
