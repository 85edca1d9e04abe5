"""One real run that logs whatever there is to log: vocabulary, report, dashboard, texts, pictures, a browser."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from browsing import browse, open_browser

from cheapertraining.observe.run_folder import LOG_VERSION, RunFolder, read_run
from cheapertraining.observe.vocabulary import VOCABULARY, find, table
from tools import wandb_dashboard

BATCHES = 20
CUDA_ALONE = {"memory/{stat}"}
"""Metrics that no CPU has; `throughput/device/mfu` is another."""


@dataclass
class Logged:
    """A finished run's folder and what was read from it."""

    folder: Path
    run: RunFolder


@pytest.fixture(scope="module")
def logged(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Mixing by influence, scores of trained samples, texts."""
    return _trained(
        tiny_sample,
        tmp_path_factory.mktemp("observed"),
        """
  online_mixing: {strategy: influence, interval: 5ba, warmup: 5ba}
  influence_scores: {estimator: dot, probe_samples: 4, refresh: 10ba}""",
    )


@pytest.fixture(scope="module")
def distilled(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Mixing by gradients, and a teacher."""
    return _trained(
        tiny_sample,
        tmp_path_factory.mktemp("distilled"),
        """
  online_mixing: {strategy: doge, interval: 5ba, warmup: 5ba}
  distillation: {teacher: {kind: average}, source_weights: {code: 0.5}, relations: {}}""",
    )


def _trained(tiny_sample: Path, runs: Path, algorithms: str) -> Logged:
    from cheapertraining.config import load_run_config
    from cheapertraining.training import train

    yaml = runs / "observed.yaml"
    yaml.write_text(
        f"""
compose: {{data: {tiny_sample}/data.yaml}}
run_name: observed
seed: 3
device: cpu
max_duration: {BATCHES}ba
save_folder: {runs}
save_interval: {BATCHES}ba
model:
  hidden_size: 16
  intermediate_size: 32
  num_layers: 1
  num_heads: 2
  num_kv_heads: 2
  max_position_embeddings: 64
train_loader: {{global_batch_size: 12, lag: 2}}
eval_loader: {{batch_size: 8, interval: 10ba, subset_num_batches: 1}}
optimizer: {{lr: 1.0e-2}}
scheduler: {{name: wsd, warmup: 2ba, decay: 0.2dur}}
algorithms:
  gradient_clipping: {{threshold: 1.0}}{algorithms}
callbacks:
  speed_monitor: {{window_size: 4}}
  lr_monitor: {{}}
  generations: {{prompts: ["def main", "import"], interval: 10ba, new_tokens: 4}}
loggers: {{jsonl: {{}}, console: {{interval: 10ba}}, wandb: {{project: tests, mode: offline}}}}
""",
        encoding="utf-8",
    )
    train(load_run_config(yaml))
    folder = runs / "observed"
    return Logged(folder, read_run(folder))


def test_every_number_is_in_the_vocabulary_and_the_reverse(logged: Logged, distilled: Logged) -> None:
    names = [*logged.run.metrics, *distilled.run.metrics]
    assert [name for name in names if find(name) is None] == []
    assert {entry.pattern for entry in VOCABULARY} - set(table(names)) == CUDA_ALONE


def test_each_algorithm_tells_its_share_of_the_time(logged: Logged, distilled: Logged) -> None:
    for run, names in ((logged.run, ("mixture", "influence")), (distilled.run, ("mixture", "distillation"))):
        shares = [run.metrics[f"{name}/overhead"].last for name in names]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) < 1


def test_losses_of_sources_add_up_to_the_whole(logged: Logged) -> None:
    run = logged.run
    last = run.metrics["mixture/objective/code"].steps[-1]
    assert last == BATCHES  # of the batches since the decision before, at 15
    names = ("code", "docs", "topics")
    weights, losses = (
        [run.metrics[f"{what}/{name}"].last for name in names] for what in ("mixture/objective", "loss/train")
    )
    total = run.metrics["loss/train/total"]
    assert sum(weights) == pytest.approx(1)
    assert sum(w * loss for w, loss in zip(weights, losses, strict=True)) == pytest.approx(
        float(total.values[-5:].mean()), rel=2e-3
    )


def test_norms_shares_and_fidelity_are_what_they_say(logged: Logged) -> None:
    run = logged.run
    shares = run.by_place("mixture/share/{source}")
    tokens = run.by_place("mixture/tokens/{source}")
    at = shares["code"].steps[-1]
    seen = {name: dict(zip(series.steps, series.values, strict=True))[at] for name, series in tokens.items()}
    for name, series in shares.items():
        assert series.last == pytest.approx(seen[name] / sum(seen.values()))
    ledger = {entry["batch"]: entry for entry in run.ledger}
    predicted, realized = run.metrics["fidelity/predicted/code"], run.metrics["fidelity/realized/code"]
    assert predicted.steps.tolist() == realized.steps.tolist() == [10, 15, 20]
    for step, expected, came in zip(predicted.steps, predicted.values, realized.values, strict=True):
        assert expected == pytest.approx(ledger[int(step) - 5]["predicted"]["code"])
        assert came == pytest.approx(ledger[int(step)]["realized_since_last"]["code"])
    assert (run.metrics["gradient/norm"].values > 0).all()
    assert (run.metrics["time/data_wait"].values < 1).all()


def test_weight_norm_is_that_of_the_saved_weights(logged: Logged) -> None:
    import torch

    checkpoint = torch.load(logged.folder / "checkpoints" / "latest-rank0.pt", weights_only=False)
    by_storage = {tensor.data_ptr(): tensor for tensor in checkpoint["state"]["model"].values()}  # tied ones once
    own = sum(float((tensor.double() ** 2).sum()) for tensor in by_storage.values()) ** 0.5
    assert logged.run.metrics["weight/norm"].steps[-1] == BATCHES
    assert logged.run.metrics["weight/norm"].last == pytest.approx(own, rel=1e-5)


def test_the_folder_is_complete(logged: Logged) -> None:
    run = logged.run
    assert run.notes == []
    assert json.loads((logged.folder / "run.json").read_text())["log_version"] == LOG_VERSION
    assert run.environment["torch"]
    assert run.summary is not None
    lines = [json.loads(line) for line in (logged.folder / "generations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (batch, prompt) for batch in (10, 20) for prompt in ("def main", "import")
    ]
    assert any(line["text"] for line in lines)


def wandb_names(folder: Path) -> set[str]:
    """Keys of the history that W&B's client has written for a later `wandb sync`."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    names = set()
    for log in folder.glob("wandb/offline-run-*/run-*.wandb"):
        store = DataStore()
        store.open_for_scan(str(log))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            # Of a picture or a table come several: the key, then what W&B keeps of it.
            names |= {item.key or item.nested_key[0] for item in record.history.item}
    return names


def test_wandb_has_the_same_names_offline_with_pictures_and_texts(logged: Logged) -> None:
    names = wandb_names(logged.folder)
    assert set(logged.run.metrics) <= names
    assert {"pictures/mixture", "pictures/influence", "generations"} <= names


def test_the_report_holds_everything_and_asks_no_network(logged: Logged) -> None:
    text = (logged.folder / "report.html").read_text(encoding="utf-8")
    own = text[: text.index("<script>/**")] + text[text.rindex("<script>") :]  # without Plotly's bundle
    tabs = re.findall(r'role="tab" id="tab-\d+"[^>]*>(\w+)<', own)
    assert " ".join(tabs) == "Summary Loss Mixture Influence Speed Health Events Ledger Config Environment"
    assert not re.search(r'(?:src|href)="(?!data:)', own)
    figures = [json.loads(found) for found in re.findall(r'application/json">(.*?)</script>', own)]
    assert len(figures) >= 15
    assert all(figure["data"] for figure in figures)


def test_no_panel_of_the_dashboard_is_empty(logged: Logged, distilled: Logged) -> None:
    names = wandb_names(logged.folder) | wandb_names(distilled.folder)
    panels = wandb_dashboard.panels()
    assert {panel.group for panel in panels} >= {"loss", "mixture", "influence", "speed", "optimization"}
    for panel in panels:
        if panel.needs != "cuda":
            assert [name for name in names if re.search(panel.regex, name)], panel.title
    filled = wandb_dashboard.chosen(list(logged.run.metrics))
    assert filled == [panel for panel in panels if panel in filled]
    assert {panel.needs for panel in filled} == {None, "influence_scores"}


@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser_tabs_hover_and_theme_work(logged: Logged, width: int) -> None:
    with open_browser() as browser:
        browse(browser, logged.folder / "report.html", width, "Loss", expected="code")
