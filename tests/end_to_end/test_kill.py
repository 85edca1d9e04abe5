"""kill -9 at a random moment: with ``autoresume`` the run ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.kill_many import TRAIN, arguments_of, differences, disturb, random_kills, write_run
from tests.end_to_end.real_runs import finish, read_metrics
from tests.processes import Started, start

pytestmark = pytest.mark.slow


def test_three_kills_leave_no_trace(tiny_sample: Path, tmp_path: Path) -> None:
    """One while it starts, one in training, one while it saves. ``kill_many.py`` does more, under the launcher."""
    run_yaml = write_run(tiny_sample, tmp_path)

    def begin(run: str) -> Started:
        return start(TRAIN, *arguments_of(run_yaml, run), folder=tmp_path)

    undisturbed = begin("undisturbed")
    kills = random_kills(3, seed=1, only_whole=True)
    assert [kill.moment for kill in kills] == ["starting", "batch", "saving"]
    disturb(begin, run_yaml, kills)
    finish(undisturbed)
    assert differences(tmp_path) == []
    steps = read_metrics(tmp_path / "runs" / "disturbed")
    weights = {line["mixture/weight/code"] for line in steps.values() if "mixture/weight/code" in line}
    assert len(weights) > 5, "the mixture hardly moves, so this shows nothing"
