"""The agreement benchmark: its estimators against dense versions, its metrics against others', and who comes first."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics  # type: ignore[import-untyped]
import torch

from tools.bench import _agreement_dense as dense
from tools.bench import _agreement_retrain as retraining
from tools.bench import influence_agreement
from tools.bench._agreement_lora import kind_areas
from tools.bench._agreement_metrics import area_under_curve, mean_and_error, spearman
from tools.bench._agreement_product import Scores, estimates, gauss_newton, source_scalars
from tools.bench._agreement_retrain import Trained, load, mixtures, query_losses, subsets, train, train_stack
from tools.bench._agreement_tasks import Task, digits, flipped_digits, language, rows


def short(task: Task, steps: int) -> Task:
    return dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, steps=steps))


Scored = tuple[Trained, Scores]


@pytest.fixture(scope="module")
def digits_scored() -> Scored:
    run = train(digits(0, queries=40))
    return run, estimates(run)


@pytest.fixture(scope="module")
def language_scored() -> Scored:
    run = train(short(language(0, train=16, queries=4), steps=10))
    return run, estimates(run)


@pytest.mark.parametrize("which", ["digits_scored", "language_scored"])
def test_the_package_gives_the_scores_of_dense_gradients(which: str, request: pytest.FixtureRequest) -> None:
    run, scores = request.getfixturevalue(which)
    references = dense.references(run.model, run.task.train, run.task.query)
    assert len(references) == 9
    for name, reference in references.items():
        torch.testing.assert_close(scores[name], reference, rtol=1e-7, atol=1e-9 * float(reference.abs().max()))


def test_conjugate_gradients_solve_the_dense_gauss_newton_matrix(digits_scored: Scored) -> None:
    run = digits_scored[0]
    few = dataclasses.replace(run, task=dataclasses.replace(run.task, query=rows(run.task.query, slice(3))))
    found = gauss_newton(few, tolerance=1e-7)["ggn_cg"]
    wanted = influence_agreement.exact(few)["GGN, exact"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_ekfac_foretells_retraining_far_better_than_a_dot_product(digits_scored: Scored) -> None:
    task = digits(0, queries=40)
    found = influence_agreement.agreement(digits_scored[1], load(task, subsets(task, 16), None))
    mean = {name: float(values.mean()) for name, values in found.items()}
    assert mean["ekfac"] > mean["dot"] + 0.2
    assert mean["ekfac, during training"] > mean["dot"] + 0.2
    assert mean["datainf"] - mean["dot"] == pytest.approx(0.02, abs=0.05)
    assert mean["dot"] > mean["earlier formula"] + 0.15


def test_self_influence_and_ekfac_find_wrong_labels() -> None:
    areas = influence_agreement.mislabelled_seed(0)
    assert areas["self"] > 0.97
    assert areas["ekfac"] > 0.92
    assert areas["dot"] < 0.9


def test_the_one_model_is_the_stacked_model_with_even_weights() -> None:
    task = short(digits(1), steps=30)
    even = torch.full((2, len(task.source)), 1 / len(task.source))
    run = train(task)
    wanted = {name: p.detach().float() for name, p in run.model.named_parameters()}
    for name, values in train_stack(task, even).items():
        torch.testing.assert_close(values[1], wanted[name], rtol=1e-3, atol=1e-4)


def test_a_subset_is_trained_as_if_there_were_no_other_samples() -> None:
    task = short(digits(2, train=40, queries=5), steps=20)
    weights = subsets(task, 3)
    kept = weights[1] > 0
    assert int(kept.sum()) == 20
    alone = dataclasses.replace(task, train={name: values[kept] for name, values in task.train.items()})
    one = query_losses(task, train_stack(alone, torch.full((1, 20), 1 / 20)))
    torch.testing.assert_close(query_losses(task, train_stack(task, weights))[1:2], one, rtol=1e-4, atol=1e-5)


def test_source_scalars_are_means_of_the_samples_scores(language_scored: Scored) -> None:
    language_run, scores = language_scored
    dot, end = scores["dot"], source_scalars(language_run)["source scalars (end)"]
    counted = language_run.task.train["labels"][:, 1:].ge(0).sum(1)
    for source in range(4):
        of_source = language_run.task.source == source
        mean = dot[of_source].sum(0) / counted[of_source].sum()
        torch.testing.assert_close(end[of_source], mean.expand(4, -1))
    assert mixtures(language_run.task, 5).sum(1).tolist() == pytest.approx([1.0] * 5)


def test_retrained_models_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = short(digits(0, train=20, queries=4), steps=2)
    first = load(task, subsets(task, 2), tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(retraining, "retrain", never)
    torch.testing.assert_close(load(task, subsets(task, 2), tmp_path).losses, first.losses)
    with pytest.raises(AssertionError, match="trained again"):
        load(short(task, steps=3), subsets(task, 2), tmp_path)


def test_metrics_are_those_of_others() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.3
    assert area_under_curve(scores, positive) == pytest.approx(sklearn.metrics.roc_auc_score(positive, scores))
    ranks = np.array([[1.0, 5.0], [2.0, 4.0], [30.0, 3.0]])
    assert spearman(ranks, ranks**3 * np.array([1.0, -1.0])).tolist() == pytest.approx([1.0, -1.0])
    values = rng.normal(size=400)
    assert mean_and_error([values]) == pytest.approx((values.mean(), values.std() / 20), rel=0.1)
    assert mean_and_error([np.array([2.0])]) == (2.0, None)
    assert mean_and_error([np.array([1.0]), np.array([2.0]), np.array([3.0])]) == pytest.approx((2.0, 1 / 3**0.5))


def test_command_prints_the_table_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = influence_agreement
    monkeypatch.setattr(module, "digits", lambda seed: short(digits(seed, 30, 5), 10))
    monkeypatch.setattr(module, "language", lambda seed: short(language(seed, 8, 4), 4))
    flipped, wrong = flipped_digits(0, 40, 5)
    monkeypatch.setattr(module, "flipped_digits", lambda seed: (short(flipped, 10), wrong))
    monkeypatch.setattr(module, "kind_areas", lambda seed: kind_areas(seed, 4, 1, pretraining=3, steps=3))
    monkeypatch.setattr(module, "QUICK", module.Size(seeds=1, digits=4, language=3, mixtures=3, slow=False))
    monkeypatch.setattr(sys, "argv", ["influence_agreement.py", "--quick", "--json", str(tmp_path / "table.json")])
    module.main()
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    printed = capsys.readouterr().out
    assert set(table["ekfac"]) == set(module.COLUMNS)
    assert f"{table['ekfac']['LM LDS'][0]:.3f}" in printed
    assert float(printed.split()[-1]) < 1e-9
