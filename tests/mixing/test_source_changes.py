"""Sources added and retired between runs: in the plan, the controller, every strategy, and a whole run."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cheapertraining.config import load_run_config
from cheapertraining.data import MixtureLoader, get_loader
from cheapertraining.data.plan import Exhausted, MixturePlan, carried_over
from cheapertraining.errors import UserError
from cheapertraining.influence import InfluenceAwareOptimizer
from cheapertraining.influence.scorers.gram import SourceGradients
from cheapertraining.mixing import (
    ADOStrategy,
    AioliStrategy,
    Constraints,
    DoGEStrategy,
    DoGETargetStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    InfluenceStrategy,
    MixtureController,
    MixtureWeightCalculator,
    ODMStrategy,
    PiKEStrategy,
    ProbeReading,
    ProportionalStrategy,
    RnBStrategy,
    SkillItStrategy,
    StaticStrategy,
    Strategy,
    UniMaxStrategy,
)
from cheapertraining.training import train
from tests.influence.plain_run import tiny_model
from tests.mixing.plan_mixture import PlanMixture, measured

OLD = {"a": [40, 30], "b": [25], "c": [50]}
NEW = {"d": [60], "c": [50], "a": [40, 30]}
STRATEGIES: list[Strategy] = [
    ADOStrategy(),
    AioliStrategy(hold=2),
    DoGEStrategy(),
    DoGETargetStrategy(),
    DoReMiStrategy(),
    GRAPEStrategy(),
    InfluenceStrategy(threshold=0.0, guard=True, robust=True),
    ODMStrategy(),
    PiKEStrategy(tilt=0.5),
    ProportionalStrategy(),
    RnBStrategy(ema=0.5),
    SkillItStrategy(),
    StaticStrategy(),
    UniMaxStrategy(),
]


def plan_of(shards: dict[str, list[int]], weights: dict[str, float] | None = None, **settings: Any) -> MixturePlan:
    weights = dict.fromkeys(shards, 1.0) if weights is None else weights
    return MixturePlan(shards, weights, global_batch_size=8, seed=3, shuffle_block_size=32, **settings)


def drawn(plan: MixturePlan, start: int, end: int) -> dict[str, list[int]]:
    """Samples by source, in the order in which the batches take them."""
    found: dict[str, list[int]] = {name: [] for name in plan.sources}
    for batch in range(start, end):
        planned = plan.plan(batch)
        for index, name in enumerate(plan.sources):
            found[name] += sorted(planned.sample[planned.source == index].tolist())
    return found


def test_weights_are_carried_over() -> None:
    old = {"a": 0.2, "b": 0.5, "c": 0.3}
    assert carried_over(old, {"c": 7.0, "b": 1.0, "a": 0.0}) == {"c": 0.3, "b": 0.5, "a": 0.2}
    # d asks for 1 of 4; a and c share the rest as 2 to 3.
    found = carried_over(old, {"d": 1.0, "a": 2.0, "c": 1.0})
    assert found == {"d": 0.25, "a": pytest.approx(0.75 * 0.4), "c": pytest.approx(0.75 * 0.6)}
    assert carried_over(old, {"a": 9.0, "b": 1.0}) == {"a": pytest.approx(2 / 7), "b": pytest.approx(5 / 7)}
    assert carried_over({"a": 0.0, "b": 1.0}, {"a": 1.0, "d": 3.0}) == {"a": 0.25, "d": 0.75}


def test_sources_that_stay_go_on_in_their_order() -> None:
    before, after = plan_of(OLD), plan_of(NEW, {"d": 1.0, "c": 1.0, "a": 2.0})
    seen = drawn(before, 0, 7)
    before.set_weights(12, {"a": 1.0, "b": 1.0, "c": 8.0})  # Decided, not yet in force.
    state = json.loads(json.dumps(before.state_dict(7)))
    after.load_state_dict(state, allow_source_changes=True)
    assert after.weights_at(7) == pytest.approx({"d": 0.25, "c": 0.375, "a": 0.375}, abs=1e-8)
    assert after.weights_at(12) == pytest.approx({"d": 0.25, "c": 0.75 * 8 / 9, "a": 0.75 / 9}, abs=1e-8)
    rest = drawn(after, 7, 40)
    for name, start in (("a", len(seen["a"])), ("c", len(seen["c"])), ("d", 0)):
        # Outside reference: the source's own endless order, from where it was left.
        order = plan_of(NEW).order(list(NEW).index(name)).take(0, start + len(rest[name])).tolist()
        assert sorted(rest[name]) == sorted(order[start:])
        if start:
            assert sorted(seen[name]) == sorted(order[:start])
    assert len(rest["a"]) > 0
    assert len(rest["d"]) > 40
    # A run resumed after the change is the undisturbed one, loaded twice or not.
    again = plan_of(NEW, {"d": 1.0, "c": 1.0, "a": 2.0})
    for _ in range(2):
        again.load_state_dict(json.loads(json.dumps(after.state_dict(15))))
    assert drawn(again, 15, 30) == drawn(after, 15, 30)


def test_what_cannot_be_taken_over_is_refused() -> None:
    state = plan_of(OLD).state_dict(0)
    with pytest.raises(UserError, match=r"has the sources a, b, c; .*set train_loader\.allow_source_changes to true"):
        plan_of(NEW).load_state_dict(state)
    with pytest.raises(UserError, match="None is in both"):
        plan_of({"x": [5]}).load_state_dict(state, allow_source_changes=True)
    with pytest.raises(UserError, match=r"samples was \{'a': 70, 'c': 50\} when .* and is \{'c': 50, 'a': 71\} now"):
        plan_of(NEW | {"a": [71]}).load_state_dict(state, allow_source_changes=True)


def mixture_of(shards: dict[str, list[int]]) -> PlanMixture:
    mixture = PlanMixture({name: sum(sizes) for name, sizes in shards.items()}, batch_size=8, lag=2)
    mixture.allow_source_changes = True
    return mixture


def decide(controller: MixtureController, mixture: PlanMixture, batches: int, seed: int) -> list[dict[str, float]]:
    """Train for some batches with signals that are noise of a seed; return the weights."""
    names, rng = controller.source_names, np.random.default_rng(seed)
    course = []
    for _ in range(batches):
        tokens = np.bincount(mixture.next_batch(), minlength=len(names)) * 4.0
        losses = (2 + rng.random(len(names))) * tokens
        controller.record(losses, tokens, 0.1 * losses)
        vectors = rng.standard_normal((len(names), 5))
        gram = vectors @ vectors.T
        ones = np.ones(len(names))
        influence = measured(
            names, rng.standard_normal((1, len(names))), np.full((1, len(names)), 0.2), changes=rng.standard_normal(1)
        )
        if controller.due(mixture.consumed):
            controller.step(
                mixture.consumed,
                influence if controller.needs_influence else None,
                1e-3,
                gradients=SourceGradients(names, gram, 0 * gram, np.diag(gram), ones, 4, 0.0),
                probe_losses=ProbeReading(("p", "q"), np.full(2, 0.5), 2 + rng.random(2)),
            )
        course.append(mixture.get_current_weights())
    return course


def interval_of(strategy: Strategy) -> int:
    return 3 if strategy.name == "ado" else 1  # Its fits take long.


def started(strategy: Strategy, shards: dict[str, list[int]]) -> tuple[MixtureController, PlanMixture]:
    mixture = mixture_of(shards)
    controller = MixtureController(mixture, strategy, Constraints(floor=0.02), interval_of(strategy), 1, 10**5)
    return controller, mixture


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_every_strategy_goes_on_with_other_sources(strategy: Strategy) -> None:
    controller, mixture = started(strategy, OLD)
    decide(controller, mixture, 9, seed=0)
    saved = json.loads(json.dumps({"controller": controller.state_dict(), "plan": mixture.plan.state_dict(9)}))
    controller, mixture = started(strategy, NEW)
    mixture.plan.load_state_dict(saved["plan"], allow_source_changes=True)
    mixture.consumed = 9
    controller.load_state_dict(saved["controller"])
    noted = controller.after_source_changes(9)
    assert noted[0].from_batch == 9
    assert noted[-1].weights == mixture.get_current_weights()
    for name in ("a", "c"):
        assert controller.totals.by_name(controller.source_names)[name] == saved["controller"]["totals"][name]
    assert controller.totals.by_name(controller.source_names)["d"] == [0.0, 0.0]
    state = json.loads(json.dumps({"c": controller.state_dict(), "p": mixture.plan.state_dict(9)}, allow_nan=False))
    course = decide(controller, mixture, 12, seed=1)
    assert all(set(weights) == set(NEW) and min(weights.values()) >= 0.02 - 1e-9 for weights in course)
    # And a resume right after the change is exact.
    controller, mixture = started(strategy, NEW)
    mixture.plan.load_state_dict(state["p"])
    mixture.consumed = 9
    controller.load_state_dict(state["c"])
    assert controller.after_source_changes(9) == []
    assert decide(controller, mixture, 12, seed=1) == course


def known(strategy: Strategy) -> dict[str, Any]:
    state = strategy.state_dict()
    return {key: value for key, value in state.items() if isinstance(value, dict)}


@pytest.mark.parametrize("strategy", [ODMStrategy(), DoReMiStrategy(), InfluenceStrategy()], ids=lambda s: s.name)
def test_what_is_known_of_a_source_stays(strategy: Strategy) -> None:
    controller, mixture = started(strategy, OLD)
    decide(controller, mixture, 9, seed=0)
    saved = controller.state_dict()
    before = {key: dict(value) for key, value in known(strategy).items()}
    controller, _ = started(strategy, NEW)
    controller.load_state_dict(saved)
    for key, values in known(strategy).items():
        if set(values) == set(NEW):
            assert {name: values[name] for name in ("a", "c")} == {name: before[key][name] for name in ("a", "c")}
            unknown = 0.0 if strategy.name == "influence" else np.mean([before[key]["a"], before[key]["c"]])
            assert values["d"] == pytest.approx(unknown)


def test_a_new_source_is_not_judged_by_scores_that_it_has_not() -> None:
    """Its first score equals the others' mean of many: nothing is beyond doubt, whatever the count of updates."""
    strategy = InfluenceStrategy(threshold=0.0)
    controller, mixture = started(strategy, OLD)
    scores: NDArray[np.float64] = np.full(3, 5.0)
    for _ in range(20):
        mixture.next_batch()
        controller.step(mixture.consumed, measured(("a", "b", "c"), scores, np.full(3, 0.1)))
    saved = controller.state_dict()
    controller, mixture = started(strategy, NEW)
    controller.load_state_dict(saved)
    first = dict(mixture.get_current_weights())
    mixture.consumed = 20
    controller.step(20, measured(controller.source_names, scores, np.full(3, 0.1)))
    assert mixture.get_current_weights() == pytest.approx(first, abs=1e-6)


# ---- within a run --------------------------------------------------------------------------------------------
def changing(policy: str, *, lag: int = 2) -> PlanMixture:
    """``c`` comes at batch 10; ``b`` has 24 rows, some ten batches' worth: no horizon is told to save them for."""
    return PlanMixture(
        {"a": 200, "b": 24, "c": 90},
        {"a": 1.0, "b": 1.0, "c": 1.0},
        batch_size=8,
        lag=lag,
        on_exhaustion=policy,
        max_epochs={"a": 50.0, "b": 1.0, "c": 50.0},
        from_batches={"c": 10},
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_a_source_that_comes_and_one_that_runs_out(strategy: Strategy) -> None:
    """Right across both changes the weights are finite, no cap is passed, and resumed runs are the undisturbed one."""

    def begun() -> tuple[MixtureController, PlanMixture]:
        mixture = changing("renormalize")
        limits = Constraints(floor=0.02, kl_step=0.5)
        return MixtureController(mixture, strategy, limits, interval_of(strategy), 1, horizon_tokens=1), mixture

    controller, mixture = begun()
    controller.start()
    course: list[dict[str, float]] = []
    saved: dict[int, Any] = {}
    for batch in range(40):
        if batch in (9, 25):
            saved[batch] = json.dumps({"c": controller.state_dict(), "p": mixture.plan.state_dict(batch)})
        course += decide(controller, mixture, 1, seed=batch)
    counts = mixture.plan.counts_before(40)
    assert mixture.plan.counts_before(10)[2] == 0
    assert counts[2] > 0
    assert counts[1] == 24
    assert min(min(weights.values()) for weights in course) >= 0
    for stop, text in saved.items():
        controller, mixture = begun()
        state = json.loads(text)
        mixture.plan.load_state_dict(state["p"])
        mixture.consumed = stop
        controller.load_state_dict(state["c"])
        again: list[dict[str, float]] = []
        for batch in range(stop, 40):
            again += decide(controller, mixture, 1, seed=batch)
        assert again == course[stop:]
        assert mixture.plan.counts_before(40).tolist() == counts.tolist()


def test_a_source_that_runs_out_ends_a_run_that_is_to_stop() -> None:
    mixture = changing("stop")
    controller = MixtureController(mixture, ODMStrategy(), Constraints(floor=0.02), 1, 1, horizon_tokens=1)
    with pytest.raises(Exhausted, match="used up: b"):
        decide(controller, mixture, 100, seed=0)
    assert 3 < mixture.consumed < 40
    assert controller.history[-1].batch == mixture.consumed


def test_a_source_that_comes_takes_its_weight_from_its_batch_on() -> None:
    plan = plan_of(OLD, {"a": 1.0, "b": 1.0, "c": 2.0}, from_batches={"c": 5})
    assert plan.weights_at(4) == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.0})
    assert plan.weights_at(5) == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})
    assert plan.newest_weights()["c"] == 0.5
    straight = drawn(plan, 0, 12)
    for stop in (3, 5, 8):
        other = plan_of(OLD, {"a": 1.0, "b": 1.0, "c": 2.0}, from_batches={"c": 5})
        other.load_state_dict(json.loads(json.dumps(plan.state_dict(stop))))
        first = drawn(plan_of(OLD, {"a": 1.0, "b": 1.0, "c": 2.0}, from_batches={"c": 5}), 0, stop)
        rest = drawn(other, stop, 12)
        assert {name: first[name] + rest[name] for name in rest} == straight
    # Weights set before it comes hold for it too, and stop is about sources that end, not about such as begin.
    plan = plan_of(OLD, from_batches={"c": 9}, on_exhaustion="stop")
    plan.set_weights(3, {"a": 1.0, "c": 3.0})
    assert plan.weights_at(3) == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert plan.weights_at(9)["c"] == 0.75
    with pytest.raises(Exhausted, match="no source with a weight has come by batch 0"):
        plan_of(OLD, {"c": 1.0}, from_batches={"c": 5}).plan(0)
    with pytest.raises(UserError, match="from_batch: no source is named 'd'"):
        plan_of(OLD, from_batches={"d": 5})


# ---- a whole run ---------------------------------------------------------------------------------------------
def run_yaml(folder: Path, sample: Path, sources: dict[str, float]) -> Path:
    listed = "".join(f"    {name}: {{weight: {weight}}}\n" for name, weight in sources.items())
    (folder / "data.yaml").write_text(
        f"data:\n  local: {sample}\n  seq_len: 32\n  sources:\n{listed}  probes:\n    code: {{source: code}}\n"
    )
    path = folder / "run.yaml"
    path.write_text(
        f"compose: {{data: {folder}/data.yaml}}\nrun_name: tiny\nseed: 3\ndevice: cpu\nsave_folder: {folder}/runs\n"
        "save_interval: 4ba\nsave_num_checkpoints_to_keep: -1\nautoresume: true\n"
        "model: {hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1}\n"
        "train_loader: {global_batch_size: 12, lag: 2}\neval_loader: {first: false, subset_num_batches: 1}\n"
        "loggers: {jsonl: {}}\n"
        "algorithms: {online_mixing: {interval: 2ba, warmup: 2ba, influence: {threshold: 0, probe_samples: 2}}}\n"
    )
    return path


def test_a_run_goes_on_with_other_sources(tiny_sample: Path, tmp_path: Path) -> None:
    old = run_yaml(tmp_path, tiny_sample, {"code": 1.0, "docs": 1.0})
    train(load_run_config(old, ["max_duration=4ba"]))
    new = run_yaml(tmp_path, tiny_sample, {"topics": 1.0, "code": 3.0})
    with pytest.raises(UserError, match=r"ep0-ba4-rank0\.pt: mixture state: .*train_loader\.allow_source_changes"):
        train(load_run_config(new, ["max_duration=8ba"]))
    changed = ["max_duration=12ba", "train_loader.allow_source_changes=true"]
    straight = train(load_run_config(new, changed))
    mixture = straight.state.train_dataloader.dataset  # type: ignore[union-attr]
    counts = dict(zip(mixture.source_names, mixture.counts().samples.tolist(), strict=True))
    assert counts["topics"] > 8
    folder = tmp_path / "runs/tiny"
    ledger = [json.loads(line) for line in (folder / "mixture.jsonl").read_text().splitlines()]
    entry = next(line for line in ledger if line["batch"] == 4 and "topics" in line["weights"])
    assert entry["from_batch"] == 4
    assert entry["weights"]["topics"] == pytest.approx(0.25, abs=1e-6)
    # Resumed with the same sources after the change: the same bits, and the same ledger.
    before = [parameter.detach().clone() for parameter in straight.state.model.parameters()]
    (folder / "checkpoints/latest-rank0.pt").unlink()
    (folder / "checkpoints/latest-rank0.pt").symlink_to("ep0-ba8-rank0.pt")
    resumed = train(load_run_config(new, changed[:1]))
    assert all(bool((a == b).all()) for a, b in zip(before, resumed.state.model.parameters(), strict=True))
    assert [json.loads(line) for line in (folder / "mixture.jsonl").read_text().splitlines()] == ledger
    # Killed before the next checkpoint: the change is made again, and noted once.
    (folder / "checkpoints/latest-rank0.pt").unlink()
    (folder / "checkpoints/latest-rank0.pt").symlink_to("ep0-ba4-rank0.pt")
    train(load_run_config(new, changed))
    assert [json.loads(line) for line in (folder / "mixture.jsonl").read_text().splitlines()] == ledger


def test_a_plain_loop_goes_on_with_other_sources(tiny_sample: Path, tmp_path: Path) -> None:
    def loop(sources: dict[str, float], allowed: bool) -> tuple[InfluenceAwareOptimizer, MixtureLoader]:
        run_yaml(tmp_path, tiny_sample, sources)
        loader = get_loader(tmp_path / "data.yaml", batch_size=6, lag=2, allow_source_changes=allowed)
        model = tiny_model()
        calculator = MixtureWeightCalculator(model, probe_dataloaders=loader.probes, influence_config={"threshold": 0})
        return InfluenceAwareOptimizer(torch.optim.AdamW(model.parameters()), calculator, loader.mixture, 2), loader

    def train(optimizer: InfluenceAwareOptimizer, loader: MixtureLoader, steps: int) -> None:
        for _ in islice(loader, steps):
            optimizer.step()

    optimizer, loader = loop({"code": 1.0, "docs": 1.0}, allowed=False)
    train(optimizer, loader, 3)
    state = json.loads(json.dumps(optimizer.mixture_calculator.state_dict()))
    mixture = loader.mixture.state_dict()
    _, other = loop({"topics": 1.0, "code": 3.0}, allowed=False)
    with pytest.raises(UserError, match=r"set train_loader\.allow_source_changes to true"):
        other.mixture.load_state_dict(mixture)
    optimizer, loader = loop({"topics": 1.0, "code": 3.0}, allowed=True)
    loader.mixture.load_state_dict(mixture)
    optimizer.mixture_calculator.load_state_dict(state)
    assert loader.mixture.get_current_weights() == pytest.approx({"topics": 0.25, "code": 0.75}, abs=1e-8)
    train(optimizer, loader, 4)
    history = optimizer.mixture_calculator.controller.history
    assert set(history[0].weights) == {"code", "docs"}
    assert set(history[-1].weights) == {"topics", "code"}


def test_state_of_the_record_is_a_value() -> None:
    """Decisions noted for the ledger are no part of the history that a checkpoint keeps."""
    controller, mixture = started(ODMStrategy(), OLD)
    decide(controller, mixture, 3, seed=0)
    saved = controller.state_dict()
    controller, _ = started(ODMStrategy(), NEW)
    controller.load_state_dict(saved)
    length = len(controller.history)
    assert controller.after_source_changes(0)
    assert len(controller.history) == length
    assert [dataclasses.asdict(entry) for entry in controller.history] == saved["history"]
