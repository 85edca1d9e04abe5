"""What training on each source would do to each probe, measured on samples off the training order.

Samples of every source are drawn, spread over the ranks, scored along the probes' directions, and averaged by source.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import no_trace, to_device
from cheapertraining.influence.parameters import Directions, Layers, select_parameters
from cheapertraining.influence.preconditioners import FITTED, Adam, Identity, Preconditioner, make_fitted
from cheapertraining.influence.probes import ProbeBank, ProbeLosses
from cheapertraining.influence.ranks import check_equal_counts, rank_rows, sum_over_ranks
from cheapertraining.influence.scorers import COMBINED, SourceInfluence
from cheapertraining.influence.scorers.forward import forward_scores
from cheapertraining.influence.scorers.gram import GradientEstimator
from cheapertraining.influence.scorers.hook import hook_scores
from cheapertraining.influence.scorers.loop import loop_scores
from cheapertraining.influence.sharding import sample_copies

__all__ = [
    "METRICS",
    "SCORERS",
    "ProbeChanges",
    "SampleSource",
    "SourceEstimator",
    "check_metric",
    "check_scorer",
]

Batch = Mapping[str, torch.Tensor]
METRICS = ("raw", "adam", "cosine", *FITTED)
SCORERS = ("forward", "hook", "loop")
_STATE_VERSION = 1
_SEEDS = 1 << 31  # Keys are 64 bits wide: the seed above, the update below.
_MODEL_INPUTS = ("input_ids", "labels", "position_ids")


class SampleSource(Protocol):
    """Where samples of each source are drawn from, off the training order; ``MixedDataset`` is one."""

    @property
    def source_names(self) -> tuple[str, ...]: ...

    def draw(self, source: str, n: int, key: int) -> dict[str, torch.Tensor]: ...


class SourceEstimator:
    """Measures, for each source, what training on it would do to each probe.

    One direction is made for each probe, so a measurement by ``forward`` costs, for ``P`` probes and ``K`` sources, a
    forward and backward pass over ``P * probe_samples`` samples and a forward pass over ``2 * P * K *
    source_samples``. With ``combine`` there is one direction, the gradient of the weighted sum of the probes'
    losses, and the second term loses its ``P``. All of it is spread over the ranks. Memory: twice the
    trainable parameters.

    Args:
        mixture: gives ``source_names`` and ``draw``.
        probes: a finite loader for each probe.
        probe_weights: weight of each probe's loss in the objective, any scale; default equal.
        probe_samples: samples of each probe in a measurement.
        source_samples: samples of each source in a measurement, over all ranks; at least 2, or no error could
            be told.
        metric: ``raw``, the gradient itself (what a unit step of gradient descent does); ``adam``, preconditioned by
            the optimizer's second moments; ``cosine``, divided by the norm of each source's own mean gradient over its
            samples, so that large gradients alone are no advantage (``hook`` only; one more pass over the samples); or
            a curvature that is fitted at each measurement on the sources' samples at hand: ``layer_scale``,
            ``datainf``, ``kfac``, ``ekfac``.
        scorer: ``forward``, two forward passes along a direction, parameters in float32; ``hook``, a backward pass
            without weight gradients, in any precision, for the layers it knows; ``loop``, a backward pass for each
            sample, slow, for every model that autograd can differentiate (quantization-aware layers, whose forward
            pass is a staircase, among them).
        damping: of the curvature, in the unit of each; relative to its own size.
        step_size: of ``forward``, see :func:`~cheapertraining.influence.scorers.forward.forward_scores`.
        seed: of the samples drawn.
        combine: one direction for all probes together.
        layers: which parameters count, see :data:`~cheapertraining.influence.parameters.Layers`.

    Raises:
        UserError: an unknown metric or scorer, a bad count or step size, bad probes.
    """

    def __init__(
        self,
        mixture: SampleSource,
        probes: Mapping[str, DataLoader[Any]],
        probe_weights: Mapping[str, float] | None = None,
        *,
        probe_samples: int = 8,
        source_samples: int = 4,
        metric: str = "raw",
        scorer: str = "forward",
        damping: float = 0.1,
        step_size: float = 1e-4,
        seed: int = 0,
        combine: bool = False,
        layers: Layers = "all",
    ) -> None:
        check_scorer(scorer)
        check_metric(metric, scorer)
        if source_samples < 2:
            raise UserError(f"source_samples: expected at least 2 (one has no standard error), found {source_samples}.")
        if not 0 < step_size < 1:
            raise UserError(f"step_size: expected a relative step between 0 and 1, such as 1e-4, found {step_size}.")
        self.bank = ProbeBank(probes, probe_weights, probe_samples)
        self.mixture = mixture
        self.source_samples = source_samples
        self.metric = metric
        self.scorer = scorer
        self.damping = damping
        self.step_size = step_size
        self.seed = seed
        self.combine = combine
        self.layers = layers
        self._changes = ProbeChanges(self.bank.names)

    def measure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        update_index: int,
        microbatch_size: int | None = None,
    ) -> SourceInfluence:
        """Measure now. Call it on all ranks with the same ``update_index``, between optimizer steps.

        Parameters, gradients, modes, random generators and the optimizer are afterwards as before, bit for
        bit.

        Args:
            model: any ``nn.Module`` that :func:`~cheapertraining.influence.model_access.sample_losses` can
                call; on one rank, replicated (``DistributedDataParallel``) or sharded by FSDP.
            optimizer: needed by the ``adam`` metric.
            update_index: number of the measurement; says which samples are used.
            microbatch_size: samples in a pass; default all that fall to this rank.

        Raises:
            UserError: half-precision parameters with ``forward``; ``adam`` without Adam's moments.
        """
        started = time.perf_counter()
        parameters = select_parameters(model, self.layers)
        losses: dict[str, ProbeLosses] = {}
        copies = sample_copies(model)
        with no_trace(model):
            batches, places = self._source_rows(update_index, microbatch_size, copies)
            check_equal_counts(len(batches), "passes over the sources' samples", next(iter(parameters.values())).device)
            precondition = self._preconditioner(model, parameters, optimizer, batches).apply
            gradients = self._gradients(model, parameters, update_index, microbatch_size, losses)
            derivatives = [
                torch.cat([self._scores(model, direction, batch) for batch in batches])
                for direction in map(precondition, gradients)
            ]
        scores, errors = self._per_source(torch.stack(derivatives), batches, places, copies)
        if self.metric == "cosine":
            norms = self._source_norms(model, update_index, microbatch_size)
            scores, errors = scores / norms, errors / norms
        return SourceInfluence(
            sources=tuple(self.mixture.source_names),
            directions=(COMBINED,) if self.combine else self.bank.names,
            scores=scores,
            errors=errors,
            samples=self.source_samples,
            probes=self.bank.names,
            probe_weights=np.array(list(self.bank.weights.values())),
            probe_losses=np.array([losses[name].mean for name in self.bank.names]),
            probe_changes=np.array([self._changes.since_last(name, losses[name]) for name in self.bank.names]),
            seconds=time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: what the next measurement compares the probes' losses with."""
        return {"version": _STATE_VERSION, "last": self._changes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`; probes that no longer exist are forgotten."""
        self._changes.load_state_dict(state["last"])

    def _source_rows(
        self, update_index: int, microbatch_size: int | None, copies: int
    ) -> tuple[list[Batch], list[tuple[int, float]]]:
        """This rank's share of the samples, in passes, and each row's place in ``[K * source_samples]``."""
        names, per_source = self.mixture.source_names, self.source_samples
        places = rank_rows(len(names) * per_source, copies)
        wanted: dict[int, list[int]] = {}
        for place, _ in places:
            wanted.setdefault(place // per_source, []).append(place % per_source)
        # rank_rows fills up with row 0 at the end, so group by source and put the rows back in the order of
        # ``places``.
        drawn = {k: self.mixture.draw(names[k], per_source, (self.seed % _SEEDS << 32) + update_index) for k in wanted}
        inputs = [name for name in _MODEL_INPUTS if all(name in batch for batch in drawn.values())]
        whole = {
            name: torch.stack([drawn[place // per_source][name][place % per_source] for place, _ in places])
            for name in inputs
        }
        size = microbatch_size or len(places)
        cuts = range(0, len(places), size)
        return [{name: rows[cut : cut + size] for name, rows in whole.items()} for cut in cuts], places

    def _scores(self, model: nn.Module, direction: Directions, batch: Batch) -> torch.Tensor:
        """Of each sample along one direction, ``[N]``."""
        if self.scorer == "forward":
            return forward_scores(model, direction, batch, method="central", step_size=self.step_size).scores[:, 0]
        placed = to_device(batch, next(model.parameters()).device)
        score = hook_scores if self.scorer == "hook" else loop_scores
        return score(model, direction, placed).scores[:, 0].double()

    def _preconditioner(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        batches: Sequence[Batch],
    ) -> Preconditioner:
        if self.metric in ("raw", "cosine"):
            return Identity()
        if self.metric == "adam":
            if optimizer is None:
                raise UserError(
                    "metric 'adam': expected the optimizer, found none. Pass it to measure(), or use 'raw'."
                )
            return Adam(parameters, optimizer)
        made = make_fitted(self.metric, parameters, self.damping)
        device = next(iter(parameters.values())).device
        made.fit(model, [to_device(batch, device) for batch in batches])
        return made

    def _gradients(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        update_index: int,
        microbatch_size: int | None,
        losses: dict[str, ProbeLosses],
    ) -> Iterator[Directions]:
        """Of one probe after another, so that one is in memory at a time, or all combined; fills ``losses``."""
        combined: dict[str, torch.Tensor] = {}
        for name, weight in self.bank.weights.items():
            gradient, losses[name] = self.bank.gradient(model, name, update_index, parameters, microbatch_size)
            if not self.combine:
                yield Directions((name,), {key: part[None] for key, part in gradient.items()})
                continue
            for key, part in gradient.items():
                weighted = part.mul_(weight)
                combined[key] = combined[key].add_(weighted) if key in combined else weighted
        if self.combine:
            yield Directions((COMBINED,), {key: part[None] for key, part in combined.items()})

    def _per_source(
        self,
        derivatives: torch.Tensor,
        batches: Sequence[Batch],
        places: Sequence[tuple[int, float]],
        copies: int,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Token-weighted mean of each source and its standard error (a ratio of means), each ``[D, K]``."""
        device, n = derivatives.device, self.source_samples
        counted = torch.tensor([counts for _, counts in places], dtype=torch.float64, device=device)
        tokens = torch.cat([(batch["labels"][:, 1:] != IGNORED).sum(dim=1) for batch in batches]).to(device)
        table = torch.zeros(
            len(derivatives) + 1, len(self.mixture.source_names) * n, dtype=torch.float64, device=device
        )
        rows = torch.cat([derivatives, tokens.double()[None]]) * counted
        table.index_add_(1, torch.tensor([place for place, _ in places], device=device), rows)
        sum_over_ranks(table, copies)
        by_sample = table.cpu().numpy().reshape(len(table), -1, n)
        slopes, lengths = by_sample[:-1], by_sample[-1]
        total = np.maximum(lengths.sum(axis=1), 1.0)
        scores = slopes.sum(axis=2) / total
        residuals = slopes - scores[:, :, None] * lengths
        return scores, np.sqrt(n / (n - 1) * (residuals**2).sum(axis=2)) / total

    def _source_norms(self, model: nn.Module, update_index: int, microbatch_size: int | None) -> NDArray[np.float64]:
        """Norm of each source's mean gradient over the samples that were scored, ``[K]``."""
        gradients = GradientEstimator(self.mixture, self.source_samples, self.seed, self.layers)
        found = gradients.measure(model, update_index=update_index, microbatch_size=microbatch_size)
        return np.asarray(np.sqrt(np.maximum(np.diag(found.products), np.finfo(np.float64).tiny)))


class ProbeChanges:
    """How the probes' losses have changed since they were last looked at, over the samples common to both looks.

    Args:
        names: of the probes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        # Per probe: sample index -> (loss sum, tokens) at the last measurement.
        self._last: dict[str, dict[int, tuple[float, float]]] = {}

    def since_last(self, name: str, losses: ProbeLosses) -> float:
        """Token-mean change, nats; NaN where no sample is common. ``losses`` are what the next call compares with."""
        now = {
            index: (float(total), float(tokens))
            for index, total, tokens in zip(losses.indices, losses.sums, losses.tokens, strict=True)
        }
        before, self._last[name] = self._last.get(name, {}), now
        common = [index for index in now if index in before]
        tokens = sum(now[index][1] for index in common)
        if not tokens:
            return math.nan
        return sum(now[index][0] - before[index][0] for index in common) / tokens

    def state_dict(self) -> dict[str, list[list[float]]]:
        """JSON-able: ``[index, loss sum, tokens]`` of each sample, by probe."""
        return {name: [[index, *pair] for index, pair in seen.items()] for name, seen in self._last.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`; probes that no longer exist are forgotten."""
        self._last = {
            name: {int(index): (total, tokens) for index, total, tokens in seen}
            for name, seen in state.items()
            if name in self._names
        }


def check_metric(metric: str, scorer: str | None = None) -> None:
    """Refuse a metric that is none of :data:`METRICS`, or that the scorer does not have."""
    if metric not in METRICS:
        raise UserError(f"metric: expected one of {', '.join(METRICS)}, found '{metric}'.{nearest(metric, METRICS)}")
    if metric == "cosine" and scorer not in (None, "hook"):
        raise UserError(
            f"metric: 'cosine' needs the norm of each source's gradient, which scorer '{scorer}' does not give. Use "
            "scorer 'hook', or another metric."
        )


def check_scorer(scorer: str) -> None:
    """Refuse a scorer that is none of :data:`SCORERS`."""
    if scorer not in SCORERS:
        raise UserError(f"scorer: expected one of {', '.join(SCORERS)}, found '{scorer}'.{nearest(scorer, SCORERS)}")
