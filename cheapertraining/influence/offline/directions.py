"""What a checkpoint's rows are scored along: directions of the probes, or a projection of all gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from cheapertraining.data.collate import Batch, collate
from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By
from cheapertraining.influence.calculator import InfluenceCalculator
from cheapertraining.influence.model_access import to_device
from cheapertraining.influence.offline.job import LoadedModel, ScoringJob
from cheapertraining.influence.offline.rows import ShardSet, SplitRows
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.scorers.consumers import Projected, Projection
from cheapertraining.influence.scorers.hook import run_pass
from cheapertraining.influence.scorers.units import Units

__all__ = ["MODEL_KEYS", "PreparedCalculator", "Projector", "projected_probes"]

MODEL_KEYS = ("input_ids", "labels", "position_ids")
"""What of a batch the model sees."""


class PreparedCalculator(InfluenceCalculator):
    """The calculator of a job's estimator, over the whole of each probe, whose directions are made once and kept.

    Args:
        job: of the run.
        loaded: model, and the optimizer that ``adam`` asks for.
        probes: by name.
    """

    def __init__(self, job: ScoringJob, loaded: LoadedModel, probes: Mapping[str, ShardSet]) -> None:
        if job.estimator == "adam" and loaded.optimizer is None:
            raise UserError(
                "--estimator adam: expected a checkpoint with the second moments of its optimizer, found a model "
                "without. Name a checkpoint of a run (runs/<name>/checkpoints/….pt), or use another estimator."
            )
        super().__init__(
            loaded.model,
            {name: _loader([probe], 1, job.batch_size) for name, probe in probes.items()},
            job.estimator,
            scorer=cast(Literal["hook", "forward"], job.scorer),
            layers=job.layers,
            by=job.unit,
            probe_samples=max((probe.samples for probe in probes.values()), default=1),
            optimizer=loaded.optimizer,
        )
        self._job = job

    def prepare(self, loaded: LoadedModel, sets: Sequence[ShardSet]) -> Directions:
        """Directions as the estimator wants them, its curvature fitted on rows that are spread over the shards."""
        every = max(1, sum(shard_set.samples for shard_set in sets) // self._job.fit_samples)
        self.fit(_loader(sets, every, self._job.batch_size))
        return self.refresh(microbatch_size=self._job.batch_size)

    def take(self, directions: Directions) -> None:
        """Score along these, which another process prepared."""
        self._directions = directions


class Projector:
    """Low-rank gradients of the units of a batch, in place of scores: ``[N, D]``, parameter after parameter.

    Args:
        job: gives layers, rank and seed.
        model: whose gradients.
        by: what a unit is.

    Raises:
        UserError: the layers have no matrix.
    """

    def __init__(self, job: ScoringJob, model: nn.Module, by: By) -> None:
        selected = select_parameters(model, job.layers)
        self.projection = Projection.random(selected, job.rank, job.seed)
        if not self.projection.left:
            raise UserError(
                f"--layers: expected at least one matrix for --estimator {job.estimator}, found only "
                f"{', '.join(list(selected)[:3])}. Choose layers with matrices."
            )
        self._parameters = {name: selected[name] for name in self.projection.left}
        self._model = model
        self._by: By = by

    def __call__(self, batch: Batch) -> SampleScores:
        """The projected gradients of the units' summed losses, with tokens and losses."""
        device = next(iter(self._parameters.values())).device
        placed = to_device(batch, device)
        consumer = Projected(self.projection)
        found = run_pass(self._model, self._parameters, placed, Units(placed, self._by, device), consumer)
        together = torch.cat([consumer.found[name] for name in self.projection.left], dim=1)
        return SampleScores(together, found.tokens, found.losses)


def projected_probes(job: ScoringJob, loaded: LoadedModel, probes: Mapping[str, ShardSet]) -> torch.Tensor:
    """Projected gradient of the token-mean loss of each probe, float64 ``[K, D]``.

    Raises:
        UserError: a probe in which nothing is predicted.
    """
    projector, rows = Projector(job, loaded.model, "sample"), []
    for name, probe in probes.items():
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for batch in _loader([probe], 1, job.batch_size):
            found = projector(batch)
            total = total + found.scores.double().sum(dim=0).cpu()
            tokens += int(found.tokens.sum())
        if tokens == 0:
            raise UserError(
                f"--probe {name}: expected tokens that count in the loss, found all labels masked in {probe.folder}. "
                "Name another folder, or make it anew."
            )
        rows.append(total / tokens)
    return torch.stack(rows)


def _loader(sets: Sequence[ShardSet], every: int, batch_size: int) -> DataLoader[Any]:
    """Every so many-th row of the shards, in order."""
    rows = _Joined([SplitRows(shard_set, every) for shard_set in sets])
    return DataLoader(rows, batch_size, collate_fn=cast(Any, _together), generator=torch.Generator())


class _Joined(ConcatDataset[Any]):
    """Rows of several shard sets; ones with and without a loss mask may come together."""

    def __getitems__(self, samples: Sequence[int]) -> list[Batch]:
        return [collate(self[sample]) for sample in samples]


def _together(rows: Sequence[Batch]) -> Batch:
    return {key: torch.cat([row[key] for row in rows]) for key in MODEL_KEYS}
