"""The dashboard's panels: complete, valid to W&B's own library, and sendable only where there is a key.

That no panel is empty is held against a real run's log in tests/observe/test_real_run.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cheapertraining.config import load_run_config
from cheapertraining.observe.vocabulary import GROUPS, VOCABULARY
from tools import wandb_dashboard
from tools.wandb_dashboard import chosen, panels, workspace

ROOT = Path(__file__).parents[2]


def test_dry_run_prints_the_panels(capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_dashboard.main(["--project", "mine", "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["project"] == "mine"
    assert [panel["title"] for panel in printed["panels"]] == [panel.title for panel in chosen(None)]


def test_every_metric_of_the_vocabulary_is_in_a_panel() -> None:
    for entry in VOCABULARY:
        example = re.sub(r"\{\w+\}", "x", entry.pattern.replace("{split}", "heldout/x"))
        known = {"time/x": "time/token", "memory/x": "memory/peak_reserved_mem", "distillation/x": "distillation/kl"}
        example = known.get(example, example)
        assert any(re.search(panel.regex, example) for panel in panels()), entry.pattern


def test_panels_follow_the_log_of_a_run() -> None:
    titles = [panel.title for panel in chosen(["loss/train/total", "distillation/divergence"])]
    shown = ["Training loss", "Training loss by source", "Mixture over batches", "Divergence and losses"]
    assert titles == shown


def test_wandbs_library_takes_the_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    made = workspace("project", "team", panels())
    assert [section.name.partition(":")[0] for section in made.sections] == list(GROUPS)
    drawn: list[Any] = [panel for section in made.sections for panel in section.panels]
    assert len(drawn) == len(panels())
    assert "metrics/heldout" in made._to_model().model_dump_json()


@pytest.mark.parametrize(("key", "message"), [("", "wandb login"), ("a" * 40, "gives no answer to go by")])
def test_without_a_key_or_a_server_it_says_what_to_do(
    key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb_dashboard.main(["--project", "mine", "--entity", "team"]) == 2
    assert message in capsys.readouterr().err


def test_the_sweep_asks_for_keys_that_a_run_has() -> None:
    import yaml

    sweep = yaml.safe_load((ROOT / "yamls" / "sweeps" / "mixture.yaml").read_text(encoding="utf-8"))
    run, *fixed, rest = sweep["command"][3:]
    assert rest == "${args_no_hyphens}"
    for pick in (0, -1):
        chosen_values = [
            f"{key}={given['values'][pick] if 'values' in given else given['max']}"
            for key, given in sweep["parameters"].items()
        ]
        config = load_run_config(ROOT / run, [*fixed, *chosen_values])
        assert config.loggers.wandb is not None
        assert config.loggers.wandb.mode == "online"
    assert sweep["metric"]["name"].split("/")[2] in config.data.sources
