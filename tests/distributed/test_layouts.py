"""Two real ranks under every layout against one process: losses, weights, checkpoints, influence, gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import LAYOUTS, MEASURED, MODELS, RESUMED_TO, RING, SAVED_AT, SGD, STEPS, WAYS, work
from tests.distributed.ranks import checkpoint_of as checkpoint_in
from tests.processes import run_on_ranks
from tools.bench._layouts import (
    Outcome,
    config_of,
    difference,
    free_port,
    metrics_of,
    resume_from,
    run_once,
    start_rank,
    tiny_yaml,
)

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
RESUMED = [*RING.items(), ("fsdp2", "alone")]


@dataclass
class Runs:
    """What one process (``alone``) and two have left."""

    path: Path
    measuring: Path
    folder: Path
    alone: dict[str, Outcome]
    found: dict[str, Any]

    def outcome(self, name: str) -> Outcome:
        return Outcome(**torch.load(self.folder / f"{name}.pt", weights_only=True))

    def metrics(self, run: str) -> dict[str, list[float]]:
        """Every logged number of a measuring run, by name."""
        return metrics_of(self.measuring.parent / "runs" / run)


@pytest.fixture(scope="module")
def runs(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("layouts")
    loader = {"global_batch_size": 16, "device_microbatch_size": 4, "lag": 2}
    path = tiny_yaml(folder / "run.yaml", tiny_sample / "data.yaml", train_loader=loader)
    (folder / "measuring").mkdir()
    measuring = tiny_yaml(
        folder / "measuring" / "run.yaml",
        tiny_sample / "data.yaml",
        max_duration="4ba",
        train_loader=loader,
        eval_loader={"batch_size": 4, "interval": "1000ba", "first": True},
        algorithms={
            "online_mixing": {
                "strategy": "influence",
                "interval": "2ba",
                "warmup": "0ba",
                "influence": {"probe_samples": 4, "source_samples": 2},
            },
            "influence_scores": {"estimator": "dot", "probe_samples": 4, "log_interval": "1ba", "refresh": "2ba"},
        },
    )
    steps = (f"max_duration={STEPS}ba", f"save_interval={SAVED_AT}ba")
    alone = {
        optimizer: run_once(config_of(path, "single", f"run_name=alone-{optimizer}", *steps), optimizer)
        for optimizer in ("adamw", "sgd")
    }
    for scorer in ("forward", "hook"):
        chosen = f"algorithms.online_mixing.influence.scorer={scorer}"
        run_once(config_of(measuring, "single", f"run_name=alone-{scorer}", chosen))
    # Not forked from here, where something has trained already.
    run_on_ranks(start_rank, free_port(), work, (path, measuring, folder))
    return Runs(path, measuring, folder, alone, json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize(
    ("layout", "optimizer"), [*((name, "adamw") for name in LAYOUTS), *((name, "sgd") for name in SGD)]
)
def test_a_layout_trains_as_one_process_does(layout: str, optimizer: str, runs: Runs) -> None:
    """With packed rows, accumulation, clipping, uneven numbers of tokens and a mixture that changes."""
    losses, weights = difference(runs.outcome(f"{layout}-{optimizer}"), runs.alone[optimizer])
    assert losses <= TOLERANCE
    assert weights <= TOLERANCE


@pytest.mark.parametrize(("layout", "source"), RESUMED)
def test_what_one_layout_saves_another_goes_on_from(layout: str, source: str, runs: Runs) -> None:
    resumed = runs.outcome(f"{layout}-from-{source}").losses
    expected = runs.alone["adamw"].losses[SAVED_AT:RESUMED_TO]
    assert resumed == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("source", ["ddp", "tp"])
def test_one_process_goes_on_from_what_ranks_saved(source: str, runs: Runs) -> None:
    """From one file, and from a folder of shards that was written in the background."""
    checkpoint = checkpoint_in(runs.path.parent / "runs", f"{source}-adamw", SAVED_AT)
    assert checkpoint.is_dir() == (source == "tp")
    resume_from(runs.path, f"single-from-{source}", checkpoint)
    choice = ("autoresume=true", f"run_name=single-from-{source}", f"max_duration={RESUMED_TO}ba")
    resumed = run_once(config_of(runs.path, "single", *choice))
    assert resumed.losses == pytest.approx(runs.alone["adamw"].losses[SAVED_AT:RESUMED_TO], rel=TOLERANCE)


@pytest.mark.parametrize("scorer", ["forward", "hook"])
@pytest.mark.parametrize("layout", MEASURED)
def test_influence_and_evaluation_are_those_of_one_process(layout: str, scorer: str, runs: Runs) -> None:
    found, expected = runs.metrics(f"{layout}-{scorer}"), runs.metrics(f"alone-{scorer}")
    for name in ("heldout/code", "probe/code"):
        key = f"metrics/{name}/TokenCrossEntropy"
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCE)
    scores = [name for name in expected if name.startswith(("mixture/score/", "mixture/weight/"))]
    assert len(scores) >= 6
    # Differences of float32 losses carry noise of a thousandth; a backward pass does not.
    allowed = 2e-2 if scorer == "forward" else 1e-3
    for name in scores:
        largest = max(abs(each) for other in scores if other[:14] == name[:14] for each in expected[other])
        assert found[name] == pytest.approx(expected[name], abs=allowed * largest)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_and_their_norm_are_those_of_the_whole_model(model: str, way: str, runs: Runs) -> None:
    gradient, norm, clipped = runs.found["gradients"][f"{model}, {way}"]
    assert gradient <= 1e-5
    assert norm <= 1e-6
    assert clipped <= 1e-5


def test_a_teacher_of_the_students_shape_may_have_another_dtype(runs: Runs) -> None:
    single, double = runs.found["two dtypes"]
    assert single <= 1e-5
    assert double <= 1e-12


def test_mixed_precision_is_as_composer_names_it(runs: Runs) -> None:
    """Parameters gathered in half where asked for; gradients of the float32 shards are float32 in any case."""
    half, full = "torch.bfloat16", "torch.float32"
    assert runs.found["dtypes"] == {"DEFAULT": [half, full], "PURE": [half, full], "FULL": [full, full]}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("plan", ["no tensor parallel plan for GPTNeoXForCausalLM", "llama", "compose.distributed=fsdp2"]),
        ("dropout", ["attn_pdrop=0.1"]),
        ("vocabulary", ["2 does not divide the model's vocab_size (63)"]),
        ("build", ["rank 0 could not build it"]),
        ("config", ["ranks differ in their config: rank 0 has 'lr: 0', rank 1 has 'lr: 1'"]),
        ("versions", ["ranks differ in their torch: rank 0 has '2.0', rank 1 has '2.1'"]),
    ],
)
def test_bad_input_is_refused_by_name(what: str, words: list[str], runs: Runs) -> None:
    for word in words:
        assert word in runs.found["refusals"][what]
