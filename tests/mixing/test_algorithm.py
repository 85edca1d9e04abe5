"""OnlineMixing in a real Composer trainer over real shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger

from cheapertraining.data.mixing import MixtureLoader
from cheapertraining.errors import UserError
from cheapertraining.influence import SourceEstimator
from cheapertraining.mixing import (
    Constraints,
    InfluenceStrategy,
    MixtureController,
    OnlineMixing,
    ProportionalStrategy,
    StaticStrategy,
    Strategy,
)
from tests.observe.tiny_trainer import GLOBAL_BATCH, LAG, ROW, tiny_loader, tiny_trainer
from tests.processes import start

NAMES = ("code", "docs", "topics")


def mixing_of(
    loader: MixtureLoader, strategy: Strategy | None = None, ledger: Path | None = None, **options: int
) -> OnlineMixing:
    strategy = strategy or InfluenceStrategy(threshold=0.0)
    settings = {"interval": 3, "warmup": 3, "horizon_tokens": 10**6} | options
    controller = MixtureController(loader.mixture, strategy, Constraints(floor=0.05, kl_step=0.5), **settings)
    estimator = None
    if controller.needs_influence:
        estimator = SourceEstimator(loader.mixture, loader.probes, probe_samples=4, source_samples=4)
    return OnlineMixing(controller, estimator, ledger_path=ledger, log_interval=2)


class BySource(Callback):
    """Reference: sums the losses by source itself, one sample at a time."""

    def __init__(self) -> None:
        self.sums = np.zeros((2, 3))

    def after_loss(self, state: State, logger: Logger) -> None:
        for row, source in enumerate(state.batch["source"].tolist()):
            self.sums[0, source] += float(state.outputs["sample_loss_sum"][row])
            self.sums[1, source] += float(state.outputs["sample_tokens"][row])


def run(
    sample: Path, runs: Path, batches: int, strategy: Strategy | None = None, **options: Any
) -> tuple[Trainer, OnlineMixing, dict[str, list[Any]]]:
    """Train; return what is left, and all that was logged."""
    loader = tiny_loader(sample)
    mixing = mixing_of(loader, strategy, runs / "ledger.jsonl")
    logger = InMemoryLogger()
    microbatch, callbacks = options.pop("microbatch", GLOBAL_BATCH), options.pop("callbacks", ())
    trainer = tiny_trainer(loader, runs, batches, callbacks, [logger], algorithms=[mixing], **options)
    trainer.state.device_train_microbatch_size = microbatch
    trainer.fit()
    logged = {name: [value for _, value in points] for name, points in logger.data.items()}
    return trainer, mixing, logged


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.state.model.parameters()]


def lines(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(
    tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, OnlineMixing, dict[str, list[Any]], BySource, Path]:
    runs, reference = tmp_path_factory.mktemp("undisturbed"), BySource()
    trainer, mixing, logged = run(tiny_sample, runs, 12, callbacks=[reference])
    return trainer, mixing, logged, reference, runs


def test_decisions_reach_the_mixture_and_the_ledger(undisturbed: Any) -> None:
    _, mixing, _, _, runs = undisturbed
    history = mixing.controller.history
    assert [decision.batch for decision in history] == [3, 6, 9, 12]
    changed = [decision for decision in history if decision.from_batch is not None]
    assert changed
    for decision in changed:
        assert decision.from_batch == decision.batch + LAG
        if decision.from_batch < 12:
            assert mixing.controller.mixture.weights_at(decision.from_batch) == decision.weights
    written = lines(runs / "ledger.jsonl")
    assert [entry["batch"] for entry in written] == [3, 6, 9, 12]
    assert [entry["weights"] for entry in written] == [decision.weights for decision in history]
    assert written[0]["realized_since_last"] is None
    assert written[1]["realized_since_last"] == history[0].realized


def test_losses_by_source_are_those_of_the_samples(undisturbed: Any) -> None:
    _, mixing, logged, reference, _ = undisturbed
    mixing.state_dict()
    np.testing.assert_allclose(mixing.controller.totals.losses, reference.sums[0], rtol=1e-6)
    np.testing.assert_array_equal(mixing.controller.totals.tokens, reference.sums[1])
    for name in NAMES:
        assert 1.0 < logged[f"loss/train/{name}"][-1] < 8.0


def test_the_contract_s_metrics_are_logged(undisturbed: Any) -> None:
    _, mixing, logged, _, _ = undisturbed
    course = {2, 3, 4, 6, 8, 9, 10, 12}
    for name in NAMES:
        for kind in ("weight", "sampled", "tokens", "epochs"):
            assert len(logged[f"mixture/{kind}/{name}"]) == len(course)
        for kind in ("score", "score_se"):
            assert len(logged[f"mixture/{kind}/code/{name}"]) == 4
    assert len(logged["mixture/probe_loss/code"]) == 4
    assert sum(logged[f"mixture/tokens/{name}"][-1] for name in NAMES) == 12 * GLOBAL_BATCH * ROW
    assert sum(logged[f"mixture/weight/{name}"][-1] for name in NAMES) == pytest.approx(1)
    assert all(0 < share < 1 for share in logged["mixture/overhead"])
    newest = mixing.controller.mixture.get_current_weights()
    assert {name: logged[f"mixture/weight/{name}"][-1] for name in NAMES} == newest
    assert logged["mixture/sampled/code"][0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_run_is_the_undisturbed_one(stop: int, undisturbed: Any, tiny_sample: Path, tmp_path: Path) -> None:
    """Stopped between two decisions, and right after one: the same weights, decisions, parameters and ledger."""
    straight, mixing, _, _, runs = undisturbed
    run(tiny_sample, tmp_path, stop + 1)  # Goes on beyond the checkpoint, so the ledger has to be cut back.
    with (tmp_path / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"batch": 7, "from_ba')  # Killed while writing.
    checkpoint = str(tmp_path / f"tiny/checkpoints/ep0-ba{stop}-rank0.pt")
    resumed, again, _ = run(tiny_sample, tmp_path, 12, load_path=checkpoint, save_folder=None)
    assert again.controller.history == mixing.controller.history
    assert again.controller.state_dict() == mixing.controller.state_dict()
    assert (tmp_path / "ledger.jsonl").read_text() == (runs / "ledger.jsonl").read_text()
    for one, other in zip(weights_of(resumed), weights_of(straight), strict=True):
        assert torch.equal(one, other)


def test_measuring_does_not_touch_training(tiny_sample: Path, tmp_path: Path) -> None:
    """A strategy that measures and never acts trains bit for bit like one that does nothing."""
    doubting, _, _ = run(tiny_sample, tmp_path / "a", 7, InfluenceStrategy(threshold=1e3), save_folder=None)
    still, _, _ = run(tiny_sample, tmp_path / "b", 7, StaticStrategy(), save_folder=None)
    for one, other in zip(weights_of(doubting), weights_of(still), strict=True):
        assert torch.equal(one, other)


def test_microbatches_add_up(tiny_sample: Path, tmp_path: Path) -> None:
    _, parts, _ = run(tiny_sample, tmp_path / "parts", 2, StaticStrategy(), microbatch=5, save_folder=None)
    _, whole, _ = run(tiny_sample, tmp_path / "whole", 2, StaticStrategy(), save_folder=None)
    np.testing.assert_allclose(parts.controller.totals.losses, whole.controller.totals.losses, rtol=1e-3)
    np.testing.assert_array_equal(parts.controller.totals.tokens, whole.controller.totals.tokens)


def test_open_loop_strategies_hold_from_batch_0(tiny_sample: Path, tmp_path: Path) -> None:
    _, mixing, logged = run(tiny_sample, tmp_path, 4, ProportionalStrategy(), save_folder=None)
    assert mixing.controller.history[0].batch == 0
    available = mixing.controller.mixture.available_tokens
    expected = Constraints(floor=0.05).project(dict(available))
    assert logged["mixture/sampled/code"][0] == pytest.approx(expected["code"], abs=1e-6)
    assert lines(tmp_path / "ledger.jsonl")[0]["from_batch"] == 0


def test_influence_without_a_probe_is_refused(tiny_sample: Path) -> None:
    loader = tiny_loader(tiny_sample)
    controller = MixtureController(loader.mixture, InfluenceStrategy(), Constraints(), 3, 3, 10**6)
    with pytest.raises(UserError, match="'influence' measures influence on probes, but there is no probe"):
        OnlineMixing(controller)


def test_outputs_without_losses_by_sample_are_refused(tiny_sample: Path) -> None:
    mixing = mixing_of(tiny_loader(tiny_sample))
    with pytest.raises(UserError, match="found no 'sample_loss_sum'"):
        mixing._add_microbatch({"source": torch.zeros(2)}, {"logits": torch.zeros(2)})


def test_a_checkpoint_of_other_sources_is_refused(tiny_sample: Path) -> None:
    mixing = mixing_of(tiny_loader(tiny_sample))
    state = json.loads(json.dumps(mixing.state_dict()))
    state["controller"]["sources"] = ["code", "poems"]
    with pytest.raises(UserError, match=r"sources code, poems; this run has code, docs, topics"):
        mixing.load_state_dict(state)


def test_state_is_plain_numbers_that_json_keeps_exactly(undisturbed: Any) -> None:
    _, mixing, _, _, _ = undisturbed
    state = mixing.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state


@pytest.mark.slow
def test_two_ranks_decide_what_one_does(tiny_sample: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("ranks_trainer.py")
    for ranks in (1, 2):
        process = start(script, str(tiny_sample), str(tmp_path), folder=tmp_path, ranks=ranks)
        output, errors = process.communicate()
        assert process.returncode == 0, output + errors
    names = ("0of1.json", "0of2.json", "1of2.json")
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in names)
    assert first == second
    for one, two in zip(alone["controller"]["history"], first["controller"]["history"], strict=True):
        assert two["batch"] == one["batch"]
        assert two["weights"] == pytest.approx(one["weights"], abs=1e-3)
    for source, (losses, tokens) in first["controller"]["totals"].items():
        assert tokens == alone["controller"]["totals"][source][1]
        assert losses == pytest.approx(alone["controller"]["totals"][source][0], rel=1e-4)
    assert len(lines(tmp_path / "ledger.jsonl")) == 2
    for name, values in first["told"].items():
        np.testing.assert_allclose(values, alone["told"][name], rtol=2e-3, atol=1e-6, err_msg=name)
