"""One checkpoint: its directions, and the scores of batches along them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from cheapertraining.data.collate import Batch, collate
from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By, unit_index
from cheapertraining.influence.model_access import no_trace, to_device, unit_losses
from cheapertraining.influence.offline.job import FITTED, STORED, LoadedModel, ScoringJob
from cheapertraining.influence.offline.rows import ShardSet, SplitRows
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.store import GradientStore, Parts, Records, StoreMode, part_dtype

__all__ = ["Checkpoint", "score_part"]

BatchScorer = Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Of each unit of a batch: numbers float64 ``[N, K]``, tokens int64 ``[N]``, summed losses float64 ``[N]``."""


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk of one checkpoint's part of a run; cheap to hand to another process.

    Attributes:
        identity: what decides its scores.
        folder: of what is prepared once and used by all processes.
        parts: of scores; or of projected gradients, those of ``store``.
        store: projected gradients, for the estimators that use them.
    """

    identity: dict[str, Any]
    folder: Path
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
        parameters = select_parameters(loaded.model, job.layers)
        if job.estimator not in STORED:
            checkpoint = cls(identity, folder, scores, None)
        else:
            projection = _projection(job, parameters)
            widths = dict.fromkeys(projection.left, job.rank**2)
            of_store = {key: identity[key] for key in ("model", "by", "batch_size", "shards")}
            of_store |= {"projection_rank": job.rank, "projection_seed": job.seed}
            place = folder / "store" if job.store is None else job.store / name
            store = GradientStore(place, widths, parts, of_store, dtype=job.store_dtype)
            checkpoint = cls(identity, folder, store.parts, store)
        if probes and not checkpoint._prepared.is_file():
            checkpoint._prepare(job, loaded, parameters, sets, probes)
        return checkpoint

    @property
    def _prepared(self) -> Path:
        return self.folder / "directions.pt"

    def _prepare(
        self,
        job: ScoringJob,
        loaded: LoadedModel,
        parameters: Mapping[str, nn.Parameter],
        sets: Sequence[ShardSet],
        probes: Mapping[str, ShardSet],
    ) -> None:
        """Save directions, or projected gradients, of all probes: once, so that all processes use the same numbers."""
        content: dict[str, torch.Tensor]
        if self.store is not None:
            content = {"projected": _projected_probes(job, loaded, parameters, probes)}
        else:
            directions = _preconditioned(job, loaded, parameters, sets, _gradients(job, loaded, parameters, probes))
            content = _normalized(directions) if job.estimator == "cosine" else directions.tensors
        unfinished = self._prepared.with_name(f".directions.{os.getpid()}.unfinished")
        torch.save({name: tensor.cpu() for name, tensor in content.items()}, unfinished)
        os.replace(unfinished, self._prepared)

    def _load(self, device: torch.device) -> dict[str, torch.Tensor]:
        return cast("dict[str, torch.Tensor]", torch.load(self._prepared, map_location=device, weights_only=True))

    def scorer(self, job: ScoringJob, loaded: LoadedModel) -> BatchScorer:
        """What computes the numbers of :attr:`parts` for a batch."""
        model, by = loaded.model, job.unit
        parameters = select_parameters(model, job.layers)
        device = next(iter(parameters.values())).device
        if self.store is not None:
            return _projector(model, _projection(job, parameters), by)
        if job.estimator == "self":
            return _norms(model, parameters, by)
        directions = Directions(job.columns, self._load(device))
        if job.scorer == "forward":
            return _forward(model, directions, by)
        return _hook(model, parameters, directions, by, cosine=job.estimator == "cosine")

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
    scorer: BatchScorer, batches: Iterable[Batch], by: By, dtype: np.dtype[Any], advance: Callable[[int], None]
) -> Records:
    """The records of a part; padding is no document. ``advance`` is told of the rows of each batch."""
    scored = []
    for batch in batches:
        values, tokens, losses = (part.cpu().numpy() for part in scorer(batch))
        row, document, kept = _places(batch, by)
        records = np.zeros(len(values), dtype)
        records["source"] = batch["source"].numpy()[row]
        records["sample_id"] = batch["sample_id"].numpy()[row]
        records["document"] = document
        records["tokens"], records["loss"] = tokens, losses
        with np.errstate(over="ignore"):  # infinity is refused when the part is written
            records["values"] = values
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


# ---- what makes directions ---------------------------------------------------------------------------------
def _gradients(
    job: ScoringJob, loaded: LoadedModel, parameters: Mapping[str, nn.Parameter], probes: Mapping[str, ShardSet]
) -> Directions:
    """Gradient of the token-mean loss of each probe."""
    from cheapertraining.influence.probes import ProbeBank

    loaders = {name: _loader([probe], 1, job.batch_size) for name, probe in probes.items()}
    bank = ProbeBank(loaders, samples=max(probe.samples for probe in probes.values()))
    with no_trace(loaded.model):
        directions, losses = bank.directions(loaded.model, 0, parameters, job.batch_size)
    for name, found in losses.items():
        _check_probe(name, probes[name], float(found.tokens.sum()))
    return directions


def _check_probe(name: str, probe: ShardSet, tokens: float) -> None:
    if tokens == 0:
        raise UserError(
            f"--probe {name}: expected tokens that count in the loss, found all labels masked in {probe.folder}. Name "
            "another folder, or make it anew."
        )


def _preconditioned(
    job: ScoringJob,
    loaded: LoadedModel,
    parameters: Mapping[str, nn.Parameter],
    sets: Sequence[ShardSet],
    directions: Directions,
) -> Directions:
    """Directions as the estimator wants them."""
    from cheapertraining.influence import preconditioners as known

    if job.estimator == "adam":
        if loaded.optimizer is None:
            raise UserError(
                "--estimator adam: expected a checkpoint with the optimizer's state, found a model without. Name a "
                "checkpoint of a run (runs/<name>/checkpoints/….pt)."
            )
        return known.Adam(parameters, loaded.optimizer).apply(directions)
    if job.estimator not in FITTED:
        return directions
    every = max(1, sum(shard_set.samples for shard_set in sets) // job.fit_samples)
    device = next(iter(parameters.values())).device
    batches = [to_device(batch, device) for batch in _loader(sets, every, job.batch_size)]
    kinds = {"datainf": "DataInf", "layer_scale": "LayerScale", "kfac": "KFAC", "ekfac": "EKFAC"}
    kind = getattr(known, kinds[job.estimator])
    fitted = kind(parameters).fit(loaded.model, batches)
    return cast(Directions, fitted.apply(directions))


def _normalized(directions: Directions) -> dict[str, torch.Tensor]:
    """Directions of length 1; one of zeros stays."""
    squares = sum(tensor.double().flatten(1).square().sum(1) for tensor in directions.tensors.values())
    length = torch.as_tensor(squares).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        name: (tensor.double() / length.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)
        for name, tensor in directions.tensors.items()
    }


def _loader(sets: Sequence[ShardSet], every: int, batch_size: int) -> DataLoader[Any]:
    """Every so many-th row of the shards, in order."""
    rows = _Joined([SplitRows(shard_set, every) for shard_set in sets])
    return DataLoader(rows, batch_size, collate_fn=cast(Any, _collate_all), generator=torch.Generator())


class _Joined(ConcatDataset[Any]):
    """Rows of several shard sets; ones with and without a loss mask may come together."""

    def __getitems__(self, samples: Sequence[int]) -> list[Batch]:
        return [collate(self[sample]) for sample in samples]


def _collate_all(rows: Sequence[Batch]) -> Batch:
    keys = ("input_ids", "labels", "position_ids")
    return {key: torch.cat([row[key] for row in rows]) for key in keys}


# ---- what scores batches -----------------------------------------------------------------------------------
def _inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return to_device({key: batch[key] for key in ("input_ids", "labels", "position_ids")}, device)


def _hook(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], directions: Directions, by: By, *, cosine: bool
) -> BatchScorer:
    from cheapertraining.influence.scorers.hook import hook_norms, hook_scores

    device = next(iter(directions.tensors.values())).device

    def score(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = _inputs(batch, device)
        found = hook_scores(model, directions, inputs, by=by)
        values = found.scores.double()
        if cosine:
            norms = hook_norms(model, parameters, inputs, by=by).double().sqrt()
            values = values / norms.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        return values, found.tokens, found.losses

    return score


def _forward(model: nn.Module, directions: Directions, by: By) -> BatchScorer:
    from cheapertraining.influence.scorers.forward import forward_scores

    device = next(iter(directions.tensors.values())).device

    def score(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = forward_scores(model, directions, _inputs(batch, device), by=by)
        return found.scores.double(), found.tokens, found.losses

    return score


def _norms(model: nn.Module, parameters: Mapping[str, nn.Parameter], by: By) -> BatchScorer:
    from cheapertraining.influence.scorers.hook import hook_norms

    device = next(iter(parameters.values())).device

    def score(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = _inputs(batch, device)
        return hook_norms(model, parameters, inputs, by=by).double()[:, None], *_losses(model, inputs, by)

    return score


def _projector(model: nn.Module, projection: Any, by: By) -> BatchScorer:
    from cheapertraining.influence.scorers.hook import hook_projected

    device = next(iter(projection.left.values())).device

    def score(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = _inputs(batch, device)
        found = hook_projected(model, projection, inputs, by=by)
        return torch.cat([found[name] for name in projection.left], dim=1).double(), *_losses(model, inputs, by)

    return score


def _losses(model: nn.Module, inputs: Mapping[str, torch.Tensor], by: By) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and summed losses of the units."""
    with no_trace(model), torch.no_grad():
        losses, tokens = unit_losses(model, inputs, by)
    return tokens, losses


def _projection(job: ScoringJob, parameters: Mapping[str, nn.Parameter]) -> Any:
    from cheapertraining.influence.scorers.consumers import Projection

    projection = Projection.random(parameters, job.rank, job.seed)
    if not projection.left:
        raise UserError(
            f"--layers: expected at least one matrix for --estimator {job.estimator}, found only "
            f"{', '.join(list(parameters)[:3])}. Choose layers with matrices."
        )
    return projection


def _projected_probes(
    job: ScoringJob, loaded: LoadedModel, parameters: Mapping[str, nn.Parameter], probes: Mapping[str, ShardSet]
) -> torch.Tensor:
    """Projected gradient of the token-mean loss of each probe, float64 ``[K, D]``."""
    projected = _projector(loaded.model, _projection(job, parameters), "sample")
    rows = []
    for name, probe in probes.items():
        found = [projected(batch) for batch in _loader([probe], 1, job.batch_size)]
        tokens = sum(int(tokens.sum()) for _, tokens, _ in found)
        _check_probe(name, probe, tokens)
        rows.append(torch.stack([values.sum(dim=0) for values, _, _ in found]).sum(dim=0) / tokens)
    return torch.stack(rows).cpu()
