"""A conversion that is killed again and again ends with the same bytes; nothing half written is taken for whole.

``python tests/end_to_end/kill_conversion.py --kills 20`` is the long form, see ``tests/README.md``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.kill_conversion import differences, disturb, finish, start, write_input


@pytest.mark.slow
def test_kills_change_no_byte(tmp_path: Path) -> None:
    write_input(tmp_path, megabytes=6.0)
    finish(start(tmp_path, "undisturbed"))
    kills, outs = disturb(tmp_path, 3, seed=1)
    assert len(kills) == 3
    assert [differences(tmp_path / "undisturbed", out) for out in outs] == [[] for _ in outs]
