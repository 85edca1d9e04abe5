"""The cost benchmark measures what it says. What the figures are is not tested here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tools.bench import influence_cost
from tools.bench._influence_candidates import CANDIDATES, GOALS, Candidate, Case
from tools.bench._influence_libraries import ENGINES, LIBRARIES, OTHERS, datainf_loops, datainf_matrices
from tools.bench._influence_memory import MIB, PLAIN, peaks
from tools.bench._influence_setting import Setting

EVERYTHING = (*CANDIDATES, *ENGINES, *OTHERS)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting("toy", 4, 24)


@pytest.mark.parametrize("candidate", EVERYTHING, ids=lambda candidate: candidate.name)
def test_a_candidate_gives_finite_figures(setting: Setting, candidate: Candidate) -> None:
    if candidate.group == LIBRARIES:
        pytest.importorskip(candidate.name.split(":")[0])
    before = {name: parameter.detach().clone() for name, parameter in setting.parameters.items()}
    rows = influence_cost.measure(candidate, setting, 1)  # ends with an error where scores are not finite
    assert all(row.low == row.median == row.high > 0 for row in rows)
    for name, parameter in setting.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_scores_that_are_not_finite_end_it(setting: Setting) -> None:
    bad = Case(lambda: torch.tensor([1.0, torch.nan]), setting.plain)
    with pytest.raises(SystemExit, match="finite"):
        influence_cost.ratios(bad, 1)


@pytest.mark.parametrize("name", ["fused, K=8", "fused DataInf, K=8", "sources by microbatch, K=8", "EK-FAC upkeep"])
def test_what_scores_while_training_trains_the_same(
    setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _case(name, setting)
    emptied: list[dict[str, torch.Tensor]] = []

    def take() -> None:
        emptied.append({n: p.grad.clone() for n, p in setting.parameters.items() if p.grad is not None})
        for parameter in setting.parameters.values():
            parameter.grad = None

    monkeypatch.setattr(setting.model, "zero_grad", take)
    setting.plain()
    case.run()
    plain, scored = emptied
    assert plain.keys() == scored.keys() == setting.parameters.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(scored[key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_candidates_that_score_exactly_agree(setting: Setting) -> None:
    exact = _case("fused, K=8", setting).run()
    torch.testing.assert_close(_case("hook, K=8", setting).run(), exact, rtol=1e-4, atol=1e-5)
    mean_losses = _case("naive loop, K=8", setting).run()
    summed = mean_losses * (setting.tokens // setting.rows)
    torch.testing.assert_close(summed.double(), exact, rtol=1e-4, atol=1e-4)
    tangents = _case("JVP, K=1", setting).run()
    torch.testing.assert_close(tangents, _case("fused, K=1", setting).run(), rtol=1e-3, atol=1e-4)


def test_loops_and_matrices_of_datainf_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    train = {name: torch.randn(5, size, generator=generator) for name, size in (("a", 7), ("b", 30))}
    probes = {name: torch.randn(2, rows.shape[1], generator=generator) for name, rows in train.items()}
    lists = [[{n: r[i] for n, r in side.items()} for i in range(count)] for side, count in ((train, 5), (probes, 2))]
    torch.testing.assert_close(datainf_matrices(train, probes), datainf_loops(*lists), rtol=1e-4, atol=1e-4)


def test_kronfluence_scores_are_ours(setting: Setting) -> None:
    pytest.importorskip("kronfluence")
    ours = _case("dot, pairwise with queries", setting).run()
    theirs = _case("kronfluence: identity, pairwise with queries", setting).run()
    # It leaves out the embedding and the norms.
    assert torch.corrcoef(torch.stack([ours.t().flatten(), theirs.flatten().double()]))[0, 1] > 0.7


def test_the_command_prints_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def peaks_of(setting: Setting, names: Sequence[str]) -> dict[str, int]:
        return {name: 3 * MIB if name == PLAIN else 5 * MIB for name in names}

    monkeypatch.setattr(influence_cost, "TOKENS", {"toy": 512})
    monkeypatch.setattr(influence_cost, "peaks", peaks_of)
    file = tmp_path / "figures.json"
    options = ["--params", "toy", "--only", "fused, K=", "--quick", "--markdown", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["influence_cost.py", *options])
    influence_cost.main()
    printed = capsys.readouterr().out
    assert "| with the training step | toy, 4 x 128 |" in printed
    assert "(≤ 1.09)" in printed
    rows = json.loads(file.read_text())
    assert {"fused, K=1", "fused, K=32", f"{PLAIN}, MiB"} <= {row["name"] for row in rows}
    sizes = {row["name"]: row["median"] for row in rows if row["group"] == influence_cost.MEMORY}
    assert sizes == {f"{PLAIN}, MiB": 3, "fused, K=1": 5 / 3, "fused, K=8": 5 / 3}


def test_peaks_hold_activations_and_directions() -> None:
    setting = Setting("toy", 4, 128)
    found = peaks(setting, [PLAIN, "fused, K=32"])
    logits = 4 * 128 * 256 * 4
    parameters = 4 * sum(parameter.numel() for parameter in setting.parameters.values())
    assert 2 * logits + parameters < found[PLAIN] < 30 * logits
    assert found["fused, K=32"] > found[PLAIN] + 31 * parameters


def test_goals_and_memory_are_of_rows_that_there_are(setting: Setting) -> None:
    rows = {c.name + view for c in CANDIDATES for view in c.make(setting).views}
    assert GOALS.keys() <= rows
    assert set(influence_cost.MEASURED_MEMORY) <= {candidate.name for candidate in CANDIDATES}


def test_help_gives_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["influence_cost.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        influence_cost.main()
    assert "python tools/bench/influence_cost.py" in capsys.readouterr().out


def _case(name: str, setting: Setting) -> Case:
    return next(candidate for candidate in EVERYTHING if candidate.name == name).make(setting)
