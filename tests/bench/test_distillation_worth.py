"""The reckoning of the benchmark of distillation's worth: costs by hand, tokens to a loss, shares of the gap."""

from __future__ import annotations

import math

import pytest

from tools.bench._worth_pays import Plan, pays
from tools.bench.distillation_worth import main, table, tokens_to


def test_costs_by_hand() -> None:
    """100M student, 1B teacher, 10B tokens, a fifth saved: 6e18 alone; 4.8e18 and 1.6e19 with a teacher."""
    plan = Plan(1e8, 1e9, 1e10, 0.8)
    assert plan.alone == pytest.approx(6e18)
    assert plan.students_distilled == pytest.approx(4.8e18)
    assert plan.teaching == pytest.approx(1.6e19)
    assert plan.ratio == pytest.approx(20.8 / 6)
    assert plan.break_even == pytest.approx(16 / 1.2)
    assert pays(plan) == "does not pay: 3.47 times the operations; it would from 13.3 students on"
    assert pays(Plan(1e8, 1e9, 1e10, 0.8, students=20)) == "pays: 7% fewer operations"


def test_a_live_teacher_is_paid_by_each_student() -> None:
    assert Plan(1e8, 1e9, 1e10, 0.8, cached=False, students=20).break_even == math.inf
    assert "with any number of students" in pays(Plan(1e8, 1e9, 1e10, 0.8, cached=False))
    small = Plan(1e8, 5e7, 1e10, 0.8, cached=False, teacher_tokens=1e9)
    assert small.break_even == pytest.approx(6 * 5e7 * 1e9 / (6e8 * 1e10 * 0.2 - 2 * 5e7 * 1e10 * 0.8))


def test_at_break_even_both_cost_the_same() -> None:
    plan = Plan(3e8, 2e9, 5e9, 0.7, step=1.05, teacher_tokens=1e9)
    students = plan.break_even
    cost = plan.students_distilled * students + plan.teaching + plan.training
    assert cost == pytest.approx(plan.alone * students)


def test_tokens_to_a_loss() -> None:
    course = [(100, 3.0), (200, 2.0), (300, 1.5)]
    assert tokens_to(course, 2.5) == 150
    assert tokens_to(course, 1.5) == 300
    assert tokens_to(course, 3.5) == 100
    assert tokens_to(course, 1.0) == math.inf


def test_shares_of_the_gap() -> None:
    def found(loss: float) -> dict[str, object]:
        return {"loss": loss, "ece": 0.01, "acceptance": 0.5, "kl": 0.3, "course": [(100, 3.0), (200, loss)]}

    results = {"ce": {0: found(2.0)}, "live": {0: found(1.8)}, "sampled50": {0: found(1.85)}}
    lines = table(results)
    assert len(lines) == 5
    assert "| 75% ±" in lines[4]


def test_help_and_numbers_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["distillation_worth.py", "--pays", "--share", "0.8"])
    main()
    out = capsys.readouterr().out
    assert "1 student(s): does not pay" in out
    assert "live" in out
