"""From planned mixtures through real runs to a proposal: the files it writes train, and each mistake is one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cheapertraining.config import load_data_config, load_run_config
from cheapertraining.mixing.offline import LogLinearLaw, RunTable, read_table
from cheapertraining.mixing.offline.table import write_table
from cheapertraining.training import train
from tools.fit_mixing_law import main

LAW = LogLinearLaw(2.0, np.array([0.6, -0.8, 0.4]))
SOURCES = ("code", "docs", "topics")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """24 runs over three sources; target ``probe/code`` follows a law in which docs help, ``probe/noise`` none."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), 24)
    losses = np.stack([LAW.predict(weights) + 0.005 * rng.standard_normal(24), rng.standard_normal(24)], axis=1)
    runs = tuple(f"swarm-{n}" for n in range(24))
    write_table(RunTable(SOURCES, ("probe/code", "probe/noise"), weights, losses, runs), tmp_path / "swarm.csv")
    return tmp_path / "swarm.csv"


def fit(table: Path, *options: str) -> int:
    return main(["fit", str(table), "--bootstrap", "20", *options])


def test_the_report(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(table, "--target", "probe/code", "--ceiling", "0.8") == 0
    printed = capsys.readouterr().out
    assert "law: 24 runs, 3 sources" in printed
    assert "warning" not in printed
    assert "gain 0." in printed
    assert "probe/noise" not in printed
    assert fit(table) == 0
    assert "warning: target 'probe/noise': runs that were not fitted are ranked with a" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["law", pytest.param("regmix", marks=pytest.mark.slow)])
def test_json_has_what_the_report_has(table: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    if method == "regmix":
        pytest.importorskip("sklearn")
    options = ["--target", "probe/code=2", "--method", method, "--json", "--prior", "code=2,docs=1,topics=1"]
    assert fit(table, *options, "--kl", "0.01") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert max(found["weights"], key=found["weights"].get) == "docs"
    assert sum(found["weights"].values()) == pytest.approx(1)
    assert found["prior"] == {"code": 0.5, "docs": 0.25, "topics": 0.25}
    assert found["predicted_loss"] < found["predicted_loss_at_prior"]
    assert found["targets"]["probe/code"]["spearman"] > 0.6
    if method == "law":
        exponents = found["targets"]["probe/code"]["exponents"]
        assert exponents["docs"] < exponents["topics"] < exponents["code"]
        assert found["gain"][1] < found["gain"][0] < found["gain"][2]
        assert fit(table, *options, "--kl", "0.01") == 0
        assert json.loads(capsys.readouterr().out) == found


def test_what_it_writes_is_taken(table: Path, tiny_sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(tiny_sample / "data.yaml"), table.with_name("mixture.yaml")
    limits = ["--available", "docs=100", "--tokens", "1000", "--kl", "0", "--floor", "0.05"]
    assert fit(table, "--target", "probe/code", "--data", data, "--out", str(out), *limits) == 0
    assert f"compose.data={out}" in capsys.readouterr().out
    config = load_data_config(out)
    weights = {name: source.weight for name, source in config.sources.items()}
    assert weights["docs"] == 0.4  # four epochs of 100 tokens in 1,000
    assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
    assert min(weights.values()) >= 0.05 - 1e-6
    assert config.probes["code"].source == "code"
    assert fit(table, "--out", str(table.with_name("m.json"))) == 0
    assert json.loads(table.with_name("m.json").read_text()).keys() == set(SOURCES)
    assert fit(table, "--out", str(table.with_name("part.yaml"))) == 0
    assert 'data:\n  sources:\n    "code": {weight: 0.' in table.with_name("part.yaml").read_text()


def test_caps_from_the_shards(table: Path, tiny_sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With 20,000 tokens, docs may be passed over half a time only, as the data yaml says."""
    options = ["--data", str(tiny_sample / "data.yaml"), "data.sources.docs.max_epochs=0.5", "--kl", "0", "--json"]
    assert fit(table, "--target", "probe/code", *options, "--tokens", "20k") == 0
    found = json.loads(capsys.readouterr().out)
    meta = json.loads((tiny_sample / "docs" / "train" / "meta.json").read_text())
    assert found["weights"]["docs"] == pytest.approx(min(1, 0.5 * meta["tokens"] / 20_000), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "probe/cod"], "target 'probe/cod': not in the table (probe/code, probe/noise). Did you mean"),
        (["--target", "probe/code=-1"], "--target: expected a positive weight"),
        (["--prior", "code=1,wiki=1"], "--prior: no source is named 'wiki'"),
        (["--prior", "code"], "--prior: expected NAME=NUMBER"),
        (["--tokens", "20B"], "--tokens: caps need the sizes"),
        (["--available", "docs=1"], "--available: caps need the length"),
        (["--available", "docs=many", "--tokens", "5"], "--available: expected a number"),
        (["--floor", "0.5"], "floor: 3 sources of at least 0.5 sum to 1.5"),
        (["--losses", "absent.csv"], "absent.csv: not a readable CSV file"),
        (["--bootstrap", "1"], "expected --bootstrap of at least 2"),
        (["--data", "mixed_pretrain", "data.seq_len=0"], "data.seq_len (command line): expected"),
    ],
)
def test_bad_input(table: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(table, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("fit_mixing_law: ")
    assert message in error
    assert error.count("\n") == 1


def test_too_few_runs(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:4]))
    assert fit(table) == 2
    assert "3 runs cannot fix the 4 parameters" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_train_collect_fit(tiny_sample: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that are planned are run as they stand, in this process."""
    folder = tiny_run.parent
    data, plan = str(tiny_sample / "data.yaml"), folder / "swarm"
    limits = ["--available", "code=1000", "--tokens", "8000", "--prior", "uniform"]
    options = ["--runs", "6", "--out", str(plan), "--run", str(tiny_run), "--set", "max_duration=4ba"]
    assert main(["plan", data, *options, *limits]) == 0
    commands = [shlex.split(line) for line in (plan / "commands.sh").read_text().splitlines()[2:]]
    assert len(commands) == 6
    drawn = []
    for command in commands:
        assert command[:3] == ["python", "train.py", str(tiny_run)]
        config = load_run_config(command[2], command[3:])
        drawn.append([source.weight for source in config.data.sources.values()])
        train(config)
    assert max(row[0] for row in drawn) <= 0.5
    table = folder / "swarm.jsonl"
    runs = [str(folder / "runs" / f"swarm-{n}") for n in range(6)]
    capsys.readouterr()
    assert main(["collect", *runs, str(folder / "absent"), "--out", str(table)]) == 0
    told = capsys.readouterr()
    assert "targets probe/code" in told.out
    assert "1 of 7 have no summary.json" in told.err
    collected = read_table(table)
    np.testing.assert_allclose(collected.weights, drawn, atol=1e-5)
    assert np.ptp(collected.losses) > 0
    assert fit(table, "--data", data, "--out", str(folder / "mixture.yaml")) == 0
    load_run_config(tiny_run, [f"compose.data={folder}/mixture.yaml", "algorithms.online_mixing=null"])


def test_plan_says_what_is_wrong(tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["plan", str(tiny_sample / "data.yaml"), "--out", str(tmp_path / "swarm"), "--runs"]
    for options, message in (
        (["4", "--set", "max_durations=2ba"], "max_durations"),
        (["0"], "runs: expected a positive number"),
        (["4", "--temperature", "0"], "temperature: expected a positive number"),
        (["4", "--concentration", "2", "1"], "concentration: expected 0 < LOW <= HIGH"),
    ):
        assert main([*start, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*start, "4"]) == 0
    assert "warning: a law has 4 parameters" in capsys.readouterr().out
