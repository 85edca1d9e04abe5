"""A student cut over two real ranks, and over two of four, against one process: losses, weights, metrics, resuming."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cheapertraining.distributed.layout import plan_layout
from cheapertraining.distributed.together import check_together
from cheapertraining.errors import UserError
from tests.distillation.tensor_ranks import LAYOUTS, OBJECTIVES, RUNS, SAVED_AT, STEPS, train, work
from tests.distillation.tiny import save_teacher, write_cache
from tests.distributed.ranks import MODELS, checkpoint_of
from tests.processes import run_on_ranks
from tools.bench._layouts import Outcome, config_of, difference, metrics_of, outcome_of, resume_from, tiny_yaml

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
CUT = [(LAYOUTS[ranks], name) for ranks, names in RUNS.items() for name in names]


@pytest.fixture(scope="module")
def path(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The yaml of the runs, all of which are over."""
    folder = tmp_path_factory.mktemp("tensor")
    teacher = save_teacher(folder / "teacher")
    torch.manual_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = GPTNeoXConfig(vocab_size=512, max_position_embeddings=32, initializer_range=0.3, **sizes)
    GPTNeoXForCausalLM(shape).save_pretrained(folder / "without_plan")
    write_cache(tiny_sample, teacher, folder / "sampled", size=12)
    write_cache(tiny_sample, teacher, folder / "top_k", kind="top_k", size=8)
    path = tiny_yaml(
        folder / "run.yaml",
        tiny_sample / "data.yaml",
        train_loader={"global_batch_size": 16, "device_microbatch_size": 4, "lag": 2},
    )
    for name in OBJECTIVES:
        train(path, "single", f"single-{name}", name)
    for ranks in LAYOUTS:
        run_on_ranks(work, path, ranks=ranks)
    return path


def _outcome(path: Path, run: str) -> Outcome:
    return outcome_of(path.parent / f"{run}.pt")


@pytest.mark.parametrize(("layout", "name"), CUT)
def test_a_cut_student_learns_what_a_whole_one_does(layout: str, name: str, path: Path) -> None:
    """With packed rows, accumulation, ragged masks, ramps, weights by source, clipping, a mixture that changes."""
    expected = _outcome(path, f"single-{name}")
    losses, weights = difference(_outcome(path, f"{layout}-{name}"), expected)
    assert len(expected.losses) == STEPS
    assert losses <= TOLERANCE
    assert weights <= TOLERANCE


@pytest.mark.parametrize(("layout", "name"), CUT)
def test_it_logs_what_one_process_does(layout: str, name: str, path: Path) -> None:
    """Each sample once: means over tokens, losses by source."""
    for beginning, least in (("distillation/", 12), ("loss/train/", 4)):
        found, wanted = (
            metrics_of(path.parent / "runs" / run, beginning) for run in (f"{layout}-{name}", f"single-{name}")
        )
        assert found.keys() == wanted.keys()
        assert len(wanted) >= least
        for key, values in wanted.items():
            if "overhead" not in key:
                assert found[key] == pytest.approx(values, rel=TOLERANCE), key


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_the_whole_model(model: str, path: Path) -> None:
    for rank in range(2):
        assert json.loads((path.parent / f"gradients{rank}.json").read_text())[model] <= TOLERANCE


def test_an_averaged_teacher_goes_on_under_another_layout(path: Path) -> None:
    """From what one process has saved, and the other way round."""
    layout = LAYOUTS[2]
    expected = pytest.approx(_outcome(path, "single-average").losses[SAVED_AT:], rel=TOLERANCE)
    assert _outcome(path, f"{layout}-resumed").losses == expected
    resume_from(path, f"from-{layout}", checkpoint_of(path.parent / "runs", f"{layout}-average", SAVED_AT))
    train(path, "single", f"from-{layout}", "average", "autoresume=true")
    assert _outcome(path, f"from-{layout}").losses == expected


_LIVE = "teacher.path=t"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([_LIVE, "hidden={}"], "hidden: compares states of whole layers"),
        ([_LIVE, "relations={}"], "relations: compares states of whole layers"),
        ([_LIVE, "on_policy={share: 0.5}"], "on_policy: lets the student write"),
        (["teacher.kind=adapters_off"], "no tensor parallel plan"),
        ([_LIVE, "teacher.quantization=4bit"], "placement: auto cuts the teacher as the student, but weights of few"),
    ],
)
def test_what_cannot_be_is_refused_at_start(settings: list[str], words: str, tiny_sample: Path, tmp_path: Path) -> None:
    yaml = tiny_yaml(tmp_path / "run.yaml", tiny_sample / "data.yaml")

    def begin(layout: str, *more: Any) -> None:
        config = config_of(yaml, layout, *(f"algorithms.distillation.{each}" for each in [*settings, *more]))
        check_together(config, plan_layout(config.parallelism, 4), "fp32")

    for layout in LAYOUTS.values():
        with pytest.raises(UserError, match=re.escape(words)):
            begin(layout)
    begin("ddp")
