"""InfluenceAwareOptimizer: an optimizer like any other that moves the mixture; exact when resumed, harmless on failure.

On real shards, a tiny Llama and the real loader.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LinearLR, SequentialLR

from cheapertraining.errors import UserError
from cheapertraining.influence import InfluenceAwareOptimizer
from tests.influence import optimizer_ranks
from tests.influence.plain_run import EVEN, Run, make_run, same_state
from tests.processes import run_on_ranks


@pytest.fixture
def run(tiny_sample: Path) -> Run:
    return make_run(tiny_sample / "data.yaml")


# ---- it moves the mixture --------------------------------------------------------------------------------------------
def test_weight_moves_to_the_source_of_the_probes_domain(tiny_sample: Path) -> None:
    run = make_run(tiny_sample / "data.yaml", interval=4)
    run.train(60)
    assert run.weights["code"] > 0.6
    assert len(run.calculator.controller.history) == 15
    drawn = run.loader.mixture.counts().samples / (6 * 60)
    assert drawn[0] > 0.45  # the batches follow, not only the reported weights


def test_weights_stay_where_all_sources_are_the_same(tiny_sample: Path, tmp_path: Path) -> None:
    for name in "abc":
        shutil.copytree(tiny_sample / "code" / "train", tmp_path / name / "train")
    data = {
        "local": str(tmp_path),
        "tokenizer": str(tiny_sample / "tokenizer"),
        "seq_len": 32,
        "sources": {name: {} for name in "abc"},
        "probes": {"code": {"local": str(tiny_sample / "code")}},
    }
    run = make_run(data, interval=4, threshold=2.5)
    run.train(60)
    assert run.weights == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=0.05)


def test_updates_come_every_interval_and_not_before(run: Run) -> None:
    run.train(2)
    assert (run.optimizer._last_update_step, run.calculator.controller.measurements) == (0, 0)
    run.train(5)
    assert (run.optimizer._last_update_step, run.calculator.controller.measurements) == (6, 2)
    assert run.optimizer.mixed_dataset is run.loader.mixture
    assert run.optimizer.update_interval == 3
    assert type(run.optimizer).__name__ == "InfluenceAwareOptimizer"


def test_rank_zero_alone_logs_the_weights(tiny_sample: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cheapertraining.influence.optimizer"):
        run = make_run(tiny_sample / "data.yaml", interval=1)
        run.train(1)
        run.optimizer.rank = 1
        run.train(1)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 1"]


# ---- it is an optimizer ----------------------------------------------------------------------------------------------
def test_steps_are_those_of_the_bare_optimizer(tiny_sample: Path) -> None:
    """A measurement between steps leaves no trace in the training: not in parameters, not in dropout's randomness."""
    wrapped = make_run(tiny_sample / "data.yaml", interval=2)
    bare = make_run(tiny_sample / "data.yaml", interval=1000)
    torch.manual_seed(1)
    batches = [wrapped.loader.mixture.draw("code", 6, key) for key in range(5)]
    for run, optimizer in ((wrapped, wrapped.optimizer), (bare, bare.inner)):
        torch.manual_seed(2)
        run.model.train()
        for batch in batches:
            run.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    assert wrapped.calculator.controller.measurements == 2
    assert same_state(dict(wrapped.model.state_dict()), dict(bare.model.state_dict()))


def test_schedulers_move_the_inner_learning_rate(run: Run) -> None:
    scheduler = SequentialLR(
        run.optimizer,
        [LinearLR(run.optimizer, 0.1, 1.0, total_iters=2), ConstantLR(run.optimizer, 0.5, total_iters=100)],
        milestones=[2],
    )
    rates = []
    for batch in islice(run.loader, 4):
        run.backward(batch)
        run.optimizer.step()
        scheduler.step()
        rates.append(run.inner.param_groups[0]["lr"])
    assert rates == pytest.approx([3e-3 * factor for factor in (0.55, 0.5, 0.5, 0.5)])
    assert LambdaLR(run.optimizer, lambda step: 0.25).get_last_lr() == [pytest.approx(3e-3 * 0.25)]


def test_groups_state_and_defaults_are_shared(run: Run) -> None:
    extra = torch.nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert isinstance(run.optimizer, torch.optim.Optimizer)
    assert run.optimizer.param_groups is run.inner.param_groups
    assert len(run.inner.param_groups) == 2
    run.train(1)
    assert run.optimizer.state is run.inner.state
    run.inner.load_state_dict(copy.deepcopy(run.inner.state_dict()))
    assert run.optimizer.param_groups is run.inner.param_groups
    assert run.optimizer.defaults is run.inner.defaults


def test_zero_grad_drops_gradients_and_closures_are_called(run: Run) -> None:
    batch = next(iter(run.loader))
    calls = []

    def closure() -> float:
        run.optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in run.model.parameters())
        run.backward(batch)
        calls.append(1)
        return 7.0

    assert run.optimizer.step(closure) == 7.0
    assert calls == [1]
    run.optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in run.model.parameters())


def test_step_hooks_are_called_once(run: Run) -> None:
    seen = []
    before = run.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run.train(1)
    before.remove()
    run.train(1)
    assert seen == ["before", "after", "after"]


def test_a_deep_copy_goes_its_own_way(run: Run) -> None:
    LambdaLR(run.optimizer, lambda step: 1.0)  # hangs things on the optimizer
    run.train(4)
    twin = copy.deepcopy(run.optimizer)
    ours = [parameter for group in run.inner.param_groups for parameter in group["params"]]
    theirs = [parameter for group in twin.param_groups for parameter in group["params"]]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(ours, theirs, strict=True))
    assert same_state(twin.state_dict(), run.optimizer.state_dict())
    run.train(5)
    assert (twin._step, run.optimizer._step) == (4, 9)
    assert twin.mixed_dataset.get_current_weights() != run.weights


# ---- it resumes ------------------------------------------------------------------------------------------------------
def test_resumed_run_goes_on_bit_for_bit(tiny_sample: Path, tmp_path: Path) -> None:
    data = tiny_sample / "data.yaml"
    whole = make_run(data)
    whole.train(8)
    torch.save({"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}, tmp_path / "state.pt")
    random_state = torch.get_rng_state()
    whole.train(10)

    resumed = make_run(data)
    resumed.train(1)  # what was done before loading does not matter
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    json.dumps(saved["optimizer"]["influence"], allow_nan=False)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(random_state)
    resumed.train(10)
    assert resumed.weights == whole.weights != pytest.approx(EVEN, abs=1e-3)
    assert same_state(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_state_of_the_bare_optimizer_is_taken_with_a_word(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.train(4)
    weights = run.weights
    run.optimizer.load_state_dict(copy.deepcopy(run.inner.state_dict()))
    assert "without the mixture's" in caplog.text
    assert run.weights == weights


def test_state_of_other_sources_is_refused(run: Run, tiny_sample: Path) -> None:
    two = {"local": str(tiny_sample), "seq_len": 32, "sources": {"code": {}, "docs": {}}}
    other = make_run({**two, "probes": {"code": {"source": "code"}}})
    other.train(1)
    with pytest.raises(UserError, match="topics"):
        run.optimizer.load_state_dict(other.optimizer.state_dict())


# ---- it fails well ---------------------------------------------------------------------------------------------------
def test_a_failed_measurement_raises_once_and_leaves_everything_as_it_was(run: Run) -> None:
    """A probe whose loss is not a number: the step is made, no weight moves, and the next try is an interval later."""
    run.train(4)
    batches = iter(run.loader)
    dead = run.model.model.embed_tokens.weight
    hook = run.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    for step in (5, 6):
        run.model.zero_grad()
        hook.remove()
        run.backward(next(batches))
        gradient = dead.grad.clone()
        before = copy.deepcopy(run.calculator.state_dict())
        hook = run.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        if step == 5:
            run.optimizer.step()
            continue
        random_state = torch.get_rng_state()
        with pytest.raises(UserError, match="probe 'code': expected a finite loss, found nan"):
            run.optimizer.step()
        assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(dead.grad, gradient)
    assert torch.isfinite(dead).all()
    assert run.model.training
    assert same_state(run.calculator.state_dict(), before)
    assert run.optimizer._last_update_step == 3
    run.optimizer.step()  # step 7: not tried again
    hook.remove()
    run.model.zero_grad()
    run.train(2)
    assert run.optimizer._last_update_step == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_interval": 0}, "update_interval: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate .* expected above 0"),
        ({"mixed_dataset": [1, 2]}, "mixed_dataset: expected a cheapertraining.data.MixedDataset"),
        ({"optimizer": "adam"}, "optimizer: expected a torch.optim.Optimizer, found str"),
    ],
)
def test_bad_arguments(run: Run, settings: dict[str, Any], message: str) -> None:
    good = {"optimizer": run.inner, "mixture_calculator": run.calculator, "mixed_dataset": run.loader.mixture}
    with pytest.raises(UserError, match=message):
        InfluenceAwareOptimizer(**{**good, **settings})


# ---- several ranks ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_ranks_agree_and_differing_ranks_are_stopped(tiny_sample: Path, tmp_path: Path) -> None:
    run_on_ranks(optimizer_ranks.train, str(tmp_path), str(tiny_sample))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert "ranks disagree on the new weights by up to 0.1" in first["said"]
    assert first == second
    assert first["weights"] != pytest.approx(EVEN, abs=1e-3)
