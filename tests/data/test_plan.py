"""The plan is arithmetic: exact shares, every sample once a pass, the same batches after any change of state."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cheapertraining.data.plan import Exhausted, MixturePlan, integer_weights
from cheapertraining.errors import UserError

SHARDS = {"a": [10, 7, 3], "b": [5, 5, 5, 5], "c": [13]}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def make(**changes: object) -> MixturePlan:
    settings: dict[str, object] = {"global_batch_size": 8, "seed": 3, "shuffle_block_size": 10} | changes
    return MixturePlan(SHARDS, WEIGHTS, **settings)  # type: ignore[arg-type]


def batches(plan: MixturePlan, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    planned = [plan.plan(batch) for batch in range(start, stop)]
    return [(batch.source.tolist(), batch.sample.tolist()) for batch in planned]


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(lambda values: sum(values) > 0),
    size=st.integers(1, 64),
    first=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_floor_or_ceiling_of_the_exact_share(weights: list[float], size: int, first: int) -> None:
    names = [str(i) for i in range(len(weights))]
    plan = MixturePlan(
        {n: [100] for n in names}, dict(zip(names, weights, strict=True)), global_batch_size=size, seed=1
    )
    integers = integer_weights(dict(zip(names, weights, strict=True)), names)
    assert integers.sum() == 2**32
    for batch in range(first, first + 5):
        counts = np.bincount(plan.plan(batch).source, minlength=len(names))
        assert counts.sum() == size
        for count, weight in zip(counts.tolist(), integers.tolist(), strict=True):
            share = Fraction(weight, 2**32) * size
            assert share // 1 <= count <= -(-share // 1)


def test_long_run_shares_are_exact() -> None:
    plan = MixturePlan(SHARDS, {"a": 0.1, "b": 0.33, "c": 0.57}, global_batch_size=7, seed=5)
    drawn = plan.counts_before(10_000)
    assert np.abs(drawn - np.array([0.1, 0.33, 0.57]) * 70_000).max() < 4


def test_counts_before_equal_the_batches_counted_one_by_one() -> None:
    plan, counted = make(), np.zeros(3, np.int64)
    for batch in range(50):
        assert (plan.counts_before(batch) == counted).all()
        counted += np.bincount(plan.plan(batch).source, minlength=3)
    assert (make().counts_before(50) == counted).all()


def test_each_sample_comes_once_a_pass() -> None:
    plan = make()
    samples: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for source, sample in batches(plan, 0, 200):
        for k, index in zip(source, sample, strict=True):
            samples[k].append(index)
    for k, size in enumerate(plan.sizes.tolist()):
        times = np.bincount(samples[k], minlength=size)
        assert times.max() - times.min() <= 1  # never again before all others came
        order = plan.order(k).take(0, 3 * size)
        for pass_number in range(3):
            assert sorted(order[pass_number * size : (pass_number + 1) * size].tolist()) == list(range(size))
        assert order[:size].tolist() != order[size : 2 * size].tolist()


def test_order_of_a_source_does_not_depend_on_the_other_sources() -> None:
    alone = MixturePlan({"b": SHARDS["b"]}, {"b": 1}, global_batch_size=8, seed=3, shuffle_block_size=10)
    assert alone.order(0).take(0, 60).tolist() == make().order(1).take(0, 60).tolist()


@pytest.mark.parametrize("batch", [0, 1, 17, 23, 24, 25, 59])
def test_state_continues_bit_for_bit_at_every_batch(batch: int) -> None:
    plan = make()
    plan.set_weights(24, {"a": 5, "c": 1})
    plan.set_weights(40, {"b": 1})
    reference = batches(plan, 0, 80)
    state = json.loads(json.dumps(plan.state_dict(batch)))
    resumed = make()
    resumed.load_state_dict(state)
    assert batches(resumed, batch, 80) == reference[batch:]
    assert resumed.newest_weights() == plan.newest_weights()


def test_batches_before_a_change_stay_and_later_ones_follow_it() -> None:
    unchanged, changed = make(), make()
    changed.set_weights(10, {"c": 1})
    assert batches(changed, 0, 10) == batches(unchanged, 0, 10)
    assert all(set(source) == {2} for source, _ in batches(changed, 10, 20))


def test_change_is_the_same_whether_planned_ahead_or_not() -> None:
    one, other = make(), make()
    other.weights_at(100)
    other.counts_before(90)
    for plan in (one, other):
        plan.set_weights(30, {"a": 1, "b": 1})
    assert batches(one, 0, 60) == batches(other, 0, 60)


def test_planned_batches_cannot_be_changed() -> None:
    plan = make()
    plan.plan(5)
    with pytest.raises(UserError, match=r"batch 5 is too early; batches before 6"):
        plan.set_weights(5, {"a": 1})
    plan.release(3)
    plan.set_weights(5, {"a": 1})


@pytest.mark.parametrize("batch", range(7))
def test_renormalize_uses_every_sample_once(batch: int) -> None:
    plan = make(on_exhaustion="renormalize", global_batch_size=4)
    plan.load_state_dict(
        json.loads(json.dumps(make(on_exhaustion="renormalize", global_batch_size=4).state_dict(batch)))
    )
    with pytest.raises(Exhausted, match="used up"):
        batches(plan, batch, 100)
    reference = make(on_exhaustion="renormalize", global_batch_size=4)
    total = 53 // 4
    seen = [pair for sources, samples in batches(reference, 0, total) for pair in zip(sources, samples, strict=True)]
    assert len(seen) == len(set(seen)) == 52  # 53 samples, batches of 4
    assert batches(plan, batch, total) == batches(make(on_exhaustion="renormalize", global_batch_size=4), batch, total)


def test_stop_ends_when_a_source_has_been_passed_through() -> None:
    plan = make(on_exhaustion="stop", global_batch_size=4)
    with pytest.raises(Exhausted, match="used up: b"):
        batches(plan, 0, 100)
    assert plan.counts_before(8).tolist()[1] <= 20


def test_max_epochs_is_never_exceeded() -> None:
    plan = make(max_epochs={"b": 1.5})
    drawn = plan.counts_before(200)
    assert drawn[1] == 30
    assert drawn.sum() == 1600
    assert plan.weights_at(199)["b"] == 0
    plan.set_weights(300, {"b": 1, "c": 1})
    assert plan.weights_at(300) == {"a": 0, "b": 0, "c": 1}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0}, "weight of source 'a': expected a finite number that is not negative, found -1.0"),
        ({"a": float("nan")}, "found nan"),
        ({"aa": 1.0}, "no source is named 'aa'.*Did you mean 'a'"),
        ({"a": 0.0}, "all are zero"),
    ],
)
def test_bad_weights(weights: dict[str, float], message: str) -> None:
    plan = make()
    with pytest.raises(UserError, match=message):
        plan.set_weights(0, weights)
    assert plan.newest_weights() == make().newest_weights()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_exhaustion": "cicle"}, "Did you mean 'cycle'"),
        ({"max_epochs": {"d": 1}}, "no source is named 'd'"),
        ({"max_epochs": {"a": 0}}, "expected a positive number, found 0"),
        ({"global_batch_size": 0}, "global_batch_size"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_empty_source() -> None:
    with pytest.raises(UserError, match="source 'a': it has no samples"):
        MixturePlan({"a": []}, {"a": 1}, global_batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            MixturePlan({"x": [3]}, {"x": 1}, global_batch_size=8, seed=3),
            "the checkpoint has the sources a, b, c; the run has x",
        ),
        (make(seed=4), "seed was 3 when the checkpoint was saved and is 4 now"),
        (make(global_batch_size=16), "global_batch_size was 8"),
    ],
)
def test_state_of_another_plan_is_refused(other: MixturePlan, message: str) -> None:
    with pytest.raises(UserError, match=message):
        other.load_state_dict(make().state_dict(3))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 60), min_size=2, max_size=4),
    caps=st.lists(st.sampled_from([None, 0.5, 1.0, 1.25, 2.0]), min_size=4, max_size=4),
    batch_size=st.integers(1, 12),
    resumed=st.integers(1, 30),
    policy=st.sampled_from(["cycle", "stop", "renormalize"]),
)
def test_a_plan_resumed_anywhere_near_its_caps_goes_on_the_same(
    sizes: list[int], caps: list[float | None], batch_size: int, resumed: int, policy: str
) -> None:
    """Also right behind a batch that uses a source up to its last sample."""
    names = [f"s{i}" for i in range(len(sizes))]

    def make() -> MixturePlan:
        shards = {name: [size] for name, size in zip(names, sizes, strict=True)}
        max_epochs = dict(zip(names, caps[: len(names)], strict=True))
        weights = {name: 1.0 + i for i, name in enumerate(names)}
        return MixturePlan(
            shards, weights, global_batch_size=batch_size, seed=3, on_exhaustion=policy, max_epochs=max_epochs
        )

    def batches(plan: MixturePlan, first: int) -> list[list[tuple[int, int]]]:
        found = []
        for batch in range(first, 45):
            try:
                planned = plan.plan(batch)
            except Exhausted:
                break
            found.append(list(zip(planned.source.tolist(), planned.sample.tolist(), strict=True)))
        return found

    whole = batches(make(), 0)
    stopped = make()
    resumed = min(resumed, len(whole))
    for batch in range(resumed):
        stopped.plan(batch)
    again = make()
    again.load_state_dict(json.loads(json.dumps(stopped.state_dict(resumed))))
    assert batches(again, resumed) == whole[resumed:]


def test_only_sources_that_are_used_up_are_named_at_the_end() -> None:
    plan = MixturePlan(
        {"long": [1000], "short": [20], "unused": [2]},
        {"long": 1, "short": 1, "unused": 0},
        global_batch_size=8,
        seed=0,
        on_exhaustion="stop",
    )
    with pytest.raises(Exhausted, match=r"used up: short\. "):
        plan.plan(99)
