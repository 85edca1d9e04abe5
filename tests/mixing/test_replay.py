"""One run's ledger as another run's schedule: the pure part, and the tool over a run's real folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cheapertraining.config import load_run_config, planned_tokens
from cheapertraining.errors import UserError
from cheapertraining.mixing import Constraints, MixtureController, ScheduleStrategy
from cheapertraining.mixing.replay import changes_of, mean_weights, rename_sources, replay_points
from cheapertraining.training import train
from tests.mixing.plan_mixture import PlanMixture
from tests.mixing.test_source_changes import run_yaml as whole_run_yaml
from tools.replay_mixture import main, read_run

FIRST = {"a": 1.0, "b": 1.0}
DECISIONS = [
    {"batch": 1, "from_batch": None, "weights": {"a": 0.5, "b": 0.5}},
    {"batch": 2, "from_batch": 4, "weights": {"a": 0.75, "b": 0.25}},
    {"batch": 6, "from_batch": 8, "weights": {"a": 0.0, "b": 1.0}},
    {"batch": 9, "from_batch": 11, "weights": {"a": 1.0, "b": 0.0}},
]
CHANGES = changes_of(DECISIONS, FIRST, 10)


def test_changes_are_those_that_reached_a_batch() -> None:
    assert CHANGES == [(0, {"a": 0.5, "b": 0.5}), (4, {"a": 0.75, "b": 0.25}), (8, {"a": 0.0, "b": 1.0})]
    at_once = [{"from_batch": 0, "weights": {"a": 1.0, "b": 0.0}}]
    assert changes_of(at_once, FIRST, 10) == [(0, {"a": 1.0, "b": 0.0})]


def test_the_mean_counts_batches() -> None:
    mean = mean_weights(CHANGES, 10)
    assert mean == {"a": pytest.approx(0.4 * 0.5 + 0.4 * 0.75), "b": pytest.approx(0.4 * 0.5 + 0.4 * 0.25 + 0.2)}
    assert replay_points(CHANGES, 10, 10**6, mean=True) == [{"batch": 0, "weights": mean}]


def replayed(points: Sequence[Mapping[str, Any]], batches: int, **settings: Any) -> list[dict[str, float]]:
    """Weights of each batch of a run that follows ``points``, through the controller and the plan."""
    mixture = PlanMixture({"a": 1000, "b": 1000}, lag=2, **settings)
    free = Constraints(floor=0.0)
    controller = MixtureController(mixture, ScheduleStrategy(points), free, 1, 0, horizon_tokens=10**9)
    controller.start()
    course = []
    for batch in range(batches):
        course.append(mixture.weights_at(batch))
        mixture.next_batch()
        controller.step(batch + 1)
    return course


@pytest.mark.parametrize(("length", "unit", "size"), [(10, "batch", 10), (35, "batch", 10), (25 * 8 * 4, "tokens", 8)])
def test_each_batch_has_the_weights_of_the_same_share_of_the_old_run(length: int, unit: str, size: int) -> None:
    points = replay_points(CHANGES, 10, length, unit=unit)
    batches = length if unit == "batch" else length // (size * 4)
    for batch, weights in enumerate(replayed(points, batches, batch_size=size)):
        # Outside reference: the old run's step function at the share of the run that is done.
        begun = [each for start, each in CHANGES if round(start / 10 * batches + 1e-9) <= batch]
        assert weights == pytest.approx(begun[-1], abs=1e-9)


def test_a_short_run_takes_the_last_of_changes_that_fall_together() -> None:
    points = replay_points([(0, {"a": 1.0}), (1, {"b": 1.0}), (2, {"c": 1.0}), (90, {"d": 1.0})], 100, 10)
    assert points == [
        {"batch": 0, "weights": {"c": 1.0}},
        {"batch": 8, "weights": {"c": 1.0}},
        {"batch": 9, "weights": {"d": 1.0}},
    ]
    with pytest.raises(UserError, match="length: expected at least 1, found 0"):
        replay_points(CHANGES, 10, 0)
    with pytest.raises(UserError, match=r"unit: expected batch or tokens, found 'token'\. Did you mean 'tokens'"):
        replay_points(CHANGES, 10, 10, unit="token")


def test_names_of_another_run() -> None:
    three = [(0, {"a": 0.5, "b": 0.25, "c": 0.25}), (3, {"a": 0.0, "b": 0.25, "c": 0.75})]
    changed = rename_sources(three, rename={"a": "x"}, drop=["c", "new"], sources=["x", "b", "new"])
    assert changed == [(0, {"x": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}), (3, {"x": 0.0, "b": 1.0})]
    assert rename_sources(three) == three
    for settings, message in (
        ({"sources": ["x", "b", "c"]}, r"the ledger has a, .*; the other run has x, .*--rename OLD=NEW.*--drop NAME"),
        ({"drop": ["bb"]}, r"no source is named 'bb' \(a, b, c\). Did you mean 'b'"),
        ({"rename": {"d": "b"}, "sources": ["a", "b", "d"]}, r"no source is named 'd' \(a, b, c\)"),
        ({"rename": {"a": "b"}}, "more than one source of the ledger becomes 'b'"),
        ({"drop": ["b", "c"]}, "no weight is left at batch 3 without b, c"),
    ):
        with pytest.raises(UserError, match=message):
            rename_sources(three, **settings)  # type: ignore[arg-type]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a finished run over the tiny sample's sources, as a run leaves it."""
    folder = tmp_path / "small"
    folder.mkdir()
    weights = {"code": 2.0, "docs": 1.0, "topics": 1.0}
    rows = {name: {"weight_start": weight, "weight_end": 0.0} for name, weight in weights.items()}
    (folder / "summary.json").write_text(json.dumps({"batches": 8, "sources": rows}))
    entry = {"batch": 2, "from_batch": 4, "weights": {"code": 0.1, "docs": 0.3, "topics": 0.6}}
    (folder / "mixture.jsonl").write_text(json.dumps(entry) + '\n{"batch": 5, "from')
    return folder


def run_yaml(sample: Path, tmp_path: Path) -> Path:
    path = tmp_path / "big.yaml"
    path.write_text(f"max_duration: 24ba\ncompose: {{data: {sample / 'data.yaml'}}}\n")
    return path


def test_the_tool_writes_a_run_that_can_be_trained(tiny_sample: Path, tmp_path: Path, old: Path) -> None:
    out, target = tmp_path / "out.yaml", str(run_yaml(tiny_sample, tmp_path))
    caps = "algorithms.online_mixing.constraints.max_epochs=3"
    assert main([str(old / "mixture.jsonl"), "--for", target, caps, "run_name=big", "-o", str(out)]) == 0
    config = load_run_config(out)
    mixing = config.algorithms.online_mixing
    assert mixing is not None
    assert (mixing.strategy, mixing.interval, mixing.constraints.max_epochs) == ("schedule", "1ba", 3)
    assert [point.batch for point in mixing.schedule.points] == [0, 11, 12]
    assert mixing.schedule.points[0].weights == {"code": 0.5, "docs": 0.25, "topics": 0.25}
    assert mixing.schedule.points[2].weights == {"code": 0.1, "docs": 0.3, "topics": 0.6}
    assert planned_tokens(config) == planned_tokens(load_run_config(target))
    assert config.run_name == "big"


def test_the_tool_prints_a_section(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    (old / "checkpoints").mkdir()
    assert main([str(old / "checkpoints"), "--length", "80_000tok", "--mean", "--drop", "topics"]) == 0
    found: Any = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    points = found["algorithms"]["online_mixing"]["schedule"]["points"]
    # The mean of the two halves once topics is left out: (2/3 + 1/4) / 2.
    assert points == [{"tokens": 0, "weights": {"code": pytest.approx(11 / 24), "docs": pytest.approx(13 / 24)}}]
    (old / "mixture.jsonl").unlink()
    assert read_run(old).changes == [(0, {"code": 0.5, "docs": 0.25, "topics": 0.25})]


def test_mistakes_are_one_line(
    tiny_sample: Path, tmp_path: Path, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(run_yaml(tiny_sample, tmp_path))
    (old / "mixture.jsonl").write_text('{"batch": 2, "from_batch": 4, "weights": {"poems": 1.0}}\n')
    for arguments, message in (
        ([str(tmp_path / "nothing")], "expected the folder of a run or a file in it"),
        ([str(old / "else.jsonl")], "else.jsonl: no such file"),
        ([str(old), "--length", "5ep"], "--length: expected batches or tokens"),
        ([str(old), "--rename", "code"], "--rename: expected OLD=NEW, found code"),
        ([str(old), "--for", target], "the ledger has poems, which the other run has not"),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.startswith("replay_mixture: ")
        assert told.count("\n") == 1
    (old / "mixture.jsonl").write_text("[]\n")
    assert main([str(old)]) == 2
    assert "mixture.jsonl, line 1: not a decision of a run" in capsys.readouterr().err


def test_a_replay_of_a_replay_is_the_same(tmp_path: Path) -> None:
    """Stretched and shrunk back by whole numbers, a course is itself again."""
    there = replay_points(CHANGES, 10, 30)
    again = changes_of([{"from_batch": p["batch"], "weights": p["weights"]} for p in there], FIRST, 30)
    back = replayed(replay_points(again, 30, 10), 10)
    np.testing.assert_allclose([w["a"] for w in back], [0.5] * 4 + [0.75] * 4 + [0.0] * 2, atol=1e-9)


def test_a_run_that_adapted_is_replayed_by_a_longer_one(tiny_sample: Path, tmp_path: Path) -> None:
    """Through real runs: each batch of the new one is drawn with the weights of the old one at the same share."""
    yaml = whole_run_yaml(tmp_path, tiny_sample, {"code": 1.0, "docs": 1.0, "topics": 1.0})
    length = ["max_duration=8ba", "algorithms.online_mixing.strategy=odm", "save_folder=" + str(tmp_path / "old")]
    old = train(load_run_config(yaml, length)).state.train_dataloader.dataset  # type: ignore[union-attr]
    assert len({tuple(old.weights_at(batch).values()) for batch in range(8)}) > 1
    options = ["max_duration=24ba", "run_name=new", "--out", str(tmp_path / "new.yaml")]
    assert main([str(tmp_path / "old/tiny"), "--for", str(yaml), *options]) == 0
    new = train(load_run_config(tmp_path / "new.yaml")).state.train_dataloader.dataset  # type: ignore[union-attr]
    changes = read_run(tmp_path / "old/tiny").changes
    for batch in range(24):
        begun = [weights for start, weights in changes if 3 * start <= batch]
        assert new.weights_at(batch) == pytest.approx(begun[-1], abs=1e-8)
