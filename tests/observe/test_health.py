"""Spikes, numbers that are not finite, norms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger
from tiny_trainer import tiny_loader, tiny_trainer

from cheapertraining.observe import MixtureCourse, RunHealth
from cheapertraining.observe.health import SpikeDetector, parameter_norm


def test_moments_are_those_of_the_losses_until_it_forgets() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.1, 15)
    detector = SpikeDetector(warmup=100)
    assert not any(detector(float(loss)) for loss in losses)
    assert detector.mean == pytest.approx(losses.mean())
    assert detector.variance == pytest.approx(losses.var())


def test_a_spike_is_told_once_and_does_not_move_the_mean() -> None:
    generator = np.random.default_rng(1)
    detector = SpikeDetector()
    course = [5 - 0.01 * step + 0.05 * float(generator.normal()) for step in range(300)]
    assert sum(detector(loss) for loss in course) == 0
    before = detector.mean
    assert detector(before + 2.0)
    assert detector.mean == before
    assert not detector(course[-1])


def test_losses_of_one_value_have_no_spikes() -> None:
    detector = SpikeDetector()
    assert not any(detector(2.0) for _ in range(100))
    assert not detector(2.0005)
    assert detector(2.1)


def test_norm_counts_tied_parameters_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    expected = math.sqrt(float((model[0].weight.double() ** 2).sum()))
    assert parameter_norm(model) == pytest.approx(expected, rel=1e-6)


class Spoil(Callback):
    """A gradient that is not finite in one batch, a loss that is not in another."""

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 1:
            next(state.model.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 2:
            next(state.model.parameters()).data.nan_to_num_(0.0, 0.0, 0.0)


def _run(sample: Path, runs: Path, batches: int, callbacks: list[Callback], **options: Any) -> dict[str, list[float]]:
    log = InMemoryLogger()
    loader = tiny_loader(sample)
    trainer = tiny_trainer(
        loader, runs, batches, [*callbacks, MixtureCourse(loader.mixture, interval=2)], [log], **options
    )
    trainer.fit()
    trainer.close()
    return {name: [float(value) for _, value in values] for name, values in log.data.items()}


def test_what_is_not_finite_is_counted_and_the_mixture_logged(
    tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(tiny_sample, tmp_path, 4, [Spoil(), RunHealth(interval=1)], save_folder=None)
    assert found["event/nonfinite"][:2] == [0.0, 1.0]
    assert len(found["gradient/norm"]) == 4
    assert math.isinf(found["gradient/norm"][1])
    assert len(found["mixture/weight/code"]) == len(found["mixture/share/code"]) == 2
    assert sum(found[f"mixture/share/{name}"][-1] for name in ("code", "docs", "topics")) == pytest.approx(1.0)
    if found["event/nonfinite"][-1] > 1:  # the step with that gradient spoilt the loss after it
        assert "the loss is not finite" in capsys.readouterr().out


def test_losses_of_sources_without_online_mixing_add_up_and_go_on_after_a_resume(
    tiny_sample: Path, tmp_path: Path
) -> None:
    found = _run(tiny_sample, tmp_path / "whole", 6, [])
    names = ("code", "docs", "topics")
    for line, batches in enumerate(((0, 1), (2, 3), (4, 5))):
        weights, losses = ([found[f"{what}/{s}"][line] for s in names] for what in ("mixture/objective", "loss/train"))
        assert sum(weights) == pytest.approx(1)
        total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        assert total == pytest.approx(np.mean([found["loss/train/total"][batch] for batch in batches]), rel=2e-3)

    _run(tiny_sample, tmp_path / "parts", 3, [], save_folder=str(tmp_path / "saved"), save_interval="3ba")
    latest = str(tmp_path / "saved" / "latest-rank0.pt")
    later = _run(tiny_sample, tmp_path / "parts", 6, [], load_path=latest)
    for name in names:  # the line after batch 4 takes in batch 3, from before the stop
        assert later[f"loss/train/{name}"] == pytest.approx(found[f"loss/train/{name}"][1:])
