"""The benchmark of verify runs, with tiny shards, and finds no fault with them."""

from __future__ import annotations

import sys

import pytest

from tools.bench import verify


def test_verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "SHARD_BYTES", 400_000)
    monkeypatch.setattr(sys, "argv", ["verify.py", "--megabytes", "1", "--workers", "2", "--rounds", "1"])
    verify.main()  # ends with an error if verify finds anything
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == list(verify.KINDS)
