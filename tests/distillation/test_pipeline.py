"""A student in pipeline stages over two real ranks against one process: losses, weights, metrics, resuming."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.distributed.layout import plan_layout
from cheapertraining.distributed.together import check_together
from cheapertraining.errors import UserError
from tests.distillation.pipeline_ranks import EVALUATED_AT, OPTIMIZERS, RUNS, SAVED_AT, STEPS, objective, twin, work
from tests.distillation.tiny import TEACHER, save_teacher, write_cache
from tests.distributed.ranks import checkpoint_of
from tests.processes import run_on_ranks
from tools.bench._layouts import FOUR_LAYERS, RAGGED, config_of, losses_of, metrics_of, run_once, tiny_yaml

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
MODEL = FOUR_LAYERS | {"num_kv_heads": 2}


@pytest.fixture(scope="module")
def path(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The yaml of the runs, all of which are over."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "rank0").mkdir()
    teacher = save_teacher(folder / "rank1" / "teacher")
    save_teacher(folder / "rank1" / "other", replace(TEACHER, vocab_size=520))
    save_teacher(folder / "rank1" / "short", replace(TEACHER, max_position_embeddings=16))
    write_cache(tiny_sample, teacher, folder / "sampled", size=12)
    write_cache(tiny_sample, teacher, folder / "top_k", kind="top_k", size=8)
    path = tiny_yaml(
        folder / "run.yaml",
        tiny_sample / "data.yaml",
        model=MODEL,
        eval_loader={"batch_size": 4, "interval": f"{EVALUATED_AT}ba", "subset_num_batches": 2, "first": False},
    )
    for alone, run in {twin(run): run for run in RUNS}.items():
        learned, _, overrides = RUNS[run]
        shape = [each for each in overrides if each.startswith("model.")]
        config = config_of(path, "single", f"run_name={alone}", *objective(learned, folder, str(teacher)), *shape)
        run_once(config, OPTIMIZERS[learned], RAGGED)
    run_on_ranks(work, path)
    return path


def _losses(path: Path, run: str) -> list[float]:
    return losses_of(path.parent / "runs" / run)


def _weights(path: Path, run: str) -> dict[str, torch.Tensor]:
    content = torch.load(checkpoint_of(path.parent / "runs", run, STEPS), weights_only=False)
    weights: dict[str, torch.Tensor] = content["state"]["model"]
    return weights


@pytest.mark.parametrize("run", RUNS)
def test_a_pipeline_learns_what_one_process_does(run: str, path: Path) -> None:
    """With packed rows, ragged masks, ramps, weights by source, clipping, and a mixture that changes."""
    losses, expected = _losses(path, run), _losses(path, twin(run))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    found, wanted = (_weights(path, name) for name in (run, twin(run)))
    assert found.keys() == wanted.keys()  # nothing of the teacher
    for name, weight in wanted.items():
        assert float((found[name] - weight).norm() / weight.norm()) <= TOLERANCE, name


@pytest.mark.parametrize("run", RUNS)
def test_it_logs_what_one_process_does(run: str, path: Path) -> None:
    """Each number once; the loss by source and evaluation are plain cross-entropy."""
    assert all(
        0 < share < 1
        for share in metrics_of(path.parent / "runs" / run, "distillation/overhead")["distillation/overhead"]
    )
    for beginning, least in (("distillation/", 15), ("loss/train/", 4), ("metrics/", 4), ("gradient/norm", 1)):
        found, wanted = (metrics_of(path.parent / "runs" / name, beginning) for name in (run, twin(run)))
        assert found.keys() == wanted.keys()
        assert len(wanted) >= least
        for name, values in wanted.items():
            if name != "distillation/overhead":
                assert found[name] == pytest.approx(values, rel=TOLERANCE), name


@pytest.mark.parametrize("run", ["live-interleaved", "sampled-1f1b"])
def test_resumed_it_goes_on_as_if_undisturbed(run: str, path: Path) -> None:
    assert _losses(path, f"{run}-resumed") == _losses(path, run)[SAVED_AT:]


def test_a_teacher_that_does_not_fit_ends_all_ranks_with_the_same_words(path: Path) -> None:
    """Only the last one has read it."""
    said, others = (json.loads((path.parent / f"said{rank}.json").read_text()) for rank in (0, 1))
    assert said == others
    assert "found nothing of the kind at 'nowhere'" in said["nowhere"]
    assert "expected the student's vocabulary of 512, found 520" in said["other"]
    assert "rows of up to 32 tokens" in said["short"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("hidden={}", "hidden: compares states of whole layers"),
        ("relations={}", "relations: compares states of whole layers"),
        ("on_policy={share: 0.5}", "on_policy: lets the student write, from whole logits"),
        ("teacher.kind=average", "teacher.kind: 'average' is made of the whole student"),
        ("teacher.kind=adapters_off", "teacher.kind: 'adapters_off' is made of the whole student"),
        ("teacher.placement=sharded", "or placement auto (whole there) or offloaded"),
    ],
)
def test_what_cannot_be_is_refused_at_start(choice: str, words: str, tiny_sample: Path, tmp_path: Path) -> None:
    yaml = tiny_yaml(tmp_path / "run.yaml", tiny_sample / "data.yaml", model=MODEL)
    key = "algorithms.distillation"

    def begin(*overrides: str) -> Any:
        config = config_of(yaml, "pp", f"{key}.teacher.path=teacher", *overrides)
        check_together(config, plan_layout(config.parallelism, 2), "fp32")

    begin()
    with pytest.raises(UserError, match=re.escape(words)):
        begin(f"{key}.{choice}")
