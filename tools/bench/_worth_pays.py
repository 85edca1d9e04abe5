"""When distillation pays, in floating-point operations (2 per parameter and token forward, 4 more backward; PaLM, arXiv
2204.02311, appendix B), with the teacher's pass and, where there was none, its training counted."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Plan", "pays"]


@dataclass(frozen=True)
class Plan:
    """Students that are to be as good as cross-entropy on ``tokens`` makes them.

    Attributes:
        student, teacher: parameters that multiply.
        tokens: that cross-entropy alone takes.
        share: of these tokens that distillation needs for the same held-out loss, in (0, 1].
        step: cost of a distilled step but for the teacher, relative to one of cross-entropy.
        students: that learn from one cache, or one after another from a live teacher.
        cached: the teacher looks at each token once for all students; live, once for each.
        teacher_tokens: that the teacher is trained on for this; 0 where it is there already.
    """

    student: float
    teacher: float
    tokens: float
    share: float
    step: float = 1.0
    students: int = 1
    cached: bool = True
    teacher_tokens: float = 0.0

    @property
    def alone(self) -> float:
        """Operations of all students by cross-entropy alone."""
        return 6 * self.student * self.tokens * self.students

    @property
    def students_distilled(self) -> float:
        """Operations of all students' own steps."""
        return 6 * self.student * self.step * self.tokens * self.share * self.students

    @property
    def teaching(self) -> float:
        """Operations of the teacher's passes."""
        return 2 * self.teacher * self.tokens * self.share * (1 if self.cached else self.students)

    @property
    def training(self) -> float:
        """Operations of the teacher's training."""
        return 6 * self.teacher * self.teacher_tokens

    @property
    def ratio(self) -> float:
        """What distillation costs relative to cross-entropy alone; below 1 it pays."""
        return (self.students_distilled + self.teaching + self.training) / self.alone

    @property
    def break_even(self) -> float:
        """Students from which on it pays; infinite where no number of them makes it."""
        gain = 6 * self.student * self.tokens * (1 - self.step * self.share)
        passes = 2 * self.teacher * self.tokens * self.share
        fixed = self.training + (passes if self.cached else 0.0)
        gain -= 0.0 if self.cached else passes
        return fixed / gain if gain > 0 else float("inf")


def pays(plan: Plan) -> str:
    """The verdict in words."""
    if plan.ratio < 1:
        return f"pays: {1 - plan.ratio:.0%} fewer operations"
    if plan.break_even == float("inf"):
        return f"does not pay, with any number of students: {plan.ratio:.2f} times the operations"
    return f"does not pay: {plan.ratio:.2f} times the operations; it would from {plan.break_even:.1f} students on"
