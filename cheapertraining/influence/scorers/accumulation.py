"""Influence of sources from the gradients that training accumulates anyway: no pass over samples of its own.

    estimator = MicrobatchEstimator(names, loader.probes)
    estimator.prepare(model, optimizer)              # a direction for each probe: the only passes that it costs
    for batch in batches:
        estimator.begin_batch()
        for part in source_microbatches(batch, size):      # one source each
            estimator.begin_pass()
            loss(model(part)).backward()
            estimator.mark(source, tokens, loss_scale)
        estimator.end_batch()
    measured = estimator.measure(model, optimizer, update_index=…)       # and directions for the next stretch

Scores are those of all batches since the last measurement, along the directions made there: they look at thousands of
samples where separate draws look at a few, but up to an interval late. Cost of a measurement: the probes' gradients; of
a microbatch: a scalar product a direction (:mod:`~cheapertraining.influence.scorers.microbatch`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.aggregation import GroupSums
from cheapertraining.influence.parameters import Directions, Layers, select_parameters
from cheapertraining.influence.preconditioners import Adam
from cheapertraining.influence.probes import ProbeBank
from cheapertraining.influence.scorers import COMBINED, SourceInfluence
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer
from cheapertraining.influence.scorers.sources import ProbeChanges
from cheapertraining.influence.sharding import Shards

__all__ = ["ACCUMULATED_METRICS", "MicrobatchEstimator"]

ACCUMULATED_METRICS = ("raw", "adam")
_STATE_VERSION = 1


class MicrobatchEstimator:
    """Measures sources while they are trained on; see the module's text.

    Args:
        source_names: what marks count in.
        probes: a finite loader for each probe.
        probe_weights: weight of each probe's loss in the objective, any scale; default equal.
        probe_samples: samples of each probe in a direction.
        metric: ``raw`` or ``adam`` (the optimizer's second moments at the time the direction is made).
        layers: which parameters count, see :data:`~cheapertraining.influence.parameters.Layers`.
        combine: one direction for all probes together.

    Raises:
        UserError: another metric, bad probes.
    """

    def __init__(
        self,
        source_names: Sequence[str],
        probes: Mapping[str, DataLoader[Any]],
        probe_weights: Mapping[str, float] | None = None,
        *,
        probe_samples: int = 8,
        metric: str = "raw",
        layers: Layers = "all",
        combine: bool = False,
    ) -> None:
        if metric not in ACCUMULATED_METRICS:
            raise UserError(
                f"metric: scorer 'microbatch' sees no sample's gradient alone, so it takes "
                f"{' or '.join(ACCUMULATED_METRICS)}, found '{metric}'.{nearest(metric, ACCUMULATED_METRICS)}"
            )
        self.source_names = tuple(source_names)
        self.bank = ProbeBank(probes, probe_weights, probe_samples)
        self.metric = metric
        self.layers = layers
        self.combine = combine
        self._changes = ProbeChanges(self.bank.names)
        self._scorer: MicrobatchScorer | None = None
        self._directions: Directions | None = None
        self._shards: Shards | None = None
        self._sums: GroupSums | None = None
        self._restored: Mapping[str, Any] | None = None
        self._fresh = False
        self._mixed: torch.Tensor | None = None  # on the device: a microbatch of this batch has several sources

    @property
    def ready(self) -> bool:
        """Whether there are directions to score along."""
        return self._scorer is not None

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        update_index: int = 0,
        microbatch_size: int | None = None,
    ) -> None:
        """Make the directions, and forget what was scored along others; on all ranks, between steps.

        With the metric ``adam`` nothing is made before the optimizer's first step.

        Raises:
            UserError: ``adam`` without an optimizer; probes that are broken.
        """
        if self.metric == "raw" or optimizer is None or optimizer.state:
            self._make(model, select_parameters(model, self.layers), optimizer, update_index, microbatch_size)

    def resume(self, model: nn.Module) -> None:
        """Go on with the directions and sums of a loaded state, where there are any; on all ranks."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        parameters = select_parameters(model, self.layers)
        if set(restored["tensors"]) != set(parameters):
            return  # Of other layers: they are made anew.
        shards = Shards(model, parameters)
        tensors = {
            name: shards.scatter(name, restored["tensors"][name].to(parameter.device))
            for name, parameter in parameters.items()
        }
        self._arm(model, parameters, Directions(tuple(restored["directions"]), tensors))
        assert self._sums is not None
        self._sums.load_state_dict(restored["sums"])

    def begin_batch(self) -> None:
        """Forget what was marked of this batch: it is tried again with smaller microbatches when memory ran out."""
        self._fresh, self._mixed = True, None
        if self._scorer is not None:
            self._scorer.discard()

    def begin_pass(self) -> None:
        """Before a microbatch's passes. Of a batch's first, after the gradients have been set to zero."""
        if self._fresh and self._scorer is not None:
            self._scorer.begin()
        self._fresh = False

    def mark(self, source: torch.Tensor, tokens: torch.Tensor, loss_scale: torch.Tensor) -> None:
        """After a microbatch's backward pass.

        Args:
            source: int64 ``[B]``, one number in all of it.
            tokens: that its loss counts, on this rank.
            loss_scale: see :meth:`~.microbatch.MicrobatchScorer.mark`.
        """
        if self._scorer is None:
            return
        mixed = (source != source[0]).any()
        self._mixed = mixed if self._mixed is None else self._mixed | mixed
        self._scorer.mark(source[0], tokens, loss_scale)

    def end_batch(self) -> None:
        """Add the batch's microbatches of all ranks; a collective call of a few numbers.

        Raises:
            UserError: one of them has samples of several sources.
        """
        if self._mixed is not None and bool(self._mixed):
            raise UserError(
                "influence by microbatch: expected one source in each microbatch, found several. Cut batches with "
                "source_microbatches (the data spec's split_batch)."
            )
        if self._scorer is not None and self._sums is not None:
            sources, sums, tokens = self._scorer.collect_microbatches()
            finite = sums.isfinite().all(dim=1)  # A loss scaler that overflows skips its step.
            self._sums.add(sums, tokens * finite, sources)

    def measure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        update_index: int,
        microbatch_size: int | None = None,
    ) -> SourceInfluence:
        """Scores of what was trained on since the last call, losses of the probes now, and new directions.

        A source that did not come has the mean score of the others, with the error of a single microbatch.

        Raises:
            UserError: there were no directions, or no source came.
        """
        started = time.perf_counter()
        if self._sums is None or self._directions is None:
            raise UserError("influence by microbatch: expected prepare() and a batch before measure(), found none.")
        scores, errors, samples = _filled(self._sums)
        parameters = select_parameters(model, self.layers)
        directions = self._directions.names
        losses = self._make(model, parameters, optimizer, update_index, microbatch_size)
        return SourceInfluence(
            sources=self.source_names,
            directions=directions,
            scores=scores,
            errors=errors,
            samples=samples,
            probes=self.bank.names,
            probe_weights=np.array(list(self.bank.weights.values())),
            probe_losses=np.array([losses[name].mean for name in self.bank.names]),
            probe_changes=np.array([self._changes.since_last(name, losses[name]) for name in self.bank.names]),
            seconds=time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Any]:
        """Directions, sums since they were made, and the probes' last losses. A collective call where sharded."""
        state: dict[str, Any] = {"version": _STATE_VERSION, "last": self._changes.state_dict()}
        if self._restored is not None:
            return state | dict(self._restored)
        if self._directions is None or self._sums is None or self._shards is None:
            return state
        tensors = self._directions.tensors
        return state | {
            "sources": list(self.source_names),
            "directions": list(self._directions.names),
            "tensors": {name: self._shards.gather(name, part).cpu() for name, part in tensors.items()},
            "sums": self._sums.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`, for :meth:`resume`; with other sources or probes, begin anew."""
        self._changes.load_state_dict(state["last"])
        self._scorer = self._directions = self._sums = None
        names = [COMBINED] if self.combine else list(self.bank.names)
        same = state.get("sources") == list(self.source_names) and state.get("directions") == names
        self._restored = {key: state[key] for key in ("sources", "directions", "tensors", "sums")} if same else None

    def _make(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        update_index: int,
        microbatch_size: int | None,
    ) -> Any:
        """New directions and, with them, new sums; returns the probes' losses."""
        made, losses = self.bank.directions(model, update_index, parameters, microbatch_size, self.combine)
        if self.metric == "adam":
            if optimizer is None:
                raise UserError("metric 'adam': expected the optimizer, found none. Pass it, or use 'raw'.")
            made = Adam(parameters, optimizer).apply(made)
        self._arm(model, parameters, made)
        return losses

    def _arm(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], directions: Directions) -> None:
        self._directions, self._shards = directions, Shards(model, parameters)
        self._scorer = MicrobatchScorer(model, directions, self.source_names)
        device = next(iter(parameters.values())).device
        self._sums = GroupSums(len(self.source_names), len(directions.names), device)


def _filled(sums: GroupSums) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Scores and errors ``[D, K]`` without gaps, and the fewest microbatches behind one (2 at least)."""
    counts = sums.counts().cpu().numpy()
    means, errors = (part.T.cpu().numpy() for part in sums.means())
    if not (counts > 1).any():
        raise UserError(
            "influence by microbatch: expected a source that came in two microbatches since the last measurement, "
            "found none. Measure less often, or use smaller microbatches."
        )
    alone = np.sqrt(np.nanmean(errors**2 * counts, axis=1, keepdims=True))  # Of one microbatch.
    scores = np.where(counts > 0, means, np.nanmean(means, axis=1, keepdims=True))
    known = np.where(counts > 1, errors, alone)
    return scores, known, max(2, int(counts[counts > 0].min()))
