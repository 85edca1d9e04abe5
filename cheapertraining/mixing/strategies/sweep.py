"""Learn, on the run itself, what each source does to each probe: the measuring half of Aioli and Skill-it.

For a stretch of batches each, the run trains on mixtures that lean on one source (``one_hot`` of it, the rest shared
equally). Between two decisions, probe ``i``'s loss falls by ``D_i = sum_k A_ik w_k`` with ``w`` the shares that were
drawn; ``A`` is the least-squares solution over all decisions of the sweep. With exactly the wished mixtures this is
Aioli's ``LearnParams`` (arXiv 2411.05735; ``HazyResearch/aioli: trainer/aioli_trainer.py``), which solves ``A W =
D``; shares as they were drawn allow for weights that come into force some batches late and for constraints that hold
them back (a small ``kl_step`` makes all mixtures alike, and ``A`` uncertain).

Cost: ``rounds * K`` stretches of training off the mixture, and the probes' losses at each decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cheapertraining.mixing.signals import Array, ProbeReading, Signals

__all__ = ["Sweep", "permuted"]


@dataclass
class Sweep:
    """One sweep. JSON-able state; sources by their order, which its owner's names give.

    Attributes:
        order: sources, in the order in which their stretches come.
        stretch: decisions that each lasts.
        decisions: made so far in the sweep.
        until: batch at which the last stretch has been trained on; None until it has been wished for.
        shares: ``[R][K]``, drawn between decisions.
        drops: ``[R][P]``, of the probes' losses.
        tokens, losses: at the last decision, where the next difference starts.
    """

    order: list[int]
    stretch: int
    decisions: int = 0
    until: int | None = None
    shares: list[list[float]] = field(default_factory=list)
    drops: list[list[float]] = field(default_factory=list)
    tokens: list[float] | None = None
    losses: dict[str, float] = field(default_factory=dict)

    def observe(self, signals: Signals, reading: ProbeReading) -> None:
        """Take in what happened since the last decision."""
        losses = dict(zip(reading.probes, reading.losses.tolist(), strict=True))
        if self.tokens is not None and set(losses) == set(self.losses):
            drawn = signals.tokens_seen - np.array(self.tokens)
            if drawn.sum() > 0:
                self.shares.append((drawn / drawn.sum()).tolist())
                self.drops.append([self.losses[name] - losses[name] for name in reading.probes])
        elif self.tokens is not None:
            self.shares, self.drops = [], []  # Other probes than before: nothing to compare with.
        self.tokens, self.losses = signals.tokens_seen.tolist(), losses
        if self.until is None and self.decisions >= self.stretch * len(self.order):
            self.until = signals.effective_batch  # From this decision's wish on, weights are none of the sweep's.

    def wish(self, signals: Signals, one_hot: float) -> Array | None:
        """The next stretch's mixture; None once all have been wished for."""
        place = self.decisions // self.stretch
        self.decisions += 1
        count = len(signals.sources)
        if place >= len(self.order):
            return None
        mixture = np.full(count, (1 - one_hot) / max(count - 1, 1))
        mixture[self.order[place]] = one_hot if count > 1 else 1.0
        return mixture

    def done(self, signals: Signals) -> bool:
        """Whether the last stretch has been trained on."""
        return self.until is not None and signals.batch >= self.until

    def solve(self) -> Array | None:
        """``A``, ``[P, K]``; None where nothing was seen."""
        if not self.shares:
            return None
        solution, *_ = np.linalg.lstsq(np.array(self.shares), np.array(self.drops), rcond=None)
        return np.asarray(solution.T)

    def state_dict(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {
            "order": [names[k] for k in self.order],
            "stretch": self.stretch,
            "decisions": self.decisions,
            "until": self.until,
            "shares": [dict(zip(names, row, strict=True)) for row in self.shares],
            "drops": self.drops,
            "tokens": None if self.tokens is None else dict(zip(names, self.tokens, strict=True)),
            "losses": self.losses,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], names: tuple[str, ...]) -> Sweep:
        """The inverse of :meth:`state_dict`, for the same sources in any order."""
        tokens = state["tokens"]
        return cls(
            order=[names.index(name) for name in state["order"]],
            stretch=int(state["stretch"]),
            decisions=int(state["decisions"]),
            until=state["until"],
            shares=[[row[name] for name in names] for row in state["shares"]],
            drops=[list(row) for row in state["drops"]],
            tokens=None if tokens is None else [tokens[name] for name in names],
            losses=dict(state["losses"]),
        )


def permuted(count: int, rounds: int, number: int) -> list[int]:
    """``rounds`` permutations of ``count`` sources in a row, different for each sweep, the same in every run."""
    generator = np.random.default_rng(number)
    return [int(k) for _ in range(rounds) for k in generator.permutation(count)]
