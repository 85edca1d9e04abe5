"""Reading a run's folder and drawing it, from logs that the real writer made of given numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from browsing import browse, open_browser
from composer.core import State, Timestamp
from composer.loggers import Logger

from cheapertraining.commands import cli
from cheapertraining.errors import UserError
from cheapertraining.observe import JsonlLogger
from cheapertraining.observe.charts import POINTS, thin
from cheapertraining.observe.comparison import comparison, differences
from cheapertraining.observe.events import EVENTS, SPIKES
from cheapertraining.observe.report import report, write_report
from cheapertraining.observe.run_folder import LOG_VERSION, read_run
from tools import report as tool

SOURCES = ("code", "</script><b>odd</b>")


def write_log(folder: Path, steps: int, sources: tuple[str, ...] = SOURCES, slope: float = 0.01) -> Path:
    """The folder of a run, written by the logger of runs: a loss that falls by ``slope`` a step, weights that drift."""
    logger = JsonlLogger(folder)
    state = SimpleNamespace(run_name=folder.name, timestamp=Timestamp())
    as_state, nothing = cast(State, state), cast(Logger, None)
    logger.init(as_state, nothing)
    logger.fit_start(as_state, nothing)
    for step in range(1, steps + 1):
        metrics: dict[str, Any] = {"loss/train/total": 5 - slope * step, "time/token": step * 100.0}
        metrics |= {"time/train": step / 3600, "gradient/norm": 1.0, "lr-AdamW/group0": 1e-3}
        if step % 10 == 0:
            for place, name in enumerate(sources):
                share = (1 + place * step / steps) / sum(1 + k * step / steps for k in range(len(sources)))
                metrics |= {f"mixture/{what}/{name}": share for what in ("weight", "sampled", "share")}
                metrics |= {f"loss/train/{name}": 5 - slope * step + place, f"mixture/tokens/{name}": step * 50.0}
                metrics |= {f"mixture/epochs/{name}": step / 100, f"mixture/tokens_left/{name}": 1e6 - step}
                metrics |= {f"metrics/heldout/{name}/TokenCrossEntropy": 6 - slope * step}
                metrics |= {f"mixture/score/code/{name}": 0.1 * place, f"mixture/score_se/code/{name}": 0.05}
            metrics |= {"event/loss_spikes": float(step >= 20), "event/nonfinite": 0.0}
        state.timestamp = Timestamp(batch=step, token=step * 100)
        logger.log_metrics(metrics, step)
        logger.batch_end(as_state, nothing)
    logger.fit_end(as_state, nothing)
    (folder / "config.yaml").write_text(f"seed: 1\noptimizer: {{lr: {slope}}}\n", encoding="utf-8")
    (folder / "summary.json").write_text('{"sources": {}}', encoding="utf-8")
    return folder


def figures(page: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'application/json">(.*?)</script>', page)]


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path / "a", 30))
    assert (run.name, run.sources, run.notes) == ("a", list(SOURCES), [])
    assert run.metrics["loss/train/total"].values == pytest.approx([5 - 0.01 * step for step in range(1, 31)])
    assert run.tokens_at(np.array([0.0, 15.0, 30.0])) == pytest.approx([0, 1500, 3000])
    assert run.hours_at(np.array([30.0])) == pytest.approx([30 / 3600])


def test_names_cannot_end_the_script_that_holds_them(tmp_path: Path) -> None:
    page = report(read_run(write_log(tmp_path / "a", 20)))
    assert SOURCES[1] not in page.replace(page[page.index("<script>/") : page.rindex("<script>")], "")
    names = {trace.get("name") for figure in figures(page) for trace in figure["data"]}
    assert SOURCES[1] in names


def test_spikes_and_events_are_told(tmp_path: Path) -> None:
    page = report(read_run(write_log(tmp_path / "a", 30)))
    assert f"<td>20</td><td>loss spike. {EVENTS[SPIKES].advice}</td>" in page


def test_half_written_folders_are_drawn_with_what_they_have(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "a", 20)
    for name in ("summary.json", "config.yaml", "run.json"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 21, "loss/tr')
    path = write_report(folder)
    notes = " ".join(read_run(folder).notes)
    assert "summary.json is not there" in notes
    assert "1 line is not whole" in notes
    assert "of version 1" in notes
    assert "1 line is not whole" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", '{"step": 3, "sou', "\x00\x01: [", "[1, 2]", '{"sources": [1], "weights": 3}'])
@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "run.json", "mixture.jsonl", "environment.json"])
def test_a_file_that_is_torn_or_foreign_stops_neither_report_nor_comparison(
    tmp_path: Path, name: str, content: str
) -> None:
    whole, torn = write_log(tmp_path / "whole", 12), write_log(tmp_path / "torn", 12)
    (torn / "mixture.jsonl").write_text('{"batch": 5, "from_batch": 8, "weights": {"code": 0.7}}\n', encoding="utf-8")
    (torn / name).write_text(content, encoding="utf-8")
    assert cli.main(["report", str(torn)]) == 0
    assert "Training loss" in (torn / "report.html").read_text(encoding="utf-8")
    assert cli.main(["report", str(whole), str(torn), "--out", str(tmp_path / "both.html")]) == 0
    assert "<th>torn</th>" in (tmp_path / "both.html").read_text(encoding="utf-8")
    if name in ("summary.json", "mixture.jsonl") and content == '{"sources": [1], "weights": 3}':
        assert "left out" in " ".join(read_run(torn).notes)


def test_a_log_of_the_first_version_is_drawn_beside_one_of_now(tmp_path: Path) -> None:
    old, new = write_log(tmp_path / "old", 20), write_log(tmp_path / "new", 20)
    later = re.compile(r"gradient/|event/|mixture/share/|time/data_wait")
    lines = [json.loads(line) for line in (old / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [{name: value for name, value in line.items() if not later.match(name)} for line in lines]
    (old / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = json.loads((old / "run.json").read_text(encoding="utf-8"))
    del settings["log_version"]
    (old / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    assert cli.main(["report", str(old)]) == 0
    page = (old / "report.html").read_text(encoding="utf-8")
    assert f"The log is of version 1 (now {LOG_VERSION})" in page
    assert "Held-out loss by source" in page
    assert "Share of all tokens so far" not in page
    assert cli.main(["report", str(old), str(new), "--out", str(tmp_path / "both.html")]) == 0
    assert "old: The log is of version 1" in (tmp_path / "both.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "expected the folder of a run"),
        (lambda folder: folder.mkdir(), "expected the log of a run, found none"),
        (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").write_text("")), "The run has not begun to train"),
        (
            lambda folder: (
                folder.mkdir(),
                (folder / "metrics.jsonl").write_text('{"step": 1, "loss/train/total": 2}\n'),
                (folder / "run.json").write_text(json.dumps({"log_version": LOG_VERSION + 1})),
            ),
            f"expected a log of version {LOG_VERSION} or older, found {LOG_VERSION + 1}",
        ),
    ],
)
def test_what_is_no_run_is_said_in_a_line(
    tmp_path: Path, prepare: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path / "bad")
    with pytest.raises(UserError, match=re.escape(message)):
        read_run(tmp_path / "bad")
    assert tool.main([str(tmp_path / "bad")]) == 2
    assert message in capsys.readouterr().err


def test_runs_near_a_wrong_folder_are_named(tmp_path: Path) -> None:
    write_log(tmp_path / "runs" / "mine", 10)
    with pytest.raises(UserError, match=r"Runs near it: .*runs/mine"):
        read_run(tmp_path / "runs")


def test_comparison_draws_each_run_over_tokens_and_over_hours(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / "a", 30), write_log(tmp_path / "b", 20, slope=0.02)]
    assert tool.main([*map(str, folders), "--out", str(tmp_path / "ab.html")]) == 0
    page = (tmp_path / "ab.html").read_text(encoding="utf-8")
    training = [each for each in figures(page) if each["layout"]["title"]["text"] == "Training loss"]
    assert [each["layout"]["xaxis"]["title"]["text"] for each in training] == ["tokens", "hours"]
    for figure, last in zip(training, ([3000, 2000], [30 / 3600, 20 / 3600]), strict=True):
        assert [trace["name"] for trace in figure["data"]] == ["a", "b"]
        assert [trace["x"][-1] for trace in figure["data"]] == pytest.approx(last, rel=1e-4)
    assert "<td>optimizer.lr</td><td>0.01</td><td>0.02</td>" in page


@pytest.mark.parametrize("width", [1200, 390])
def test_comparison_in_a_browser(tmp_path: Path, width: int) -> None:
    with open_browser() as browser:
        runs = [read_run(write_log(tmp_path / name, 60, slope=slope)) for name, slope in (("a", 0.01), ("b", 0.02))]
        (tmp_path / "both.html").write_text(comparison(runs), encoding="utf-8")
        browse(browser, tmp_path / "both.html", width, "Loss over tokens", expected="b : ")


def test_comparison_wants_runs_of_different_names(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path / "a", 10))
    with pytest.raises(UserError, match="different names"):
        comparison([run, run])


def test_differences_of_settings() -> None:
    assert differences(["a: {b: 1, c: 2}", "a: {b: 1, c: 3, d: x}"]) == {"a.c": ["2", "3"], "a.d": ["", "x"]}


def test_thinning_keeps_means_ends_and_gaps() -> None:
    x, y = np.arange(1.0, 10_001), np.sin(np.arange(10_000) / 300)
    xs, ys = thin(x, y)
    assert len(xs) == POINTS
    assert xs[-1] == 10_000
    assert np.mean(cast(list[float], ys)) == pytest.approx(y.mean(), abs=1e-4)
    assert ys[0] == pytest.approx(y[:25].mean(), rel=1e-4)
    gaps = thin(np.array([1.0, 2.0]), np.array([math.nan, 1.0]))
    assert gaps == ([1.0, 2.0], [None, 1.0])
