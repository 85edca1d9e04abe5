"""How influence is measured: cosine by source, layers, on training's own microbatches; and when: few updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from cheapertraining.builders import build_estimator
from cheapertraining.config import RunConfig, load_run_config
from cheapertraining.errors import UserError
from cheapertraining.influence import InfluenceConfig, ProbeBank, SourceEstimator
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.scorers.accumulation import MicrobatchEstimator
from cheapertraining.influence.scorers.microbatch import source_microbatches
from cheapertraining.mixing import (
    Constraints,
    InfluenceStrategy,
    MixtureController,
    ODMStrategy,
    OnlineMixing,
    StaticStrategy,
)
from cheapertraining.training import train
from tests.influence.test_forward import autograd_products
from tests.influence.tiny_llama import Sources, probe_loader, tiny_llama
from tests.mixing.plan_mixture import PlanMixture
from tests.mixing.test_source_changes import run_yaml
from tests.observe.tiny_trainer import tiny_loader, tiny_trainer

PROBES = {"p": probe_loader(low=0, high=20), "q": probe_loader(low=30, high=50)}
EVERY = {"code": 1.0, "docs": 1.0, "topics": 1.0}


# ---- separate samples ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", ["all", "last_1", ["*mlp*"]])
def test_cosine_divides_by_the_norm_of_each_source_s_gradient(layers: Any) -> None:
    """Outside reference: autograd, over the selected parameters alone."""
    model = tiny_llama(dtype=torch.float64).eval()
    options: dict[str, Any] = {"scorer": "hook", "layers": layers, "source_samples": 3}
    found = SourceEstimator(Sources(), PROBES, metric="cosine", **options).measure(
        model, update_index=2, microbatch_size=4
    )
    raw = SourceEstimator(Sources(), PROBES, **options).measure(model, update_index=2)
    parameters = select_parameters(model, layers)
    for column, source in enumerate(("a", "b", "c")):
        sums, tokens = sample_losses(model, Sources().draw(source, 3, 2))
        gradients = torch.autograd.grad(sums.sum() / tokens.sum(), list(parameters.values()))
        norm = float(torch.stack([(part**2).sum() for part in gradients]).sum().sqrt())
        for row, probe in enumerate(("p", "q")):
            direction, _ = ProbeBank(PROBES).gradient(model, probe, 2, parameters)
            product = sum(float((one * other).sum()) for one, other in zip(gradients, direction.values(), strict=True))
            assert raw.scores[row, column] == pytest.approx(product, rel=1e-6)
            assert found.scores[row, column] == pytest.approx(product / norm, rel=1e-6)
            assert found.errors[row, column] == pytest.approx(raw.errors[row, column] / norm, rel=1e-6)


def test_cosine_without_norms_is_refused() -> None:
    for scorer in ("forward", "loop"):
        with pytest.raises(UserError, match=f"which scorer '{scorer}' does not give. Use scorer 'hook'"):
            SourceEstimator(Sources(), PROBES, metric="cosine", scorer=scorer)
    with pytest.raises(UserError, match="'cosine' needs the norm"):
        InfluenceConfig(metric="cosine")
    assert InfluenceConfig(metric="cosine", scorer="hook", layers="last_1").layers == "last_1"


# ---- training's microbatches ---------------------------------------------------------------------------------
def test_scores_of_a_plain_loop_are_those_of_autograd() -> None:
    model = tiny_llama(dtype=torch.float64).eval()
    names = ("a", "b", "c", "never")
    estimator = MicrobatchEstimator(names, PROBES, layers="last_1")
    with pytest.raises(UserError, match=r"expected prepare\(\) and a batch"):
        estimator.measure(model, update_index=0)
    estimator.prepare(model)
    parameters = select_parameters(model, "last_1")
    directions = {probe: ProbeBank(PROBES).gradient(model, probe, 0, parameters)[0] for probe in PROBES}
    pieces: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for number in range(3):
        batch = {
            key: torch.cat([Sources().draw(name, 3, number)[key] for name in names[:3]])
            for key in Sources().draw("a", 1, 0)
        }
        batch["source"] = torch.arange(3).repeat_interleave(3)
        estimator.begin_batch()
        model.zero_grad()
        for part in source_microbatches(batch, 2):
            estimator.begin_pass()
            sums, tokens = sample_losses(model, part)
            (0.25 * sums.sum()).backward()
            estimator.mark(part["source"], tokens.sum(), torch.tensor(0.25))
            for probe, direction in directions.items():
                whole = {n: direction.get(n, torch.zeros_like(p)) for n, p in select_parameters(model).items()}
                product = float(autograd_products(model, part, whole).sum())
                pieces.setdefault((probe, int(part["source"][0])), []).append((product, int(tokens.sum())))
        estimator.end_batch()
    found = estimator.measure(model, update_index=1)
    assert found.sources == names
    assert found.samples == 6
    for row, probe in enumerate(PROBES):
        known = []
        for source in range(3):
            products, tokens = np.array(pieces[probe, source]).T
            mean = products.sum() / tokens.sum()
            known.append(mean)
            assert found.scores[row, source] == pytest.approx(mean, rel=1e-7)
            error = np.sqrt(6 / 5 * ((products - mean * tokens) ** 2).sum()) / tokens.sum()
            assert found.errors[row, source] == pytest.approx(error, rel=1e-6)
        assert found.scores[row, 3] == pytest.approx(np.mean(known))
        assert found.errors[row, 3] == pytest.approx(np.sqrt(6 * np.mean(found.errors[row, :3] ** 2)))
    with pytest.raises(UserError, match="expected a source that came in two microbatches"):
        estimator.measure(model, update_index=2)
    estimator.begin_batch()
    estimator.begin_pass()
    estimator.mark(torch.tensor([0, 1]), torch.tensor(1), torch.tensor(1.0))
    with pytest.raises(UserError, match="expected one source in each microbatch"):
        estimator.end_batch()
    with pytest.raises(UserError, match="takes raw or adam, found 'kfac'"):
        MicrobatchEstimator(names, PROBES, metric="kfac")


class ByAutograd(Callback):
    """Reference: products of each microbatch's gradient with the estimator's directions, by passes of its own."""

    def __init__(self, estimator: MicrobatchEstimator) -> None:
        self.estimator = estimator
        self.sums, self.tokens = np.zeros(3), np.zeros(3)

    def after_forward(self, state: State, logger: Logger) -> None:
        if not self.estimator.ready:
            return
        parameters = select_parameters(state.model)
        sums, tokens = sample_losses(state.model, state.batch)
        gradients = torch.autograd.grad(sums.sum(), list(parameters.values()))
        assert self.estimator._directions is not None
        tensors = self.estimator._directions.tensors
        pairs = zip(parameters, gradients, strict=True)
        source = int(state.batch["source"][0])
        self.sums[source] += sum(float((tensors[name][0] * part).double().sum()) for name, part in pairs)
        self.tokens[source] += int(tokens.sum())


def trained(sample: Path, folder: Path, batches: int, watch: bool) -> tuple[OnlineMixing, list[torch.Tensor], Any]:
    loader = tiny_loader(sample)
    strategy = InfluenceStrategy(threshold=1e3) if watch else StaticStrategy()
    controller = MixtureController(loader.mixture, strategy, Constraints(), 4, 6, 10**6)
    estimator = MicrobatchEstimator(loader.mixture.source_names, loader.probes, probe_samples=3) if watch else None
    reference = ByAutograd(estimator) if estimator is not None else None
    mixing = OnlineMixing(controller, estimator)
    callbacks = [] if reference is None else [reference]
    trainer = tiny_trainer(loader, folder, batches, callbacks, algorithms=[mixing], save_folder=None)
    trainer._train_data_spec.split_batch = source_microbatches  # type: ignore[union-attr]
    trainer.state.device_train_microbatch_size = 3
    trainer.fit()
    return mixing, [parameter.detach().clone() for parameter in trainer.state.model.parameters()], reference


def test_training_s_own_passes_give_the_scores(tiny_sample: Path, tmp_path: Path) -> None:
    """From two batches on (an interval before the first decision), and training is that without a look."""
    mixing, parameters, reference = trained(tiny_sample, tmp_path / "a", 6, watch=True)
    (decision,) = mixing.controller.history
    for column, name in enumerate(mixing.controller.source_names):
        mean = reference.sums[column] / reference.tokens[column]
        assert decision.scores["code"][name] == pytest.approx(mean, rel=1e-3)
    _, unwatched, _ = trained(tiny_sample, tmp_path / "b", 6, watch=False)
    assert all(torch.equal(one, other) for one, other in zip(parameters, unwatched, strict=True))
    seen = mixing.controller.totals.tokens
    assert 0.4 * seen.sum() < reference.tokens.sum() < 0.8 * seen.sum()


MICROBATCH = (
    "algorithms.online_mixing.influence.scorer=microbatch",
    "algorithms.online_mixing.influence.metric=adam",
    "train_loader.device_microbatch_size=2",
    "max_duration=10ba",
    "save_interval=1ba",
)


def set_back(folder: Path, batch: int) -> None:
    (folder / "checkpoints/latest-rank0.pt").unlink()
    (folder / "checkpoints/latest-rank0.pt").symlink_to(f"ep0-ba{batch}-rank0.pt")


@pytest.mark.parametrize("when", ["algorithms.online_mixing.interval=3ba", "algorithms.online_mixing.updates=[4,9]"])
def test_a_run_on_microbatches_resumes_exactly(tiny_sample: Path, tmp_path: Path, when: str) -> None:
    yaml = run_yaml(tmp_path, tiny_sample, EVERY)
    overrides = [*MICROBATCH, when, "algorithms.online_mixing.warmup=3ba"]
    straight = [
        parameter.detach().clone() for parameter in train(load_run_config(yaml, overrides)).state.model.parameters()
    ]
    ledger = (tmp_path / "runs/tiny/mixture.jsonl").read_text()
    decided = [json.loads(line) for line in ledger.splitlines()]
    assert [entry["batch"] for entry in decided] == ([3, 6, 9] if "interval" in when else [4, 9])
    assert any(entry["from_batch"] is not None for entry in decided)
    for stop in (5, 8):
        set_back(tmp_path / "runs/tiny", stop)
        resumed = train(load_run_config(yaml, overrides)).state.model.parameters()
        assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))
        assert (tmp_path / "runs/tiny/mixture.jsonl").read_text() == ledger


# ---- few updates ---------------------------------------------------------------------------------------------
def due_of(updates: Any, **options: Any) -> list[int]:
    mixture = PlanMixture({"a": 100, "b": 100}, batch_size=10)
    settings = {"interval": 5, "warmup": 20, "horizon_tokens": 100 * 40} | options
    controller = MixtureController(mixture, ODMStrategy(), Constraints(), updates=updates, **settings)
    found = [batch for batch in range(101) if controller.due(batch)]
    assert [controller.next_due(batch) for batch in range(found[-1])] == [
        next(due for due in found if due > batch) for batch in range(found[-1])
    ]
    return found


def test_few_updates_are_spread_or_named() -> None:
    assert due_of(None) == list(range(20, 101, 5))
    assert due_of(4) == [20, 40, 60, 80]
    assert due_of(1, warmup=0) == [1]
    assert due_of([7, 30, 31]) == [7, 30, 31]
    for wrong in ([3, 2], [0, 4], []):
        with pytest.raises(UserError, match=r"online_mixing\.updates: expected a number, or batches from 1 on"):
            due_of(wrong)
    with pytest.raises(UserError, match="expected from 1 to the 80 batches between warm-up and end, found 81"):
        due_of(81)


# ---- the yaml ------------------------------------------------------------------------------------------------
def config_of(sample: Path, tmp_path: Path, *overrides: str) -> RunConfig:
    key = "algorithms.online_mixing."
    return load_run_config(run_yaml(tmp_path, sample, EVERY), ["max_duration=8ba", *(key + each for each in overrides)])


def test_the_yaml_reaches_the_estimator(tiny_sample: Path, tmp_path: Path) -> None:
    probes = "data.probes={docs: {source: docs, weight: 3}}"
    config = load_run_config(
        run_yaml(tmp_path, tiny_sample, EVERY),
        ["max_duration=8ba", probes, "algorithms.online_mixing.influence={layers: last_1, probes: {docs: 2.0}}"],
    )
    loader = tiny_loader(tiny_sample)
    loader.probes = {"code": loader.probes["code"], "docs": loader.heldout["docs"]}
    assert config.algorithms.online_mixing is not None
    found = build_estimator(config, config.algorithms.online_mixing, loader)
    assert (found.layers, found.bank.weights) == ("last_1", {"docs": 1.0})
    config = config_of(tiny_sample, tmp_path, "influence.scorer=microbatch")
    mixing = config.algorithms.online_mixing
    assert mixing is not None
    assert isinstance(build_estimator(config, mixing, tiny_loader(tiny_sample)), MicrobatchEstimator)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("influence.metric=cosine", "influence.metric .*: .*which scorer 'forward' does not give: use 'hook'"),
        ("influence={metric: kfac, scorer: microbatch}", "influence.metric .*: .*expected raw or adam, found 'kfac'"),
        ("influence.probes={cod: 1}", r"influence.probes.cod .*: no such probe in data.probes.* Did you mean 'code'"),
        ("influence.probes={code: 0}", "influence.probes .*: expected a weight above 0"),
        ("updates=[9, 4]", "updates .*: expected batches that rise"),
        ("updates=0", "updates .*: expected a whole number of at least 1 or a list"),
    ],
)
def test_options_that_do_not_go_together(override: str, message: str, tiny_sample: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        config_of(tiny_sample, tmp_path, override)
