"""Strategies that are fitted to a table of runs: the weights of the tool, the run's caps and names, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cheapertraining.builders import build_strategy
from cheapertraining.config import load_run_config
from cheapertraining.errors import UserError
from cheapertraining.mixing import (
    Constraints,
    MixingLawStrategy,
    MixtureController,
    RegMixStrategy,
    SourceInfo,
    Strategy,
)
from cheapertraining.mixing.offline import LogLinearLaw, RunTable
from cheapertraining.mixing.offline.table import write_table
from tests.mixing.plan_mixture import PlanMixture
from tests.mixing.test_source_changes import run_yaml
from tools.fit_mixing_law import main

LAW = LogLinearLaw(2.0, np.array([0.6, -0.8, 0.4]))
SOURCES = ("code", "docs", "topics")


def table_of(runs: int = 24) -> RunTable:
    """Target ``good`` follows a law in which docs help; ``other`` is noise."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), runs)
    losses = np.stack([LAW.predict(weights) + 0.005 * rng.standard_normal(runs), rng.standard_normal(runs)], axis=1)
    return RunTable(SOURCES, ("good", "other"), weights, losses, tuple(f"r{n}" for n in range(runs)))


def weights_of(strategy: Strategy, sizes: dict[str, int], prior: list[float], horizon: int) -> dict[str, float]:
    strategy.reset([SourceInfo(name, size) for name, size in sizes.items()], np.array(prior), horizon)
    wish = strategy.propose(None)  # type: ignore[arg-type]  # no signal is looked at
    assert wish is not None
    assert wish.sum() == pytest.approx(1)
    return dict(zip(sizes, wish.tolist(), strict=True))


@pytest.mark.parametrize("method", ["law", "regmix"])
def test_weights_are_those_of_the_tool(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the same prior and caps, sources in another order; docs may be passed over four times."""
    if method == "regmix":
        pytest.importorskip("sklearn")
    write_table(table_of(), tmp_path / "t.csv")
    limits = ["--available", "topics=9000,docs=100,code=9000", "--tokens", "1000", "--kl", "0.01"]
    prior = ["--prior", "topics=2,docs=1,code=1", "--target", "good=2", "--bootstrap", "2", "--json"]
    assert main(["fit", str(tmp_path / "t.csv"), "--method", method, *limits, *prior]) == 0
    expected = json.loads(capsys.readouterr().out)["weights"]
    targets = {"good": 2.0}
    strategy = MixingLawStrategy(table_of(), targets, 0.01) if method == "law" else RegMixStrategy(table_of(), targets)
    found = weights_of(strategy, {"topics": 9000, "docs": 100, "code": 9000}, [0.5, 0.25, 0.25], 1000)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found["docs"] <= 0.4 + 1e-9
    assert found["docs"] > (0.399 if method == "law" else 0.3)


def test_weights_hold_from_the_first_batch() -> None:
    mixture = PlanMixture({"docs": 100, "code": 100, "topics": 100})
    strategy = MixingLawStrategy(table_of(), {"good": 1.0}, kl=0.01, max_epochs=None)
    controller = MixtureController(mixture, strategy, Constraints(floor=0.05), 5, 5, horizon_tokens=4000)
    decision = controller.start()
    assert decision is not None
    assert mixture.weights_at(0)["docs"] == pytest.approx(0.9, abs=1e-6)


def test_the_yaml_reads_the_table(tiny_sample: Path, tmp_path: Path) -> None:
    write_table(table_of(), tmp_path / "t.jsonl")
    yaml = run_yaml(tmp_path, tiny_sample, dict.fromkeys(SOURCES, 1.0))
    key = "algorithms.online_mixing"
    given = [f"{key}.mixing_law={{table: {tmp_path}/t.jsonl, targets: {{good: 1}}}}", f"{key}.strategy=mixing_law"]
    config = load_run_config(yaml, ["max_duration=8ba", *given]).algorithms.online_mixing
    assert config is not None
    found = weights_of(build_strategy(config), dict.fromkeys(SOURCES, 10**6), [1 / 3] * 3, 1000)
    assert max(found, key=lambda name: found[name]) == "docs"
    with pytest.raises(UserError, match=r"regmix\.table.*: expected a table of finished runs"):
        load_run_config(yaml, ["max_duration=8ba", f"{key}.strategy=regmix"])


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({"targets": {"god": 1.0}}, SOURCES, r"mixing_law: target 'god': not in the table .* Did you mean 'good'"),
        ({"targets": {"good": 0.0}}, SOURCES, "target 'good': expected a positive weight"),
        ({"kl": -1.0}, SOURCES, r"mixing_law\.kl: expected at least 0"),
        ({"max_epochs": 0.0}, SOURCES, r"mixing_law\.max_epochs: expected a positive number"),
        ({}, ("code", "doc", "topics"), r"no source of the run is named 'docs' .*Did you mean 'doc'"),
        ({}, (*SOURCES, "poems"), "has no column of source 'poems'"),
        ({"table": table_of(3)}, SOURCES, "3 runs cannot fix the 4 parameters"),
        ({"max_epochs": 1e-3}, SOURCES, "ceiling and max_epochs: the sources may give"),
    ],
)
def test_mistakes(settings: dict[str, Any], names: tuple[str, ...], message: str) -> None:
    def fitted() -> None:
        strategy = MixingLawStrategy(**({"table": table_of()} | settings))
        weights_of(strategy, dict.fromkeys(names, 1000), [1 / len(names)] * len(names), 1000)

    with pytest.raises(UserError, match=message):
        fitted()
