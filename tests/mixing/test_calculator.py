"""MixtureWeightCalculator: several probes, every metric by every scorer, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence import InfluenceAwareOptimizer, InfluenceConfig
from cheapertraining.mixing import MixtureWeightCalculator
from tests.influence.plain_run import EVEN, Run, make_run, same_state, tiny_model


@pytest.fixture
def run(tiny_sample: Path) -> Run:
    return make_run(tiny_sample / "data.yaml")


def test_several_probes_are_several(tiny_sample: Path) -> None:
    """Each has its own direction, in the order given; none is measured with another's loader."""
    data = {
        "local": str(tiny_sample),
        "seq_len": 32,
        "sources": {name: {} for name in EVEN},
        "probes": {"code": {"source": "code"}, "topics": {"source": "topics"}},
    }
    run = make_run(data)
    run.train(3)
    both = run.calculator.controller.history[-1]
    assert list(both.scores) == list(both.probe_losses) == ["code", "topics"]
    assert both.probe_losses["code"] != both.probe_losses["topics"]
    for name in both.scores:
        alone = MixtureWeightCalculator(tiny_model(), run.loader.probes[name], run.calculator.influence_config)
        alone.model.load_state_dict(run.model.state_dict())
        alone.attach(run.loader.mixture)
        alone.update()
        (scores,) = alone.controller.history[-1].scores.values()
        assert scores == pytest.approx(both.scores[name], rel=1e-4)


def test_asking_for_weights_changes_nothing(run: Run) -> None:
    run.train(9)
    before = copy.deepcopy(run.optimizer.state_dict())
    asked = run.calculator.compute_mixture_weights(run.inner)
    assert same_state(before, run.optimizer.state_dict())
    assert len(run.calculator.controller.history) == 3
    assert run.calculator.update(run.inner) == pytest.approx(asked, abs=1e-8)
    assert asked != pytest.approx(EVEN, abs=1e-3)


@pytest.mark.parametrize("metric", ["raw", "adam", "layer_scale", "datainf", "kfac", "ekfac"])
def test_scorers_agree_on_every_metric(run: Run, metric: str) -> None:
    """Look-ahead, one backward pass, and a backward pass for each sample: the same scores, whatever divides them."""
    run.train(2)
    found = []
    for scorer in ("forward", "hook", "loop"):
        config = InfluenceConfig(metric=metric, scorer=scorer, microbatch_size=5)
        calculator = MixtureWeightCalculator(run.model, run.loader.probes, config)
        calculator.attach(run.loader.mixture)
        calculator.update(run.optimizer)
        found.append(calculator.controller.history[-1].scores["code"])
    assert found[1] == pytest.approx(found[2], rel=1e-4)
    assert found[0] == pytest.approx(found[2], abs=0.01 * max(map(abs, found[2].values())))  # a finite difference


def test_metrics_differ(run: Run) -> None:
    run.train(2)
    ratios = {}
    for metric in ("raw", "adam", "datainf", "ekfac"):
        calculator = MixtureWeightCalculator(run.model, run.loader.probes, {"metric": metric, "scorer": "hook"})
        calculator.attach(run.loader.mixture)
        calculator.update(run.optimizer)
        scores = calculator.controller.history[-1].scores["code"]
        ratios[metric] = scores["docs"] / scores["code"]
    assert len({round(ratio, 3) for ratio in ratios.values()}) == 4


def test_half_precision_is_refused_at_once_and_measured_by_a_backward_pass(tiny_sample: Path) -> None:
    run = make_run(tiny_sample / "data.yaml")
    half = run.model.to(torch.bfloat16)
    calculator = MixtureWeightCalculator(half, run.loader.probes)
    with pytest.raises(UserError, match=r"in torch\.bfloat16.* InfluenceConfig\(scorer='hook'\)"):
        InfluenceAwareOptimizer(run.inner, calculator, run.loader.mixture)
    calculator = MixtureWeightCalculator(half, run.loader.probes, {"scorer": "hook"})
    InfluenceAwareOptimizer(run.inner, calculator, run.loader.mixture, update_interval=1).step()
    assert all(score is not None for score in calculator.controller.history[-1].scores["code"].values())


def test_calculator_says_what_it_needs(run: Run) -> None:
    probes = run.loader.probes
    with pytest.raises(UserError, match=r"expected a torch\.nn\.Module, found AdamW"):
        MixtureWeightCalculator(run.inner, probes)
    with pytest.raises(UserError, match="found neither"):
        MixtureWeightCalculator(run.model)
    with pytest.raises(UserError, match="found both"):
        MixtureWeightCalculator(run.model, probes["code"], probe_dataloaders=probes)
    with pytest.raises(UserError, match="no mixture to measure yet"):
        MixtureWeightCalculator(run.model, probes).update()
    with pytest.raises(UserError, match="probe 'probe': expected a DataLoader over a finite dataset"):
        MixtureWeightCalculator(run.model, [1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_val": 0.1}, "no setting is named 'lambda_val' .* Use 'lambda_reg'"),
        ({"thresold": 1}, "Did you mean 'threshold'"),
        ({"source_samples": 1}, "source_samples: expected at least 2"),
        ({"ema": 1.0}, "ema: expected a number from 0 to below 1"),
        ({"metric": "cosine"}, "metric: 'cosine' needs the norm"),
        ({"scorer": "hok"}, "Did you mean 'hook'"),
        ({"lambda_reg": 0}, "lambda_reg: expected a positive number"),
        ({"floor": 0.5, "ceiling": 0.4}, "floor, ceiling"),
        ({"kl_step": 0}, "kl_step: expected a positive number"),
        ({"step_size": 2.0}, "step_size: expected a relative step"),
        ({"microbatch_size": 0}, "microbatch_size: expected at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InfluenceConfig(**settings)
    with pytest.raises(UserError, match=message):
        InfluenceConfig.of(settings)
