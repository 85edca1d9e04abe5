"""Skill-it: losses sent back along a graph of which source teaches which probe (Chen et al., arXiv 2307.14430).

With ``G_ki`` how much training on source ``k`` helps probe ``i``, and ``L`` the probes' losses at the last ``window``
decisions (``HazyResearch/aioli: trainer/skillit_trainer.py``),

    w_k = w0_k * exp(eta * sum_i G_ki * sum_window L_i) / Z

with ``w0`` the weights at the start (uniform in the paper). Without a graph, one is learnt first: a :mod:`sweep
<cheapertraining.mixing.strategies.sweep>` over the sources gives the drops ``A_ik``, and ``G_ki = max(A_ik / L_i, 0)``,
scaled so that its largest entry is 1 as in a graph written by hand. The paper learns it from separate short runs; one
run's sweep is cheaper and noisier, and its later stretches start from a better model.

Cost: forward passes over ``P * probe_samples`` samples at each decision; without a graph also ``rounds * K * stretch``
decisions' batches of training near one source, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.signals import PROBE_LOSSES, Array, ProbeReading, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import exponentiated
from cheapertraining.mixing.strategies.sweep import Sweep, permuted

__all__ = ["SkillItStrategy"]

_VERSION = 1
_KEY = "algorithms.online_mixing.skillit"
Graph = dict[str, dict[str, float]]


class SkillItStrategy:
    """Moves weight to the sources that teach what is not yet known.

    Args:
        eta: size of an update.
        window: decisions whose losses are summed.
        graph: ``{source: {probe: strength}}``, 0 where nothing is named; None: learnt.
        one_hot, rounds, stretch: of the sweep that learns it, as in Aioli.

    Raises:
        UserError: a value out of range; at ``reset``, a graph with other sources; at ``propose``, with other probes.
    """

    name: ClassVar[str] = "skillit"
    needs: ClassVar[frozenset[str]] = frozenset({PROBE_LOSSES})

    def __init__(
        self,
        eta: float = 0.2,
        window: int = 3,
        graph: Mapping[str, Mapping[str, float]] | None = None,
        one_hot: float = 0.75,
        rounds: int = 1,
        stretch: int = 1,
    ) -> None:
        if not eta > 0:
            raise UserError(f"{_KEY}.eta: expected a positive number, found {eta}.")
        if not 0 < one_hot <= 1:
            raise UserError(f"{_KEY}.one_hot: expected a share above 0 and up to 1, found {one_hot}.")
        for name, value in (("window", window), ("rounds", rounds), ("stretch", stretch)):
            if value < 1:
                raise UserError(f"{_KEY}.{name}: expected at least 1, found {value}.")
        for source, row in (graph or {}).items():
            for probe, strength in row.items():
                if not (math.isfinite(strength) and strength >= 0):
                    raise UserError(f"{_KEY}.graph.{source}.{probe}: expected at least 0, found {strength}.")
        self.eta, self.window = eta, window
        self.graph = {source: dict(row) for source, row in (graph or {}).items()}
        self.one_hot, self.rounds, self.stretch = one_hot, rounds, stretch

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self._names = tuple(source.name for source in sources)
        for name in self.graph:
            if name not in self._names:
                raise UserError(f"{_KEY}.graph.{name}: no such source.{nearest(name, self._names)}")
        self._start = prior
        self._learnt: Graph | None = self.graph or None
        self._sweep: Sweep | None = None
        self._losses: list[dict[str, float]] = []

    def propose(self, signals: Signals) -> Array | None:
        reading = signals.probe_losses
        if reading is None or not np.isfinite(reading.losses).all():
            return None
        if self._learnt is None:
            if self._sweep is None:
                self._sweep = Sweep(permuted(len(self._names), self.rounds, 0), self.stretch)
            self._sweep.observe(signals, reading)
            if not self._sweep.done(signals):
                wish = self._sweep.wish(signals, self.one_hot)
                return self._start if wish is None else wish
            self._learnt, self._sweep = self._graph_of(self._sweep, reading), None
        for row in self._learnt.values():
            for probe in row:
                if probe not in reading.probes:
                    raise UserError(f"{_KEY}.graph: no probe is named '{probe}'.{nearest(probe, reading.probes)}")
        losses = dict(zip(reading.probes, reading.losses.tolist(), strict=True))
        self._losses = [*self._losses, losses][-self.window :]
        gains = [
            math.fsum(strength * past.get(probe, 0.0) for probe, strength in row.items() for past in self._losses)
            for row in (self._learnt.get(name, {}) for name in self._names)
        ]
        return exponentiated(self._start, self.eta * np.array(gains))

    def _graph_of(self, sweep: Sweep, reading: ProbeReading) -> Graph:
        effects = sweep.solve()
        if effects is None:
            return {name: {} for name in self._names}
        strengths = np.maximum(effects / np.maximum(reading.losses, 1e-12)[:, None], 0.0)
        strengths = strengths / max(float(strengths.max()), 1e-12)
        columns = zip(self._names, strengths.T.tolist(), strict=True)
        return {name: dict(zip(reading.probes, column, strict=True)) for name, column in columns}

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "sources": list(self._names),
            "graph": self._learnt,
            "sweep": None if self._sweep is None else self._sweep.state_dict(self._names),
            "losses": [dict(past) for past in self._losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With new sources, a graph that was learnt is learnt anew; without some old ones, the rest of it holds."""
        self._losses = [dict(past) for past in state["losses"]]
        # Checkpoints from before sources could change do not name them.
        before = set(state.get("sources", self._names))
        if not before >= set(self._names):
            return
        self._learnt = self.graph or state["graph"]
        if state["sweep"] is not None and before == set(self._names):
            self._sweep = Sweep.of(state["sweep"], self._names)
