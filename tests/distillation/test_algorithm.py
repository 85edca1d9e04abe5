"""Distillation in Composer's trainer: the gradient of the formula, however the batch is split, and what is logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger

from cheapertraining.config import load_run_config
from cheapertraining.data.mixing import MixtureLoader
from cheapertraining.distillation import DenseTargets, Divergence, distillation_loss, shifted_mask
from cheapertraining.distillation.algorithm import Distillation, OnPolicy
from cheapertraining.distillation.cached import CachedTeacher
from cheapertraining.distillation.layers import HiddenMatch, LayerLosses, RelationMatch
from cheapertraining.distillation.on_policy import answer_index, sample_answers
from cheapertraining.distillation.own_teacher import AverageTeacher
from cheapertraining.distillation.schedules import Ramp
from cheapertraining.distillation.teacher import TeacherWrapper
from cheapertraining.errors import UserError
from cheapertraining.models import build_causal_lm
from cheapertraining.training import train
from tests.distillation.ranks import live
from tests.distillation.tiny import SOURCES, fit, logged, save_teacher, trainer_of, write_cache
from tests.observe.tiny_trainer import GLOBAL_BATCH, MODEL, tiny_loader
from tests.processes import start
from tools.bench._layouts import RaggedMasks

Make = Callable[[MixtureLoader], Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def cache(tiny_sample: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "sampled"
    write_cache(tiny_sample, teacher, folder, size=12)
    return folder


def steep(parameters: Any) -> torch.optim.Optimizer:
    """A step so long that the change of the weights is the gradient, to float32's precision."""
    return torch.optim.SGD(parameters, lr=100.0)


def step(
    sample: Path, make: Make, microbatch: int = GLOBAL_BATCH, **options: Any
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """The change of all weights by one step on ragged masks, and what was logged."""
    loader, logger = tiny_loader(sample), InMemoryLogger()
    distillation = Distillation(make(loader), SOURCES, log_interval=1, **options)
    algorithms = [RaggedMasks(), distillation]
    trainer = trainer_of(loader, algorithms, 1, microbatch=microbatch, optimizer=steep, loggers=[logger])
    before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    after = fit(trainer)
    return torch.cat([(after[name] - before[name]).flatten() for name in before]), dict(logged(logger))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def first_batch(sample: Path) -> dict[str, torch.Tensor]:
    """What `step` trains on."""
    state = type("state", (), {"batch": next(iter(tiny_loader(sample)))})
    RaggedMasks().apply(None, state, None)  # type: ignore[arg-type]
    return dict(state.batch)


def test_the_gradient_is_that_of_the_formula(tiny_sample: Path, teacher: Path) -> None:
    """Against the plain loss from whole logits; source weights, temperature and divergence included."""
    options: dict[str, Any] = {"alpha": 0.7, "temperature": 2.0, "divergence": Divergence("reverse_kl")}
    weights = {"code": 0.5, "topics": 0.0}
    found, told = step(tiny_sample, lambda _: TeacherWrapper.load(teacher), source_weights=weights, **options)
    batch = first_batch(tiny_sample)
    model, other = build_causal_lm(MODEL, 512, seed=2), TeacherWrapper.load(teacher)
    targets = DenseTargets(other.model(batch)["logits"])
    by_source = torch.tensor([0.5, 1.0, 0.0])[batch["source"]]
    loss = distillation_loss(model(batch)["logits"], targets, batch["labels"], token_weights=by_source, **options)
    loss.total.backward()
    parameters = dict(model.named_parameters())
    names = [name for name in model.state_dict() if name in parameters]
    gradient = torch.cat([parameters[name].grad.flatten() for name in names])  # type: ignore[union-attr]
    tied = len(found) - len(gradient)  # the state holds a tied output head as well
    assert apart(found[: len(found) - tied] / -100, gradient) < 2e-6
    assert told["loss/train/total"][0] == pytest.approx(float(loss.total), rel=1e-5)
    assert told["distillation/total"][0] == pytest.approx(float(loss.total), rel=1e-5)
    assert told["distillation/cross_entropy"][0] == pytest.approx(float(loss.cross_entropy), rel=1e-5)
    mask = shifted_mask(batch["labels"])
    agree = model(batch)["logits"].argmax(-1) == targets.logits.argmax(-1)
    assert told["distillation/agreement"][0] == pytest.approx(float(agree[mask].float().mean()), abs=1e-6)
    mine = mask & (batch["source"] == 1)[:, None]
    assert told["distillation/agreement/docs"][0] == pytest.approx(float(agree[mine].float().mean()), abs=1e-6)
    for name in ("alpha", "temperature", "teacher_entropy", "student_entropy", "acceptance", "divergence/topics"):
        assert f"distillation/{name}" in told


@pytest.mark.parametrize("kind", ["live", "cached", "layers"])
def test_the_gradient_is_the_same_however_the_batch_is_split(
    tiny_sample: Path, teacher: Path, cache: Path, kind: str
) -> None:
    """Microbatches whose rows have 1 to 31 tokens that count."""

    def make(loader: MixtureLoader) -> Any:
        return CachedTeacher(cache, loader.mixture) if kind == "cached" else TeacherWrapper.load(teacher)

    def layers() -> LayerLosses | None:
        match = RelationMatch(2.0, heads=2, student_layer=0, teacher_layer=1)
        return LayerLosses(HiddenMatch(3.0), match) if kind == "layers" else None

    whole, _ = step(tiny_sample, make, layers=layers())
    for microbatch in (5, 1):
        assert apart(step(tiny_sample, make, microbatch, layers=layers())[0], whole) < 1e-6


def test_numbers_follow_their_course(tiny_sample: Path, teacher: Path) -> None:
    loader, logger = tiny_loader(tiny_sample), InMemoryLogger()
    distillation = Distillation(
        TeacherWrapper.load(teacher),
        SOURCES,
        alpha=Ramp(1.0, 0.2),
        temperature=Ramp(1.0, 3.0, "cosine"),
        log_interval=1,
    )
    fit(trainer_of(loader, [distillation], 4, loggers=[logger]))
    told = logged(logger)
    np.testing.assert_allclose(told["distillation/alpha"], [1.0, 0.8, 0.6, 0.4], atol=1e-6)
    cosine = 2 - np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75]))
    np.testing.assert_allclose(told["distillation/temperature"], cosine, atol=1e-6)


@pytest.mark.parametrize("kind", ["average", "layers"])
def test_resumed_it_goes_on_as_if_undisturbed(tiny_sample: Path, teacher: Path, tmp_path: Path, kind: str) -> None:
    def run(folder: Path, load: Path | None = None) -> dict[str, torch.Tensor]:
        loader = tiny_loader(tiny_sample)
        who: Any = partial(AverageTeacher, decay=0.5) if kind == "average" else TeacherWrapper.load(teacher)
        layers = LayerLosses(HiddenMatch(1.0), None) if kind == "layers" else None
        trainer = trainer_of(
            loader,
            [Distillation(who, SOURCES, layers=layers)],
            6,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            save_folder=str(folder),
            save_interval="3ba",
            load_path=None if load is None else str(load),
        )
        return fit(trainer)

    whole = run(tmp_path / "whole")
    saved = tmp_path / "whole" / "ep0-ba3-rank0.pt"
    state = torch.load(saved, weights_only=False)["state"]
    assert list(state["model"]) == list(build_causal_lm(MODEL, 512).state_dict())  # nothing of the teacher
    algorithm = dict(state["algorithms"])["Distillation"]
    assert bool(algorithm["average" if kind == "average" else "layers"])
    resumed = run(tmp_path / "resumed", saved)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_answers_are_numbered_by_document() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7, -100, 8, 9, -100]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]])
    assert answer_index(labels, positions).tolist() == [[0, 0, 1, 2, 0, 3, 0, 1, 2, 0]]


def test_answers_are_the_students_own() -> None:
    """At a temperature near 0, those of a greedy loop over each document by itself."""
    model = build_causal_lm(MODEL, 512, seed=2)
    model.model.get_output_embeddings().weight.data *= 20
    ids = torch.randint(1, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    labels = torch.full_like(ids, -100)
    labels[0, 4:9], labels[0, 11:16] = ids[0, 4:9], ids[0, 11:16]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    new = sample_answers(model, batch, temperature=1e-4, generator=torch.Generator().manual_seed(1))
    for first, answer, last in ((0, 4, 9), (9, 11, 16)):
        text = ids[0, first:answer]
        while len(text) < last - first:
            text = torch.cat([text, model.model(input_ids=text[None]).logits[0, -1:].argmax(-1)])
        assert new["input_ids"][0, first:last].tolist() == text.tolist()
    assert torch.equal(new["labels"] == -100, labels == -100)
    assert torch.equal(new["labels"][labels != -100], new["input_ids"][labels != -100])
    end = int(new["input_ids"][0, 5])
    ended = sample_answers(model, batch, temperature=1e-4, generator=torch.Generator().manual_seed(1), eos_id=end)
    place = 4 + new["input_ids"][0, 4:9].tolist().index(end)
    assert (ended["labels"][0, place + 1 : 9] == -100).all()
    assert ended["labels"][0, place] == end


def test_on_policy_batches_are_all_divergence(tiny_sample: Path, teacher: Path) -> None:
    loader, logger = tiny_loader(tiny_sample), InMemoryLogger()
    distillation = Distillation(
        TeacherWrapper.load(teacher), SOURCES, alpha=0.3, on_policy=OnPolicy(0.5, seed=1), log_interval=1
    )
    fit(trainer_of(loader, [RaggedMasks(), distillation], 6, loggers=[logger]))
    told = logged(logger)
    assert set(told["distillation/alpha"]) == {0.3, 1.0}
    for alpha, total, divergence in zip(
        told["distillation/alpha"], told["distillation/total"], told["distillation/divergence"], strict=True
    ):
        if alpha == 1:
            assert total == pytest.approx(divergence, rel=1e-5)


def test_what_does_not_go_together_is_refused(tiny_sample: Path, cache: Path, tmp_path: Path, tiny_run: Path) -> None:
    cached = CachedTeacher(cache, tiny_loader(tiny_sample).mixture)
    with pytest.raises(UserError, match=r"distillation.temperature: expected that of the cache, 1, found 2"):
        Distillation(cached, SOURCES, temperature=2.0)
    with pytest.raises(UserError, match="on_policy: expected a live teacher"):
        Distillation(cached, SOURCES, on_policy=OnPolicy(0.5))
    with pytest.raises(UserError, match=r"source_weights.kode: no such source. Did you mean 'code'"):
        Distillation(cached, SOURCES, source_weights={"kode": 1.0})
    key = "algorithms.distillation"
    for overrides, message in (
        ([f"{key}={{}}"], r"teacher.path.*: expected a model folder or checkpoint, or a cache"),
        ([f"{key}.cache=c", f"{key}.hidden={{}}"], "needs a live teacher"),
        ([f"{key}.cache=c", f"{key}.teacher.kind=average"], "changes with the student"),
        ([f"{key}.cache=c", f"{key}.alpha=1.5"], f"{key}.alpha.*expected a number from 0 to 1 or a mapping"),
        ([f"{key}.cache=c", f"{key}.alfa=1"], "unknown key. Did you mean 'alpha'"),
        ([f"{key}.cache=c", f"{key}.source_weights.kode=1"], "no such source. Did you mean 'code'"),
        ([f"{key}.cache=c", "algorithms.influence_scores={}"], "read from the output head's backward pass"),
    ):
        with pytest.raises(UserError, match=message):
            load_run_config(tiny_run, overrides)
    other = trainer_of(tiny_loader(tiny_sample), [], 1).state.model
    short = TeacherWrapper(build_causal_lm(MODEL, 512).model)
    with pytest.raises(UserError, match="vocabulary"):
        short.check_vocabulary(other.model.config.vocab_size + 1)


def test_a_run_of_a_yaml_learns_from_a_cache(tiny_run: Path, cache: Path, teacher: Path, tmp_path: Path) -> None:
    key = "algorithms.distillation"
    options = [f"{key}.cache={cache}", f"{key}.teacher.path={teacher}", f"{key}.log_interval=2ba"]
    train(load_run_config(tiny_run, options))
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)}
    assert {"distillation/total", "distillation/cross_entropy/docs"} <= names
    other = save_teacher(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="made with another teacher"):
        train(load_run_config(tiny_run, [f"{key}.cache={cache}", f"{key}.teacher.path={other}", "run_name=other"]))


@pytest.mark.slow
def test_two_ranks(tiny_sample: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    """DDP is one process; FSDP2 with a sharded teacher is DDP; resumed amid a changing mixture is undisturbed."""
    script = Path(__file__).with_name("ranks.py")
    started = start(script, *map(str, (tiny_sample, teacher, cache, tmp_path)), folder=tmp_path, ranks=2)
    assert started.wait() == 0, started.output(name="err")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    losses, weights = live(tiny_sample, teacher)
    np.testing.assert_allclose(first["ddp"][0], losses, rtol=1e-6)
    np.testing.assert_allclose(first["ddp"][1], weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first["fsdp2"][0], first["ddp"][0], rtol=1e-6)
    np.testing.assert_allclose(first["fsdp2"][1], first["ddp"][1], rtol=1e-4, atol=1e-6)
    assert len(first["whole"]["losses"]) == 24
    assert first["resumed"]["losses"] == first["whole"]["losses"][14:]
    assert first["resumed"]["ledger"] == first["whole"]["ledger"]
    assert len({round(share, 6) for share in first["whole"]["ledger"].values()}) > 1
