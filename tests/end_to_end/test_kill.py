"""kill -9 at a random moment: with ``autoresume`` the run ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.kill_many import differences, disturb, random_kills, start, write_run
from tests.end_to_end.real_runs import finish, read_metrics

pytestmark = pytest.mark.slow


def test_three_kills_leave_no_trace(tiny_sample: Path, tmp_path: Path) -> None:
    """One while it starts, one in training, one while it saves. ``kill_many.py`` does more, and on two ranks."""
    run_yaml = write_run(tiny_sample, tmp_path)
    undisturbed = start(1, run_yaml, "undisturbed")
    kills = random_kills(3, seed=1, only_whole=True)
    assert [kill.moment for kill in kills] == ["starting", "batch", "saving"]
    disturb(1, run_yaml, kills)
    finish(undisturbed)
    assert differences(tmp_path) == []
    steps = read_metrics(tmp_path / "runs" / "disturbed")
    weights = {line["mixture/weight/code"] for line in steps.values() if "mixture/weight/code" in line}
    assert len(weights) > 5, "the mixture hardly moves, so this shows nothing"
