"""Mixtures from tables of runs: planted laws come back, optima are optima, limits hold, bad tables are named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.mixing.constraints import kl_divergence
from cheapertraining.mixing.offline import (
    LogLinearLaw,
    RunTable,
    best_simulated,
    bootstrap,
    cross_validate,
    fit_boosted_trees,
    fit_law,
    mixture_bounds,
    optimal_mixture,
    pearson,
    read_table,
    read_two_tables,
    sample_mixtures,
    spearman,
)
from cheapertraining.mixing.offline.collected import collect_runs
from cheapertraining.mixing.offline.table import write_table

Array = NDArray[np.float64]
REGMIX = Path(__file__).parents[3] / "shared" / "regmix_tables"
PILE_CC = "the_pile_pile_cc_val_loss"


def unbounded(count: int) -> tuple[Array, Array]:
    return np.zeros(count), np.ones(count)


def planted(sources: int, runs: int, seed: int, noise: float = 0.0) -> tuple[LogLinearLaw, Array, Array]:
    """A law with a floor of about 2 nats and effects of a nat or so, mixtures, and their losses."""
    rng = np.random.default_rng(seed)
    law = LogLinearLaw(2 + rng.random(), rng.normal(0.5, 1.0, sources))
    weights = rng.dirichlet(np.full(sources, 0.7), runs)
    return law, weights, law.predict(weights) + noise * rng.standard_normal(runs)


def table_of(weights: Array, *losses: Array) -> RunTable:
    return RunTable(
        tuple(f"s{k}" for k in range(weights.shape[1])),
        tuple(f"t{m}" for m in range(len(losses))),
        weights,
        np.stack(losses, axis=1),
        tuple(str(n) for n in range(len(weights))),
    )


# ---- the law -------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000), st.floats(0.1, 20.0))
def test_a_planted_law_comes_back_in_any_unit(sources: int, seed: int, unit: float) -> None:
    law, weights, losses = planted(sources, 6 * sources, seed)
    found = fit_law(weights, losses * unit)
    np.testing.assert_allclose(found.predict(weights), losses * unit, atol=1e-4 * unit)
    spread = np.ptp(law.predict(weights))
    if spread > 0.5:  # else the data hardly tell the floor from the height
        np.testing.assert_allclose(found.exponents - np.log(unit), law.exponents, atol=0.05)
        assert found.floor == pytest.approx(law.floor * unit, abs=0.05 * unit)


def test_noise_costs_little() -> None:
    law, weights, losses = planted(6, 60, seed=3, noise=0.02)
    found = fit_law(weights, losses)
    fresh = np.random.default_rng(9).dirichlet(np.ones(6), 500)
    assert np.sqrt(np.mean((found.predict(fresh) - law.predict(fresh)) ** 2)) < 0.02
    assert spearman(found.predict(fresh), law.predict(fresh)) > 0.99


def test_diverged_runs_do_not_bend_the_law() -> None:
    law, weights, losses = planted(6, 60, seed=3, noise=0.01)
    broken = losses.copy()
    broken[[5, 20, 41]] += 3.0
    fresh = np.random.default_rng(9).dirichlet(np.ones(6), 500)
    error = np.sqrt(np.mean((fit_law(weights, broken).predict(fresh) - law.predict(fresh)) ** 2))
    least_squares = np.linalg.lstsq(weights, broken, rcond=None)[0]
    assert error < 0.02 < 0.2 < np.sqrt(np.mean((fresh @ least_squares - law.predict(fresh)) ** 2))


def test_the_fit_is_the_minimum_that_scipy_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    _, weights, losses = planted(5, 30, seed=1, noise=0.05)
    found = fit_law(weights, losses)

    def residuals(parameters: Array) -> Array:
        return parameters[0] + np.exp(weights @ parameters[1:]) - losses

    scale = 1.4826 * np.median(np.abs(found.predict(weights) - losses)) * math.sqrt(30 / 24)
    theirs = optimize.least_squares(
        residuals, np.concatenate([[found.floor], found.exponents]), loss="huber", f_scale=1.345 * scale, xtol=1e-12
    )
    np.testing.assert_allclose(found.predict(weights), theirs.x[0] + np.exp(weights @ theirs.x[1:]), atol=0.01)


def test_gradient_order_and_repetition() -> None:
    law, weights, losses = planted(4, 30, seed=2, noise=0.05)
    w, step = weights[0], 1e-6
    slope = [(law.predict(w + step * e) - law.predict(w - step * e)) / (2 * step) for e in np.eye(4)]
    np.testing.assert_allclose(law.gradient(w), slope, rtol=1e-6)
    first = fit_law(weights, losses)
    assert fit_law(weights, losses).exponents.tobytes() == first.exponents.tobytes()
    order = np.random.default_rng(0).permutation(4)
    np.testing.assert_allclose(fit_law(weights[:, order], losses).exponents, first.exponents[order], atol=1e-4)
    twice = fit_law(np.concatenate([weights, weights[:5]]), np.concatenate([losses, losses[:5]]))
    counted = fit_law(weights, losses, run_weights=np.where(np.arange(30) < 5, 2.0, 1.0))
    np.testing.assert_allclose(twice.predict(weights), counted.predict(weights), atol=0.01)


def test_equal_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="all equal"):
        fit_law(np.eye(3), np.ones(3))


# ---- the optimum ---------------------------------------------------------------------------------------------
@st.composite
def problems(draw: st.DrawFn) -> tuple[list[LogLinearLaw], Array, Array, Array, float]:
    """Laws, prior, bounds and the price of the divergence."""
    count, seed = draw(st.integers(2, 6)), draw(st.integers(0, 100_000))
    rng = np.random.default_rng(seed)
    laws = [LogLinearLaw(rng.random(), rng.normal(0, 1.5, count)) for _ in range(draw(st.integers(1, 3)))]
    inside = rng.dirichlet(np.ones(count))
    lower, upper = inside * rng.random(count) * 0.8, inside + (1 - inside) * rng.random(count)
    return (
        laws,
        rng.dirichlet(np.ones(count)) * 0.9 + 0.1 / count,
        lower,
        upper,
        draw(st.sampled_from([0.0, 0.01, 0.3])),
    )


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_allowed_mixture_is_better(problem: tuple[list[LogLinearLaw], Array, Array, Array, float]) -> None:
    laws, prior, lower, upper, kl = problem

    def objective(w: Array) -> float:
        return float(np.mean([law.predict(w) for law in laws])) + (kl * kl_divergence(w, prior) if kl else 0.0)

    best = optimal_mixture(laws, prior, lower, upper, kl=kl)
    w = best.weights
    assert abs(math.fsum(w) - 1) < 1e-9
    assert np.all(w >= lower - 1e-9)
    assert np.all(w <= upper + 1e-9)
    assert best.gap <= 1e-6
    assert best.loss == pytest.approx(np.mean([law.predict(w) for law in laws]))
    rng = np.random.default_rng(0)
    far = np.clip(rng.dirichlet(np.ones(len(w)), 200), lower, upper)
    near = np.clip(w + 0.01 * rng.standard_normal((200, len(w))), lower, upper)
    for other in np.concatenate([far, near]):
        missing = 1 - other.sum()  # shared out by the room that each weight has
        room = upper - other if missing > 0 else other - lower
        allowed = other + missing * room / max(room.sum(), 1e-12)
        assert objective(w) <= objective(allowed) + 1e-6


def test_against_a_grid_on_three_sources() -> None:
    laws = [LogLinearLaw(2.0, np.array([0.5, -1.0, 0.9])), LogLinearLaw(1.0, np.array([-0.7, 1.2, 0.3]))]
    prior, v = np.array([0.2, 0.3, 0.5]), np.array([2.0, 1.0])
    lower, upper = np.array([0.05, 0.0, 0.1]), np.array([1.0, 0.45, 1.0])
    steps = np.linspace(0, 1, 401)
    grid = np.array([[a, b, 1 - a - b] for a in steps for b in steps if a + b <= 1])
    grid = grid[np.all((grid >= lower) & (grid <= upper), axis=1)]
    for kl in (0.0, 0.05, 0.5):
        values = (2 * laws[0].predict(grid) + laws[1].predict(grid)) / 3
        values += kl * np.array([kl_divergence(w, prior) for w in grid]) if kl else 0.0
        best = optimal_mixture(laws, prior, lower, upper, kl=kl, target_weights=v)
        ours = best.loss + (kl * kl_divergence(best.weights, prior) if kl else 0.0)
        assert ours <= values.min() + 1e-9
        np.testing.assert_allclose(best.weights, grid[values.argmin()], atol=0.006)


def test_against_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(5)
    laws = [LogLinearLaw(1.0, rng.normal(0, 1, 8)) for _ in range(4)]
    prior = rng.dirichlet(np.ones(8))

    def objective(w: Array) -> float:
        w = np.maximum(w, 1e-12)
        return float(np.mean([law.predict(w) for law in laws]) + 0.05 * np.sum(w * np.log(w / prior)))

    theirs = optimize.minimize(
        objective, prior, bounds=[(0.02, 0.4)] * 8, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP", options={"ftol": 1e-12, "maxiter": 1000},
    )  # fmt: skip
    best = optimal_mixture(laws, prior, np.full(8, 0.02), np.full(8, 0.4), kl=0.05)
    assert objective(best.weights) <= theirs.fun + 1e-7
    np.testing.assert_allclose(best.weights, theirs.x, atol=1e-3)


def test_a_dear_divergence_keeps_the_prior_and_a_free_one_takes_the_best_source() -> None:
    law, prior = LogLinearLaw(1.0, np.array([0.3, -0.4, 0.1])), np.array([0.5, 0.2, 0.3])
    np.testing.assert_allclose(optimal_mixture([law], prior, *unbounded(3), kl=1e4).weights, prior, atol=1e-3)
    assert optimal_mixture([law], prior, *unbounded(3), kl=0.0).weights == pytest.approx([0, 1, 0], abs=1e-6)
    none = np.array([0.5, 0.0, 0.5])
    assert optimal_mixture([law], none, *unbounded(3), kl=0.01).weights[1] == 0
    with pytest.raises(UserError, match=r"prior: .* 0 get none"):
        optimal_mixture([law], none, np.array([0.0, 0.1, 0.0]), np.ones(3), kl=0.01)


def test_a_capped_source_does_not_hide_the_order_of_the_others() -> None:
    law = LogLinearLaw(2.0, np.array([0.6, -0.8, 0.4]))
    best = optimal_mixture([law], np.ones(3) / 3, np.zeros(3), np.array([1, 0.4, 1]), kl=0.0)
    assert best.weights == pytest.approx([0, 0.4, 0.6], abs=1e-6)


def test_caps_come_from_sizes() -> None:
    lower, upper = mixture_bounds(
        ["a", "b", "c"], floor=0.05, available={"a": 10, "b": 1}, max_epochs=4, tokens=100
    )  # fmt: skip
    assert upper.tolist() == [0.4, 0.04, 1.0]
    assert lower.tolist() == [0.05, 0.04, 0.05]
    law = LogLinearLaw(1.0, np.array([-3.0, -2.0, 0.0]))
    best = optimal_mixture([law], np.ones(3) / 3, lower, upper, kl=0.0)
    np.testing.assert_allclose(best.weights, [0.4, 0.04, 0.56], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 0.6}, r"floor: 2 sources of at least 0.6 sum to 1.2"),
        ({"ceiling": 0.3}, r"may give 60.0% of the mixture"),
        ({"floor": 0.5, "ceiling": 0.1}, r"0 <= floor <= ceiling <= 1"),
        ({"available": {"c": 1}}, r"no source is named 'c'"),
        ({"available": {"a": 1, "b": 1}, "max_epochs": 4, "tokens": 100}, r"may give 8.0% .* fewer tokens"),
        ({"max_epochs": 0}, r"max_epochs: expected a positive number"),
        ({"available": {"a": math.nan}}, r"expected tokens of 'a'"),
    ],
)
def test_bad_limits(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture_bounds(["a", "b"], **options)  # type: ignore[arg-type]


# ---- drawing mixtures ----------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(0, 1000), st.floats(0.0, 0.9), st.floats(0.5, 4.0))
def test_drawn_mixtures_are_allowed_and_repeatable(count: int, seed: int, share: float, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.ones(count))
    lower, upper = np.full(count, share / count), np.full(count, 0.95)
    try:
        drawn = sample_mixtures(prior, 20, lower=lower, upper=upper, seed=seed, temperature=temperature)
    except UserError:  # a prior that is nearly all one source
        reject()
    assert drawn.shape == (20, count)
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-9)
    assert np.all(drawn >= lower - 1e-12)
    assert np.all(drawn <= upper)
    again = sample_mixtures(prior, 10, lower=lower, upper=upper, seed=seed, temperature=temperature)
    assert again.tobytes() == drawn[:10].tobytes()


def test_draws_are_around_the_tempered_prior() -> None:
    prior = np.array([0.81, 0.09, 0.1, 0.0])
    for temperature, center in ((1.0, prior), (2.0, np.sqrt(prior) / np.sqrt(prior).sum())):
        drawn = sample_mixtures(prior, 4000, lower=np.zeros(4), upper=np.ones(4), seed=1, temperature=temperature)
        np.testing.assert_allclose(drawn.mean(axis=0), center, atol=0.02)


def test_hopeless_caps_are_said() -> None:
    with pytest.raises(UserError, match=r"only \d+ of \d+ mixtures drawn around the prior respect the caps"):
        sample_mixtures(
            np.array([0.98, 0.01, 0.01]), 4, lower=np.zeros(3), upper=np.array([0.02, 1, 1]), seed=0,
            concentration=(500, 500),
        )  # fmt: skip


# ---- fidelity ------------------------------------------------------------------------------------------------
def test_correlations_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40).astype(float), rng.standard_normal(40)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_cross_validation_tells_a_law_from_noise() -> None:
    _, weights, losses = planted(5, 40, seed=4, noise=0.02)
    noise = np.random.default_rng(1).standard_normal(40)
    checked = cross_validate(table_of(weights, losses, noise), fit_law)
    assert checked.spearman[0] > 0.95
    assert abs(checked.spearman[1]) < 0.5
    assert checked.rmse[0] < 0.05
    assert cross_validate(table_of(weights, losses), fit_law).predicted.shape == (40, 1)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    fresh = np.random.default_rng(7).dirichlet(np.ones(4), 5)
    truth_held, run_held = [], []
    for seed in range(30):
        law, weights, losses = planted(4, 40, seed=100 + seed, noise=0.05)
        table = table_of(weights, losses)
        draws = bootstrap(table, [fit_law(weights, losses)], draws=60, seed=seed)
        residuals = table.losses - cross_validate(table, fit_law, folds=5).predicted
        for w, noise in zip(fresh, np.random.default_rng(5000 + seed).standard_normal(5), strict=True):
            low, high = np.quantile(draws.losses(w), [0.05, 0.95])
            truth_held.append(low <= law.predict(w) <= high)
            low, high = np.quantile(draws.prediction(w, residuals, seed=900 + seed), [0.05, 0.95])
            run_held.append(low <= law.predict(w) + 0.05 * noise <= high)
    assert 0.75 < np.mean(truth_held) < 0.97
    assert 0.82 < np.mean(run_held) < 0.98


def test_the_bootstrap_follows_the_noise() -> None:
    widths = []
    for noise in (0.005, 0.1):
        _, weights, losses = planted(4, 40, seed=8, noise=noise)
        table, prior = table_of(weights, losses), np.full(4, 0.25)
        within = (prior, *unbounded(4), 0.1)
        laws = [fit_law(weights, losses)]
        draws = bootstrap(table, laws, draws=40, within=within)
        np.testing.assert_allclose(draws.optima.sum(axis=1), 1, atol=1e-9)
        assert draws.optima.tobytes() == bootstrap(table, laws, draws=40, within=within).optima.tobytes()
        widths.append(draws.optima.std(axis=0).max())
    assert widths[0] < widths[1]


# ---- boosted trees -------------------------------------------------------------------------------------------
def test_boosted_trees_find_the_good_corner() -> None:
    pytest.importorskip("sklearn")
    law, weights, losses = planted(3, 120, seed=6, noise=0.01)
    simulated = sample_mixtures(np.ones(3) / 3, 2000, lower=np.zeros(3), upper=np.full(3, 0.8), seed=0)
    mean, chosen = best_simulated([fit_boosted_trees(weights, losses)], simulated, best=50)
    assert chosen.shape == (50, 3)
    assert mean.max() <= 0.8
    assert mean.sum() == pytest.approx(1)
    assert spearman(law.predict(simulated), np.linalg.norm(simulated - mean, axis=1)) > 0
    assert law.predict(mean) < np.quantile(law.predict(simulated), 0.1)


def test_without_scikit_learn_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match="needs scikit-learn, which is not installed"):
        fit_boosted_trees(np.eye(3), np.arange(3.0))


# ---- tables --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_tables_read_back(tmp_path: Path, suffix: str) -> None:
    _, weights, losses = planted(3, 8, seed=0)
    table = replace(table_of(weights, losses, losses**2), sources=("co,de", "wiki", 'x"y'), targets=("probe/a", "b"))
    write_table(table, tmp_path / f"t.{suffix}")
    found = read_table(tmp_path / f"t.{suffix}")
    assert (found.sources, found.targets, found.runs) == (table.sources, table.targets, table.runs)
    np.testing.assert_allclose(found.weights, table.weights, rtol=1e-12)
    assert found.losses.tobytes() == table.losses.tobytes()
    assert found.of_targets(["b"]).losses.tolist() == table.losses[:, 1:].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight/a,weight/b,loss/t\n0.5,0.6,1", r"run 1: expected weights that sum to 1, found 1.1"),
        ("weight/a,weight/b,loss/t\n0.5,0.5,nan", r"run 1, column 'loss/t': expected a finite number, found 'nan'"),
        ("weight/a,weight/b,loss/t\n0.5,0.5,", r"column 'loss/t': expected a finite number, found nothing"),
        ("weight/a,weight/b,loss/t\n0.5,0.5,1\n0.5,x,1", r"run 2, column 'weight/b': .* found 'x'"),
        ("weight/a,weight/b,loss/t\n1.5,-0.5,1", r"column 'weight/b': expected a weight of at least 0, found -0.5"),
        ("weight/a,weight/b,loss/t\n0.5,0.5", r"line 2: expected 3 cells, found 2"),
        ("weight/a,weight/b\n0.5,0.5", r"expected a column 'loss/<target>' for each target, found weight/a, weight/b"),
        ("a,b,loss/t\n0.5,0.5,1", r"expected a column 'weight/<source>'"),
        ("weight/a,weight/a,loss/t\n0.5,0.5,1", r"column 'weight/a' is there twice"),
        ("weight/a,loss/t", r"a line a run"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


def test_bad_json_lines_and_files_that_do_not_belong_together(tmp_path: Path) -> None:
    good = {"weight/a": 1.0, "loss/t": 2.0}
    for second, message in (
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        (json.dumps({"weight/a": 1.0}), r"line 2: 'loss/t' is not in all lines"),
    ):
        (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + second + "\n")
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / "t.jsonl")
    (tmp_path / "w.csv").write_text("index,train_a,train_b\n1,0.5,0.5\n2,0.1,0.9\n")
    (tmp_path / "l.csv").write_text("index,metric/t\n1,3\n3,4\n")
    with pytest.raises(UserError, match=r"l.csv, line 3: expected index 2, .* found 3"):
        read_two_tables(tmp_path / "w.csv", tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("index,metric/t\n1,3\n")
    with pytest.raises(UserError, match=r"expected a row for each of the 2 runs"):
        read_two_tables(tmp_path / "w.csv", tmp_path / "l.csv")
    with pytest.raises(UserError, match="not a readable CSV"):
        read_table(tmp_path / "absent.csv")


def test_tables_that_cannot_tell_sources_apart() -> None:
    _, weights, losses = planted(4, 12, seed=0)
    table = table_of(weights, losses)
    table.check_identified()
    with pytest.raises(UserError, match="4 runs cannot fix the 5 parameters"):
        table_of(weights[:4], losses[:4]).check_identified()
    without = np.concatenate([weights, np.zeros((12, 1))], axis=1)
    with pytest.raises(UserError, match="source 's4' has the weight 0 in every run"):
        table_of(without, losses).check_identified()
    with pytest.raises(UserError, match="target 't0' is 1 in every run"):
        table_of(weights, np.ones(12)).check_identified()
    with pytest.raises(UserError, match=r"target 't1': not in the table \(t0\)"):
        table.of_targets(["t1"])


# ---- finished runs -------------------------------------------------------------------------------------------
def finished_run(
    folder: Path, weights: dict[str, tuple[float, float]], losses: dict[str, float], batches: int = 10
) -> Path:
    folder.mkdir()
    summary = {
        "run_name": folder.name,
        "batches": batches,
        "sources": {name: {"weight_start": a, "weight_end": b} for name, (a, b) in weights.items()},
        "evaluations": {label: {"loss_after": loss} for label, loss in losses.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_are_collected(tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one", {"a": (0.25, 0.25), "b": (0.75, 0.75)}, {"probe/p": 2.0, "heldout/a": 9.0})
    two = finished_run(tmp_path / "two", {"a": (1.0, 0.0), "c": (0.0, 1.0)}, {"probe/p": 3.0, "heldout/a": 9.5})
    decisions = [
        {"batch": 1, "from_batch": None, "weights": {"a": 1.0, "c": 0.0}},
        {"batch": 2, "from_batch": 4, "weights": {"a": 0.5, "c": 0.5}},
        {"batch": 6, "from_batch": 8, "weights": {"a": 0.0, "c": 1.0}},
        {"batch": 9, "from_batch": 17, "weights": {"a": 1.0, "c": 0.0}},
    ]
    (two / "mixture.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in decisions))
    table = collect_runs([one, two])
    assert table.sources == ("a", "b", "c")
    assert table.targets == ("probe/p",)
    assert table.runs == ("one", "two")
    # Four batches of a alone, four of both, two of c alone.
    np.testing.assert_allclose(table.weights, [[0.25, 0.75, 0.0], [0.6, 0.0, 0.4]])
    assert table.losses.tolist() == [[2.0], [3.0]]
    assert collect_runs([one], "*").targets == ("probe/p", "heldout/a")


def test_runs_that_do_not_belong_together(tmp_path: Path) -> None:
    even = {"a": (0.5, 0.5), "b": (0.5, 0.5)}
    one = finished_run(tmp_path / "one", even, {"probe/p": 2.0})
    for name, run, message in (
        ("short", finished_run(tmp_path / "short", even, {"probe/p": 2.0}, 5), "has 5 batches, .* has 10"),
        ("other", finished_run(tmp_path / "other", even, {"probe/q": 2.0}), "evaluation 'probe/p' is not in all runs"),
        ("nan", finished_run(tmp_path / "nan", even, {"probe/p": math.nan}), "expected a finite loss of 'probe/p'"),
        (
            "moved",
            finished_run(tmp_path / "moved", {"a": (1, 0), "b": (0, 1)}, {"probe/p": 2.0}),
            "its weights changed",
        ),
        ("none", tmp_path / "none", "not the summary of a finished run"),
    ):
        with pytest.raises(UserError, match=message):
            collect_runs([one, run])
        assert name in run.name
    with pytest.raises(UserError, match=r"no evaluation is named 'heldout/\*' \(probe/p\)"):
        collect_runs([one], "heldout/*")


# ---- published runs ------------------------------------------------------------------------------------------
@pytest.mark.skipif(not REGMIX.is_dir(), reason="needs RegMix's tables beside the checkout")
def test_rank_correlation_on_published_runs() -> None:
    """From 64 runs of 1M parameters to other runs of 1M, 60M and 1B; the figures are those of the benchmark."""
    train = read_two_tables(REGMIX / "train_mixture_1m.csv", REGMIX / "train_pile_loss_1m.csv").of_targets([PILE_CC])
    assert train.weights.shape == (512, 17)
    assert train.sources[0] == "the_pile_arxiv"
    ranks: dict[str, list[list[float]]] = {"law": [], "trees": []}
    for seed in range(3):
        some = np.random.default_rng(seed).choice(512, 64, replace=False)
        weights, losses = train.weights[some], train.losses[some, 0]
        models = {"law": fit_law(weights, losses), "trees": fit_boosted_trees(weights, losses)}
        for name, model in models.items():
            row = []
            for size in ("1m", "60m", "1B"):
                test = read_two_tables(REGMIX / f"test_mixture_{size}.csv", REGMIX / f"test_pile_loss_{size}.csv")
                row.append(spearman(model.predict(test.weights), test.of_targets([PILE_CC]).losses[:, 0]))
            ranks[name].append(row)
    law, trees = np.mean(ranks["law"], axis=0), np.mean(ranks["trees"], axis=0)
    assert np.all(law > [0.92, 0.92, 0.97])
    assert np.all(trees > [0.90, 0.90, 0.80])
    assert law[2] > trees[2]  # where the size changes, the law ranks better
