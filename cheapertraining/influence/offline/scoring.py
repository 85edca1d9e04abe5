"""One checkpoint: its directions, and the scores of batches along them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from cheapertraining.data.collate import Batch
from cheapertraining.influence.aggregation import By, unit_index
from cheapertraining.influence.offline.directions import MODEL_KEYS, PreparedCalculator, Projector, projected_probes
from cheapertraining.influence.offline.job import STORED, LoadedModel, ScoringJob
from cheapertraining.influence.offline.rows import ShardSet
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.store import GradientStore, Parts, Records, StoreMode, part_dtype

__all__ = ["Checkpoint", "score_part"]


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk of one checkpoint's part of a run; cheap to hand to another process.

    Attributes:
        identity: what decides its scores.
        folder: of what is prepared once and used by all processes.
        probes: by name.
        parts: of scores; or of projected gradients, those of ``store``.
        store: projected gradients, for the estimators that use them.
    """

    identity: dict[str, Any]
    folder: Path
    probes: dict[str, ShardSet]
    parts: Parts
    store: GradientStore | None

    @classmethod
    def prepare(
        cls,
        job: ScoringJob,
        number: int,
        loaded: LoadedModel,
        sets: Sequence[ShardSet],
        probes: Mapping[str, ShardSet],
        parts: int,
        identity: dict[str, Any],
    ) -> Checkpoint:
        """Find what an earlier run left, or begin; and have the probes' directions on disk.

        Args:
            job: of the run.
            number: of the checkpoint.
            loaded: its model.
            sets: shards to score.
            probes: by name.
            parts: number of parts of the shards.
            identity: see :func:`~cheapertraining.influence.offline.job.identity_of`.

        Raises:
            UserError: what is there is another run's, layers that match nothing, bad probes.
        """
        name = f"checkpoint-{number}"
        folder = job.parts_folder / name
        scores = Parts(folder, parts, part_dtype(len(job.columns)), identity)
        if job.estimator not in STORED:
            checkpoint = cls(identity, folder, dict(probes), scores, None)
        else:
            widths = dict.fromkeys(Projector(job, loaded.model, job.unit).projection.left, job.rank**2)
            of_store = {key: identity[key] for key in ("model", "by", "batch_size", "shards")}
            of_store |= {"projection_rank": job.rank, "projection_seed": job.seed}
            place = folder / "store" if job.store is None else job.store / name
            store = GradientStore(place, widths, parts, of_store, dtype=job.store_dtype)
            checkpoint = cls(identity, folder, dict(probes), store.parts, store)
        if probes and not checkpoint._prepared.is_file():
            checkpoint._prepare(job, loaded, sets)
        return checkpoint

    @property
    def _prepared(self) -> Path:
        return self.folder / "directions.pt"

    def _prepare(self, job: ScoringJob, loaded: LoadedModel, sets: Sequence[ShardSet]) -> None:
        """Save directions, or projected gradients, of all probes: once, so that all processes use the same numbers."""
        content: dict[str, torch.Tensor]
        if self.store is not None:
            content = {"projected": projected_probes(job, loaded, self.probes)}
        else:
            content = PreparedCalculator(job, loaded, self.probes).prepare(loaded, sets).tensors
        unfinished = self._prepared.with_name(f".directions.{os.getpid()}.unfinished")
        torch.save({name: tensor.cpu() for name, tensor in content.items()}, unfinished)
        os.replace(unfinished, self._prepared)

    def _load(self, device: torch.device) -> dict[str, torch.Tensor]:
        return cast("dict[str, torch.Tensor]", torch.load(self._prepared, map_location=device, weights_only=True))

    def scorer(self, job: ScoringJob, loaded: LoadedModel) -> Callable[[Batch], SampleScores]:
        """What computes the numbers of :attr:`parts` for a batch."""
        if self.store is not None:
            return Projector(job, loaded.model, job.unit)
        calculator = PreparedCalculator(job, loaded, self.probes)
        if self.probes:
            device = next(iter(calculator.parameters.values())).device
            calculator.take(Directions(job.columns, self._load(device)))
        return calculator.score

    def scores(self, job: ScoringJob) -> Iterator[Records]:
        """The scores of each part, in order."""
        if self.store is None:
            yield from (self.parts.read(number) for number in range(self.parts.count))
            return
        probes = None if job.estimator == "logra_self" else self._load(torch.device("cpu"))["projected"]
        mode = cast(StoreMode, STORED[job.estimator])
        waiting: list[Records] = []
        dtype, last = part_dtype(len(job.columns)), 0
        for number, records, values in self.store.scores(probes, mode, damping=job.damping):
            if number != last:
                yield np.concatenate(waiting)
                waiting, last = [], number
            part = np.zeros(len(records), dtype)
            for name in ("source", "sample_id", "document", "tokens", "loss"):
                part[name] = records[name]
            part["values"] = values
            waiting.append(part)
        yield np.concatenate(waiting)


def score_part(
    scorer: Callable[[Batch], SampleScores],
    batches: Iterable[Batch],
    by: By,
    dtype: np.dtype[Any],
    advance: Callable[[int], None],
) -> Records:
    """The records of a part; padding is no document. ``advance`` is told of the rows of each batch."""
    scored = []
    for batch in batches:
        found = scorer({key: batch[key] for key in MODEL_KEYS})
        row, document, kept = _places(batch, by)
        records = np.zeros(len(row), dtype)
        records["source"] = batch["source"].numpy()[row]
        records["sample_id"] = batch["sample_id"].numpy()[row]
        records["document"] = document
        records["tokens"], records["loss"] = found.tokens.cpu().numpy(), found.losses.cpu().numpy()
        with np.errstate(over="ignore"):  # infinity is refused when the part is written
            records["values"] = found.scores.cpu().numpy()
        scored.append(records[kept])
        advance(len(batch["labels"]))
    return np.concatenate(scored)


def _places(batch: Batch, by: By) -> tuple[Any, Any, Any]:
    """Of each unit: its row in the batch, its number within the row, and whether it is more than padding."""
    index, count = unit_index(batch, by)
    flat, length = index.reshape(-1).numpy(), index.shape[1]
    first = np.searchsorted(flat, np.arange(count))
    row = first // length
    kept = np.ones(count, np.bool_)
    if by == "document" and "attention_mask" in batch:
        kept = batch["attention_mask"].reshape(-1).numpy()[first] > 0
    return row, np.arange(count) - index[:, 0].numpy()[row], kept
