"""Two real ranks in pipeline stages against one process: losses, evaluation, weights, checkpoints, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.distributed.layout import plan_layout
from cheapertraining.distributed.pipeline import plan_stages
from cheapertraining.distributed.together import check_together
from cheapertraining.errors import UserError
from tests.distributed.pipeline_ranks import RESUMED_TO, RUNS, SAVED_AT, STEPS, UNTIED, twin, work
from tests.distributed.ranks import checkpoint_of
from tests.processes import run_on_ranks
from tools.bench._layouts import (
    FOUR_LAYERS,
    config_of,
    free_port,
    losses_of,
    resume_from,
    run_once,
    start_rank,
    tiny_yaml,
)

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
MODEL = FOUR_LAYERS | {"num_kv_heads": 2}


@pytest.fixture(scope="module")
def path(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The yaml of the runs, all of which are over."""
    folder = tmp_path_factory.mktemp("pipeline")
    path = tiny_yaml(
        folder / "run.yaml",
        tiny_sample / "data.yaml",
        model=MODEL,
        train_loader={"global_batch_size": 16, "device_microbatch_size": 4, "lag": 2},
        eval_loader={"batch_size": 4, "interval": "1000ba", "subset_num_batches": 2, "first": True},
    )
    steps = (f"max_duration={STEPS}ba", f"save_interval={SAVED_AT}ba")
    for run, (optimizer, overrides) in RUNS.items():
        shape = [each for each in overrides if each.startswith("model.")]
        run_once(config_of(path, "single", f"run_name={twin(run)}", *steps, *shape), optimizer)
    shards = (f"max_duration={SAVED_AT}ba", "run_name=shards", "parallelism.state_dict_type=sharded")
    run_once(config_of(path, "single", *shards))
    run_on_ranks(start_rank, free_port(), work, (path,))  # not forked from here, where something has trained already
    return path


def _losses(path: Path, run: str) -> list[float]:
    return losses_of(path.parent / "runs" / run)


def _saved(path: Path, run: str) -> dict[str, Any]:
    content = torch.load(checkpoint_of(path.parent / "runs", run, STEPS), weights_only=False)
    state: dict[str, Any] = content["state"]
    return state


@pytest.mark.parametrize("run", RUNS)
def test_a_pipeline_trains_as_one_process_does(run: str, path: Path) -> None:
    """With packed rows, ragged masks, clipping, a mixture that changes, tied and untied embeddings."""
    losses, expected = _losses(path, run), _losses(path, twin(run))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    found, wanted = (_saved(path, name)["model"] for name in (run, twin(run)))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert float((found[name] - weight).norm() / weight.norm()) <= TOLERANCE, name


def test_it_evaluates_as_one_process_does(path: Path) -> None:
    entries = [
        json.loads((path.parent / "runs" / run / "metrics.jsonl").read_text().splitlines()[0])
        for run in ("1f1b", "alone-adamw")
    ]
    names = [name for name in entries[1] if name.startswith("metrics/")]
    assert len(names) >= 4
    for name in names:
        assert entries[0][name] == pytest.approx(entries[1][name], rel=TOLERANCE)


def test_it_logs_and_saves_what_one_process_does(path: Path) -> None:
    """By the same names; of each parameter's moments one copy, tied or not."""
    lines = [(path.parent / "runs" / run / "metrics.jsonl").read_text().splitlines() for run in ("1f1b", "alone-adamw")]
    for ours, theirs in zip(*lines, strict=True):
        # The norm of the weights is logged only of models that are in one place.
        assert json.loads(ours).keys() | {"weight/norm"} == json.loads(theirs).keys() | {"weight/norm"}
    for run in ("1f1b", "gpipe"):
        ours, theirs = (_saved(path, name)["optimizers"]["AdamW"] for name in (run, twin(run)))
        assert ours["state"].keys() == theirs["state"].keys()
        for mine, group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert sorted(mine["params"]) == sorted(group["params"])


@pytest.mark.parametrize("kind", ["full", "shards"])
def test_a_pipeline_goes_on_from_what_one_process_saved(kind: str, path: Path) -> None:
    assert _losses(path, f"pp-from-{kind}") == pytest.approx(
        _losses(path, "alone-adamw")[SAVED_AT:RESUMED_TO], rel=TOLERANCE
    )


@pytest.mark.parametrize("run", ["1f1b", "gpipe"])
def test_one_process_goes_on_from_what_a_pipeline_saved(run: str, path: Path) -> None:
    name, overrides = f"single-from-{run}", (UNTIED if UNTIED[0] in RUNS[run][1] else ())
    resume_from(path, name, checkpoint_of(path.parent / "runs", run, SAVED_AT))
    again = ("autoresume=true", f"run_name={name}", f"max_duration={RESUMED_TO}ba")
    run_once(config_of(path, "single", *again, *overrides))
    assert _losses(path, name) == pytest.approx(_losses(path, twin(run))[SAVED_AT:RESUMED_TO], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train_loader.device_microbatch_size=16"],
            "at least as many micro-batches of equal size in a global batch of 16: expected one of 1, 2, 4, 8",
        ),
        (["train_loader.device_microbatch_size=auto"], "found auto"),
        (
            ["train_loader.global_batch_size=10", "parallelism.pp.schedule=interleaved"],
            "a multiple of 2 micro-batches, found 5 of 2 rows",
        ),
        (["parallelism.pp.pipeline_parallel_degree=3"], "expected the number of processes (2), found 3"),
        (["parallelism.fsdp2={}"], "cannot be had beside fsdp2"),
        (["parallelism.state_dict_type=sharded"], "a pipeline writes checkpoints as one file"),
        (["algorithms.influence_scores={}", "data.probes.code.source=code"], "which a pipeline spreads"),
    ],
)
def test_what_cannot_be_is_refused_at_start(
    overrides: list[str], words: str, tiny_sample: Path, tmp_path: Path
) -> None:
    yaml = tiny_yaml(tmp_path / "run.yaml", tiny_sample / "data.yaml", model=MODEL)

    def begin() -> None:
        config = config_of(yaml, "pp", *overrides)
        check_together(config, plan_layout(config.parallelism, 2), "fp32")

    with pytest.raises(UserError, match=re.escape(words)):
        begin()


def test_layers_are_divided_evenly() -> None:
    plan = plan_stages(7, 2, 2)
    assert [len(layers) for layers in plan.layers] == [1, 2, 2, 2]
    assert [layer for layers in plan.layers for layer in layers] == list(range(7))
    assert [plan.stages_of(rank) for rank in (0, 1)] == [[0, 2], [1, 3]]
    with pytest.raises(UserError, match="at least 4 decoder layers, found 3"):
        plan_stages(3, 2, 2)
