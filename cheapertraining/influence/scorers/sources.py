"""Influence of sources by any linear estimator and any scorer, for models that look-ahead alone does not suit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.model_access import to_device
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.preconditioners import EKFAC, KFAC, DataInf, LayerScale, Preconditioner
from cheapertraining.influence.probes import ProbeLosses
from cheapertraining.influence.scorers.hook import hook_scores
from cheapertraining.influence.scorers.look_ahead import Batch, LookAheadEstimator, SampleSource
from cheapertraining.influence.scorers.loop import loop_scores

__all__ = ["METRICS", "SCORERS", "SourceEstimator", "check_metric", "check_scorer"]

METRICS = ("raw", "adam", "layer_scale", "datainf", "kfac", "ekfac")
SCORERS = ("forward", "hook", "loop")


class SourceEstimator(LookAheadEstimator):
    """:class:`LookAheadEstimator` with more metrics and scorers.

    Args:
        mixture, probes, probe_weights: as there.
        metric: ``raw``, ``adam``, or a curvature that is fitted at each measurement on the sources' samples it looks
            at: ``layer_scale``, ``datainf``, ``kfac``, ``ekfac``.
        scorer: ``forward``, two forward passes along a direction, parameters in float32; ``hook``, a backward pass
            without weight gradients, in any precision, for the layers it knows; ``loop``, a backward pass for each
            sample, slow, for every model that autograd can differentiate (quantization-aware layers, whose forward
            pass is a staircase, among them).
        damping: of the curvature, in the unit of each; relative to its own size.
        **options: further ones of :class:`LookAheadEstimator`.

    Raises:
        UserError: as there; an unknown metric or scorer.
    """

    def __init__(
        self,
        mixture: SampleSource,
        probes: Mapping[str, DataLoader[Any]],
        probe_weights: Mapping[str, float] | None = None,
        *,
        metric: str = "raw",
        scorer: str = "forward",
        damping: float = 0.1,
        **options: Any,
    ) -> None:
        check_metric(metric)
        check_scorer(scorer)
        super().__init__(mixture, probes, probe_weights, metric="adam" if metric == "adam" else "raw", **options)
        self.curvature = None if metric in ("raw", "adam") else metric
        self.scorer = scorer
        self.damping = damping
        self._fitted: Preconditioner | None = None

    def _scores(self, model: nn.Module, direction: Directions, batch: Batch) -> torch.Tensor:
        if self.scorer == "forward":
            return super()._scores(model, direction, batch)
        placed = to_device(batch, next(model.parameters()).device)
        score = hook_scores if self.scorer == "hook" else loop_scores
        return score(model, direction, placed).scores[:, 0].double()

    def _directions(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        update_index: int,
        microbatch_size: int | None,
        losses: dict[str, ProbeLosses],
        batches: Sequence[Batch],
    ) -> Iterator[Directions]:
        self._fitted = self._fit(model, parameters, batches)
        yield from super()._directions(model, parameters, optimizer, update_index, microbatch_size, losses, batches)
        self._fitted = None

    def _fit(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Sequence[Batch]
    ) -> Preconditioner | None:
        if self.curvature is None:
            return None
        made: LayerScale | KFAC
        if self.curvature in ("layer_scale", "datainf"):
            made = (DataInf if self.curvature == "datainf" else LayerScale)(parameters, self.damping)
        else:
            made = (EKFAC if self.curvature == "ekfac" else KFAC)(parameters, damping=self.damping)
        made.fit(model, [to_device(batch, next(iter(parameters.values())).device) for batch in batches])
        return made

    def _precondition(
        self,
        name: str,
        gradient: Mapping[str, torch.Tensor],
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
    ) -> Directions:
        direction = super()._precondition(name, gradient, parameters, optimizer)
        return direction if self._fitted is None else self._fitted.apply(direction)


def check_metric(metric: str) -> None:
    """Refuse a metric that is none of :data:`METRICS`."""
    if metric not in METRICS:
        raise UserError(f"metric: expected one of {', '.join(METRICS)}, found '{metric}'.{nearest(metric, METRICS)}")


def check_scorer(scorer: str) -> None:
    """Refuse a scorer that is none of :data:`SCORERS`."""
    if scorer not in SCORERS:
        raise UserError(f"scorer: expected one of {', '.join(SCORERS)}, found '{scorer}'.{nearest(scorer, SCORERS)}")
