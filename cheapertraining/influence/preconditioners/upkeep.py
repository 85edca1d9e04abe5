"""Kronecker factors kept up during training: when to look, how fast to forget, when a new eigenbasis comes in.

A decomposition runs in a thread of its own on a copy of the factors. The observation at which its result is taken over
is fixed when it is launched, and waited for there, so a run does not depend on how fast the thread was.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.preconditioners.factors import Basis, Sums, decompose, transferred

__all__ = ["Schedule", "Upkeep", "decomposed"]


@dataclass(frozen=True)
class Schedule:
    """What is done during training.

    More often, or with more rows, is more exact and dearer. Measured on a CPU with 2.5 million parameters and 4,096
    tokens a microbatch, as multiples of a step: 1.02 to 1.03 as it stands, 1.03 to 1.05 with twice the rows.

    Attributes:
        every: training steps from one observation to the next.
        fraction: of a microbatch's rows that matrices are looked at with, in turn; at least one row.
        decay: what an observation leaves of the sums so far.
        first: observations before the first decomposition.
        refresh: observations from one decomposition to the next.
        lag: observations from the launch of a decomposition to its use.
    """

    every: int = 16
    fraction: float = 0.125
    decay: float = 0.97
    first: int = 4
    refresh: int = 64
    lag: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("fraction", "decay") and value < 1:
                raise UserError(f"schedule.{name}: expected at least 1, found {value}.")
        if not 0 < self.fraction <= 1 or not 0 < self.decay <= 1:
            raise UserError(
                f"schedule: expected fraction and decay above 0 and at most 1, found {self.fraction} and {self.decay}."
            )


class Upkeep:
    """The sums and the eigenbasis, through a fit or through training.

    Args:
        schedule: of training.
        corrected: whether eigenvalues are measured in the basis (EK-FAC).
    """

    def __init__(self, schedule: Schedule, *, corrected: bool) -> None:
        self._schedule, self._corrected = schedule, corrected
        self.start(Sums(), {})

    def start(self, sums: Sums, bases: Mapping[str, Basis]) -> None:
        """Forget all, and go on from these."""
        self._sums, self._bases = sums, dict(bases)
        self._observations = self._swap_at = 0
        self._next: Future[dict[str, Basis]] | None = None

    @property
    def begun(self) -> bool:
        """Whether anything was seen."""
        return bool(self._sums.tensors)

    def rows(self, count: int) -> slice:
        """Which rows of a microbatch of ``count`` to look at this time."""
        stride = min(max(1, round(1 / self._schedule.fraction)), count)
        return slice(self._observations % stride, None, stride)

    def begin(self) -> dict[str, Basis]:
        """An observation begins: take over the basis that is due, and say in which to measure."""
        if self._next is not None and self._observations >= self._swap_at:
            self._swap()
        return self._bases if self._corrected else {}

    def end(self, seen: Sums) -> None:
        """An observation ends. Call it on all ranks: at times, it launches a decomposition of their common factors."""
        if not seen.finite:
            # Nothing is learned, but all ranks keep the same sums.
            seen = Sums({key: torch.zeros_like(value) for key, value in seen.tensors.items()})
        self._sums.merge(seen, self._schedule.decay)
        self._observations += 1
        due = self._observations == self._schedule.first or self._observations % self._schedule.refresh == 0
        if due and self._next is None:
            self._launch()

    def current(self) -> tuple[Sums, dict[str, Basis]] | None:
        """Sums over all ranks less the factors, and the basis; None before anything was seen. A collective call."""
        if not self.begun:
            return None
        if not self._bases:
            if self._next is None:
                self._launch()
            self._swap()
        return self._sums.over_ranks("left/", "right/"), self._bases

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`~cheapertraining.influence.preconditioners.kronecker.KFAC.state_dict`."""
        return {
            "sums": self._sums.over_ranks().tensors,
            "bases": {name: vars(basis).copy() for name, basis in self._bases.items()},
            "next": None if self._next is None else {n: vars(basis).copy() for n, basis in self._next.result().items()},
            "observations": self._observations,
            "swap_at": self._swap_at,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over :meth:`state_dict`."""
        sums = Sums({key: tensor.to(device, copy=True) for key, tensor in state["sums"].items()})
        self.start(sums, _placed({name: Basis(**parts) for name, parts in state["bases"].items()}, sums))
        self._observations, self._swap_at = state["observations"], state["swap_at"]
        if state["next"] is not None:
            self._next = Future()
            self._next.set_result({name: Basis(**parts) for name, parts in state["next"].items()})

    def _launch(self) -> None:
        self._swap_at = self._observations + self._schedule.lag
        executor = ThreadPoolExecutor(1, thread_name_prefix="eigen-decomposition")
        self._next = executor.submit(decomposed, self._sums.over_ranks("squares/"))
        executor.shutdown(wait=False)

    def _swap(self) -> None:
        assert self._next is not None
        bases = _placed(self._next.result(), self._sums)
        self._next = None
        if self._corrected:
            for name, basis in bases.items():
                self._carry_over(name, basis)
            if not self._bases:
                self._sums.tensors["corrected"] = self._sums.tensors["units"].clone()
        self._bases = bases

    def _carry_over(self, name: str, basis: Basis) -> None:
        """Squares in the new basis: those known in the old one, at first K-FAC's in the weight of what it has seen."""
        key, old = f"squares/{name}", self._bases.get(name)
        if old is not None and key in self._sums.tensors:
            self._sums.tensors[key] = transferred(self._sums.tensors[key], old, basis)
        else:
            of_kfac = torch.outer(basis.left_values, basis.right_values)
            self._sums.tensors[key] = of_kfac * self._sums.count("units")


def decomposed(sums: Sums) -> dict[str, Basis]:
    """The eigenbases of all matrices that there are factors of, float64, on the CPU."""
    names = [key.split("/")[1] for key in sums.tensors if key.startswith("left/")]
    tokens, units = sums.count("tokens"), sums.count("units")
    return {
        name: decompose(sums.sites("left", name), sums.sites("right", name), tokens, units)
        for name in dict.fromkeys(names)
    }


def _placed(bases: Mapping[str, Basis], sums: Sums) -> dict[str, Basis]:
    """Bases where the factors are, in their dtype."""
    return {name: basis.to(sums.sites("right", name)[0]) for name, basis in bases.items()}
