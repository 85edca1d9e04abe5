"""Lines a person reads while training runs."""

from __future__ import annotations

import io
import os
import pty
import re
from pathlib import Path

import pytest
from tiny_trainer import ChangeWeights, tiny_loader, tiny_trainer

from cheapertraining.observe import ConsoleLines, progress_bar_fits
from cheapertraining.observe.console import _clock, _mixture, _short, mixture_bar

CHANGED = {"code": 0.6, "docs": 0.2, "topics": 0.2}


def _lines(sample: Path, runs: Path, stream: io.TextIOBase, batches: int = 6) -> None:
    loader = tiny_loader(sample)
    callbacks = [ChangeWeights(loader, {3: CHANGED}), ConsoleLines(loader.mixture, interval=4, stream=stream)]  # type: ignore[arg-type]
    trainer = tiny_trainer(loader, runs, batches, callbacks)
    trainer.fit()
    trainer.close()


def test_lines_tell_progress_evaluation_and_change(tiny_sample: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    _lines(tiny_sample, tmp_path, stream)
    lines = stream.getvalue().splitlines()
    kinds = [
        r"tiny: [\d.]+k parameters, from batch 1 to 6ba, code 33% docs 33% topics 33%",
        r"batch 1/6  loss 6\.\d{3}  [\d.]+k? tok/s  eta \d+s  lr 1\.0e-02  code 33% docs 33% topics 33%",
        r"batch 3: mixture from batch 5 on: code 60% \(\+27\) docs 20% \(-13\) topics 20% \(-13\)",
        r"batch 4/6  loss \d\.\d{3}  .*  code 33% docs 33% topics 33%",
        r"batch 4: evaluated  heldout/code \d\.\d{3}  heldout/docs .*  probe/code \d\.\d{3}",
        r"batch 6/6  loss \d\.\d{3}  .*  eta 0s  .*  code 60% docs 20% topics 20%",
        r"batch 6: evaluated  .*",
    ]
    assert len(lines) == len(kinds)
    for line, kind in zip(lines, kinds, strict=True):
        assert re.fullmatch(kind, line), line


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_on_terminals_unless_unwanted(
    tiny_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        assert progress_bar_fits(terminal)
        _lines(tiny_sample, tmp_path, terminal, batches=1)
        text = os.read(reader, 10_000).decode()
    os.close(reader)
    assert "batch 1/1" in text
    assert ("\033[" in text) == coloured


def test_a_bar_shares_out_its_cells() -> None:
    weights = {"wiki": 0.5, "code": 0.3, "docs": 0.19, "noise": 0.01}
    assert mixture_bar(weights, coloured=False, width=10) == "[wwwwwcccdd]"
    bar = mixture_bar(weights, coloured=True, width=10)
    assert re.sub(r"\033\[[\d;]*m", "", bar) == " " * 10
    assert bar.endswith("\033[0m")
    assert mixture_bar({"a": 1, "b": 1, "c": 1}, coloured=False, width=4) == "[aabc]"


def test_a_progress_bar_needs_a_terminal(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        assert not progress_bar_fits(file)


def test_a_mixture_of_many_sources_is_cut_short() -> None:
    weights = {f"s{n}": w for n, w in enumerate([0.05] * 6 + [0.3, 0.2] + [0.1, 0.1])}
    assert _mixture(weights) == "s6 30% s7 20% s8 10% s9 10% s0 5% s1 5% s2 5% s3 5% +2 more"
    assert _mixture({"a": 0.504, "b": 0.496}, {"a": 0.5, "b": 0.5}) == "a 50% b 50%"


@pytest.mark.parametrize(
    ("number", "short"),
    [
        (0, "0"),
        (950, "950"),
        (9_840, "9.8k"),
        (99_960, "100k"),
        (999_600, "1.0M"),
        (140_248_512, "140M"),
        (6.7e9, "6.7G"),
    ],
)
def test_short_counts(number: float, short: str) -> None:
    assert _short(number) == short


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m00s"), (130, "2m10s"), (3 * 3600 + 301, "3h05m"), (2 * 86400 + 4 * 3600, "2d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _clock(seconds) == text
