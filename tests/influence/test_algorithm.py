"""InfluenceScores in a real Composer trainer over real shards."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger

from cheapertraining.errors import UserError
from cheapertraining.influence.algorithm import InfluenceScores
from cheapertraining.influence.model_access import sample_losses
from tests.observe.tiny_trainer import GLOBAL_BATCH, tiny_loader, tiny_trainer

NAMES = ("code", "docs", "topics")
MICROBATCH = 3


class BeforeEachStep(Callback):
    """Keeps the model as it was when each batch began, and the batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.nn.Module, dict[str, torch.Tensor]]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.seen.append((copy.deepcopy(state.model), dict(state.batch)))


def run(
    sample: Path, runs: Path, batches: int, scores: dict[str, Any] | None, **options: Any
) -> tuple[Trainer, dict[str, list[float]]]:
    loader = tiny_loader(sample)
    algorithms = []
    if scores is not None:
        algorithms.append(InfluenceScores(loader.probes, loader.mixture.source_names, **scores))
    logger = InMemoryLogger()
    microbatch = options.pop("microbatch", GLOBAL_BATCH)
    callbacks = options.pop("callbacks", ())
    trainer = tiny_trainer(loader, runs, batches, callbacks, [logger], algorithms=algorithms, **options)
    trainer.state.device_train_microbatch_size = microbatch
    trainer.fit()
    return trainer, {name: [float(value) for _, value in points] for name, points in logger.data.items()}


def select(batch: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def gradient(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Of the batch's summed loss, flat; and its tokens."""
    model.eval()
    if not len(batch["labels"]):
        return torch.zeros(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64), 0.0
    sums, tokens = sample_losses(model, batch)
    parts = torch.autograd.grad(sums.sum(), list(model.parameters()))
    return torch.cat([part.reshape(-1) for part in parts]).double(), float(tokens.sum())


def test_scores_are_those_of_autograd(tiny_sample: Path, tmp_path: Path) -> None:
    """Two batches in microbatches: means by source, and totals by learning rate."""
    before = BeforeEachStep()
    options = {"estimator": "dot", "refresh_every": 1, "log_interval": 1, "probe_samples": 5}
    trainer, logged = run(
        tiny_sample, tmp_path, 2, options, callbacks=[before], microbatch=MICROBATCH, save_folder=None
    )
    probe: Any = tiny_loader(tiny_sample).probes["code"].dataset
    totals = dict.fromkeys(NAMES, 0.0)
    for step, (model, batch) in enumerate(before.seen):
        window = [(step + i) % len(probe) for i in range(5)]
        direction, length = gradient(model, probe.batch(window))
        for place, name in enumerate(NAMES):
            mine, tokens = gradient(model, select(batch, batch["source"] == place))
            score = float(mine @ direction) / length / tokens
            assert logged[f"influence/score/code/{name}"][step] == pytest.approx(score, rel=2e-4)
            assert logged[f"influence/score_se/code/{name}"][step] > 0
            for first in range(0, GLOBAL_BATCH, MICROBATCH):  # each enters the step by its share of rows
                part = select(batch, slice(first, first + MICROBATCH))
                everything = float((part["labels"][:, 1:] != -100).sum())
                mine, _ = gradient(model, select(part, part["source"] == place))
                share = len(part["labels"]) / GLOBAL_BATCH / everything
                totals[name] += 1e-2 * share * float(mine @ direction) / length
            assert logged[f"influence/total/code/{name}"][step] == pytest.approx(totals[name], rel=2e-4)
    assert len(logged["influence/probe_loss/code"]) == 2
    trainer.close()


@pytest.mark.parametrize("estimator", ["adam", "datainf", "ekfac"])
def test_training_is_what_it_is_without_scores(estimator: str, tiny_sample: Path, tmp_path: Path) -> None:
    scores = {"estimator": estimator, "refresh_every": 2, "log_interval": 2}
    plain, _ = run(tiny_sample, tmp_path / "plain", 5, None, save_folder=None)
    scored, logged = run(tiny_sample, tmp_path / "scored", 5, scores, save_folder=None)
    for one, other in zip(scored.state.model.parameters(), plain.state.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(logged["influence/score/code/docs"]) == 2
    assert all(value == value for value in logged["influence/total/code/docs"])


@pytest.mark.parametrize("estimator", ["adam", "ekfac"])
def test_a_resumed_run_logs_what_the_undisturbed_one_does(estimator: str, tiny_sample: Path, tmp_path: Path) -> None:
    scores = {"estimator": estimator, "refresh_every": 4, "log_interval": 3}  # directions of batch 1 serve until 4
    _, straight = run(tiny_sample, tmp_path, 6, scores)
    checkpoint = str(tmp_path / "tiny/checkpoints/ep0-ba4-rank0.pt")
    _, resumed = run(tiny_sample, tmp_path, 6, scores, load_path=checkpoint, save_folder=None)
    for name in NAMES:
        assert resumed[f"influence/total/code/{name}"] == straight[f"influence/total/code/{name}"][-1:]
        assert resumed[f"influence/score/code/{name}"] == straight[f"influence/score/code/{name}"][-1:]


def test_other_estimators_and_missing_probes_are_refused(tiny_sample: Path) -> None:
    loader = tiny_loader(tiny_sample)
    with pytest.raises(UserError, match="expected one of dot, adam, datainf, ekfac, found 'kfac'"):
        InfluenceScores(loader.probes, NAMES, "kfac")
    with pytest.raises(UserError, match="at least one probe"):
        InfluenceScores({}, NAMES)


def test_ekfac_that_comes_to_a_run_late_begins_when_it_has_seen_something(tiny_sample: Path, tmp_path: Path) -> None:
    run(tiny_sample, tmp_path, 4, None)
    checkpoint = str(tmp_path / "tiny/checkpoints/ep0-ba4-rank0.pt")
    scores = {"estimator": "ekfac", "refresh_every": 1, "log_interval": 1}
    _, logged = run(tiny_sample, tmp_path, 6, scores, load_path=checkpoint, save_folder=None)
    assert len(logged["influence/score/code/docs"]) == 1


def test_fitting_on_goes_on_with_the_totals(tiny_sample: Path, tmp_path: Path) -> None:
    scores = {"estimator": "dot", "refresh_every": 1, "log_interval": 1}
    trainer, _ = run(tiny_sample, tmp_path, 2, scores, save_folder=None)
    (algorithm,) = trainer.state.algorithms
    before = algorithm.state_dict()["total"].clone()
    for group in trainer.state.optimizers[0].param_groups:
        group["lr"] = 0.0  # adds nothing
    trainer.fit(duration="1ba")
    assert int(trainer.state.timestamp.batch) == 3
    assert before.any()
    assert torch.equal(algorithm.state_dict()["total"], before)


class Overflows(Callback):
    """The first batch's gradients are infinite, and its step is skipped, as by a loss scaler."""

    def before_backward(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == 0:
            assert torch.is_tensor(state.loss)
            state.loss.register_hook(lambda gradient: gradient * math.inf)

    def after_backward(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == 0:
            state.model.zero_grad()


def test_a_skipped_step_does_not_spoil_the_totals(tiny_sample: Path, tmp_path: Path) -> None:
    scores = {"estimator": "dot", "refresh_every": 1, "log_interval": 2}
    _, logged = run(tiny_sample, tmp_path, 2, scores, callbacks=[Overflows()], save_folder=None)
    for name in NAMES:
        for what in ("total", "score", "score_se"):
            assert math.isfinite(logged[f"influence/{what}/code/{name}"][0])
