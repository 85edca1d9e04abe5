"""Which rows real runs train on, and with which weights: one order for any number of workers and ranks.

Also after a stop; and then with the same losses, bit by bit, where the number of ranks is the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cheapertraining.data import read_meta
from tests.end_to_end.real_runs import (
    comparable_metrics,
    decisions,
    final_state,
    model_hash,
    record,
    recorded,
    write_yaml,
)

pytestmark = pytest.mark.slow

BATCHES = 160
LAG = 8
INTERVAL = 10
SCHEDULE = {
    "strategy": "schedule",
    "interval": f"{INTERVAL}ba",
    "constraints": {"floor": 0.0, "kl_step": None},
    "schedule": {
        "points": [
            {"batch": 0, "weights": {"code": 8, "docs": 1, "topics": 1}},
            {"batch": 90, "weights": {"code": 2, "docs": 5, "topics": 3}},
            {"batch": 210, "weights": {"code": 3, "docs": 0, "topics": 7}},
        ]
    },
}
# No allowance for chance: what is to be shown is that weights which move, move alike.
INFLUENCE = {"strategy": "influence", "interval": "5ba", "warmup": "5ba", "influence": {"ema": 0.7, "threshold": 0.0}}
ONE, TWO = "train_loader.num_workers=1", "train_loader.num_workers=2"
PERSISTENT = "train_loader.persistent_workers=true"
RESUME = "autoresume=true"


@dataclass
class Runs:
    """Folder of the records, and below it ``runs/<run_name>``."""

    folder: Path

    def order(self, label: str) -> list[dict[str, Any]]:
        return recorded(self.folder, label)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def runs(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of this file, in processes that are started three times."""
    folder = tmp_path_factory.mktemp("order")
    data = tiny_sample / "data.yaml"
    order = str(
        write_yaml(folder / "order.yaml", data, max_duration=f"{BATCHES}ba", algorithms={"online_mixing": SCHEDULE})
    )
    measuring = {"batch_size": 16, "interval": "25ba", "subset_num_batches": 1}
    influence = write_yaml(
        folder / "influence.yaml",
        data,
        max_duration="120ba",
        eval_loader=measuring,
        algorithms={"gradient_clipping": {"threshold": 1.0}, "online_mixing": INFLUENCE},
    )

    def scheduled(label: str, *overrides: str, run: str | None = None, stop: int | None = None) -> dict[str, Any]:
        name = [f"run_name={run}", RESUME] if run else []
        return {"label": label, "yaml": order, "overrides": [*overrides, *name], "stop": stop}

    def influenced(label: str, *overrides: str, stop: int | None = None) -> dict[str, Any]:
        return {"label": label, "yaml": str(influence), "overrides": list(overrides), "stop": stop}

    record(
        2,
        [
            scheduled("ranks-2", ONE, PERSISTENT),
            scheduled("two-to-one", stop=77),
            influenced("undisturbed"),
            influenced("stopped", stop=61),
        ],
        folder,
    )
    record(
        1,
        [
            scheduled("workers-0"),
            scheduled("workers-1", ONE),
            scheduled("workers-2", TWO),
            scheduled("workers-2-persistent", TWO, PERSISTENT),
            scheduled("two-to-one-rest", TWO, run="two-to-one"),
            scheduled("one-to-two", TWO, stop=131),
        ],
        folder,
    )
    record(
        2,
        [
            scheduled("one-to-two-rest", ONE, run="one-to-two"),
            influenced("stopped-rest", ONE, "run_name=stopped", RESUME),
        ],
        folder,
    )
    return Runs(folder)


@pytest.mark.parametrize("label", ["workers-1", "workers-2", "workers-2-persistent", "ranks-2"])
def test_order_is_that_of_one_process_without_workers(runs: Runs, label: str) -> None:
    reference = runs.order("workers-0")
    assert [batch["batch"] for batch in reference] == list(range(BATCHES))
    assert all(len(batch["sample"]) == 12 for batch in reference)
    assert runs.order(label) == reference


@pytest.mark.parametrize(("name", "stop"), [("two-to-one", 77), ("one-to-two", 131)])
def test_order_goes_on_after_a_stop_on_other_ranks_and_workers(runs: Runs, name: str, stop: int) -> None:
    """2 ranks without workers, then 1 with 2 workers; 1 with 2 workers, then 2 with 1 each."""
    before, after = runs.order(name), runs.order(f"{name}-rest")
    assert (len(before), after[0]["batch"]) == (stop + 1, stop + 1)
    assert before + after == runs.order("workers-0")
    steps = comparable_metrics(runs.run(name))
    assert list(steps) == list(range(BATCHES + 1))


def test_weights_change_at_the_batches_they_should(runs: Runs) -> None:
    """A decision every 10 batches counts from 8 batches (the lag) later."""
    weights = [batch["weights"] for batch in runs.order("workers-0")]
    changes = [number for number in range(1, BATCHES) if weights[number] != weights[number - 1]]
    assert changes == list(range(INTERVAL + LAG, BATCHES, INTERVAL))
    places = np.array([0, 90, 210])
    for number in (0, *changes):
        for name, at_points in {"code": (0.8, 0.2, 0.3), "docs": (0.1, 0.5, 0.0), "topics": (0.1, 0.3, 0.7)}.items():
            assert weights[number][name] == pytest.approx(np.interp(number, places, at_points), abs=1e-9)


def test_drawn_rows_have_the_weights_that_were_in_force(runs: Runs) -> None:
    """No source is more than a row beyond its exact share in a batch, nor much more over the run."""
    exact, drawn = np.zeros(3), np.zeros(3)
    for batch in runs.order("ranks-2"):
        share = 12 * np.array([batch["weights"][name] for name in ("code", "docs", "topics")])
        counts = np.bincount(batch["source"], minlength=3)
        assert np.abs(counts - share).max() < 1 + 1e-6
        exact, drawn = exact + share, drawn + counts
    assert np.abs(drawn - exact).max() < 4


def test_one_pass_brings_each_sample_once_over_two_ranks(runs: Runs, tiny_sample: Path) -> None:
    """After every batch, samples of a source have come equally often, or once more: no repeat before all have come."""
    names = ("code", "docs", "topics")
    times = [np.zeros(read_meta(tiny_sample / name / "train").samples, np.int64) for name in names]
    rows: dict[tuple[int, int], set[int]] = defaultdict(set)
    for batch in runs.order("ranks-2"):
        for source, sample, row in zip(batch["source"], batch["sample"], batch["rows"], strict=True):
            times[source][sample] += 1
            rows[source, sample].add(row)
        assert all(count.max() - count.min() <= 1 for count in times)
    assert all(count.min() >= 1 for count in times), "a source was not passed through, so this shows nothing"
    assert all(len(contents) == 1 for contents in rows.values())  # an id is one row, whoever reads it


def test_resumed_run_on_the_same_ranks_is_equal_to_the_last_bit(runs: Runs) -> None:
    """Two ranks, a SIGTERM at one, new processes with other workers; training itself decides on the weights."""
    assert runs.order("stopped") + runs.order("stopped-rest") == runs.order("undisturbed")
    undisturbed, stopped = runs.run("undisturbed"), runs.run("stopped")
    assert comparable_metrics(stopped) == comparable_metrics(undisturbed)
    ours, theirs = final_state(stopped), final_state(undisturbed)
    assert model_hash(ours) == model_hash(theirs)
    assert ours["dataset_state"] == theirs["dataset_state"]
    assert decisions(ours) == decisions(theirs)
    weights = {tuple(batch["weights"].values()) for batch in runs.order("undisturbed")}
    assert len(weights) > 5, "the mixture hardly moves, so this shows nothing"
