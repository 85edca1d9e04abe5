"""What to score, and how: the settings of a scoring run, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.calculator import ESTIMATORS as IN_MEMORY
from cheapertraining.influence.offline.rows import ShardSet
from cheapertraining.influence.parameters import Layers
from cheapertraining.influence.preconditioners import FITTED

__all__ = ["ESTIMATORS", "LoadModel", "LoadedModel", "ScoringJob", "check_model", "identity_of"]

By = Literal["sample", "document", "source"]

STORED = {"logra": "influence", "logra_dot": "dot", "logra_cosine": "cosine", "logra_self": "self"}
"""Estimators over projected gradients, and what they ask of the store."""
PROBELESS = ("self", "logra_self")
ESTIMATORS = (*IN_MEMORY, *STORED)
SCORERS = ("hook", "forward")
BYS = ("sample", "document", "source")
_FORWARD = tuple(name for name in IN_MEMORY if name not in ("cosine", "self"))
RESERVED = ("source", "sample_id", "document", "tokens", "loss", "samples")


@dataclass(frozen=True)
class LoadedModel:
    """A model to score with.

    Attributes:
        model: in float32, on its device.
        vocabulary: token ids that it knows.
        positions: longest row that it takes; None: any.
        optimizer: with the state it had when the model was saved; None where none was saved.
    """

    model: nn.Module
    vocabulary: int
    positions: int | None = None
    optimizer: torch.optim.Optimizer | None = None


LoadModel = Callable[[Path, torch.device], LoadedModel]
"""Loads a model from a path to a device. With several processes it must be picklable."""


@dataclass(frozen=True)
class ScoringJob:
    """A scoring run.

    Attributes:
        models: folders or checkpoints, at least one; with several, scores are averaged (TracIn).
        shards: shard folders, or folders that hold such.
        probes: shard folder of each probe, by name; none for ``self`` and ``logra_self``.
        out: the parquet file to write.
        estimator: one of :data:`ESTIMATORS`.
        scorer: ``hook``, exact; or ``forward``, one more forward pass a direction, for any model.
        layers: which parameters count.
        by: what gets a score: rows, documents in them, or whole shard folders (token-weighted means, with errors).
        batch_size: rows in a pass. Part of the result's last digits, since neighbours share matrix products.
        processes: that share the work; on a CPU each has the threads that OMP_NUM_THREADS says, default 1.
        fit_samples: rows, spread over all shards, that curvature is fitted on.
        rank: of the two-sided projection of the ``logra`` estimators.
        seed: of the projection.
        store: folder of the projected gradients, kept for other probes; default one that is removed at the end.
        store_dtype: ``float32`` or ``float16``.
        damping: of the ``logra`` estimators, see :meth:`~cheapertraining.influence.store.GradientStore.solve`.
        device: ``cpu``, ``cuda``; default the GPU where there is one (process i takes GPU i modulo their number).
        resume: go on with what was begun, or leave alone what is finished.
        overwrite: begin anew where something is already.

    Raises:
        UserError: a setting that is unknown or does not go with another.
    """

    models: Sequence[Path]
    shards: Sequence[Path]
    probes: Mapping[str, Path]
    out: Path
    estimator: str = "dot"
    scorer: str = "hook"
    layers: Layers = "all"
    by: str = "sample"
    batch_size: int = 8
    processes: int = 1
    fit_samples: int = 256
    rank: int = 8
    seed: int = 0
    store: Path | None = None
    store_dtype: str = "float32"
    damping: float = 0.1
    device: str | None = None
    resume: bool = False
    overwrite: bool = False
    columns: tuple[str, ...] = field(init=False)
    """Names of the score columns: the probes', or that of the estimator where it needs none."""

    def __post_init__(self) -> None:
        _one_of("--estimator", self.estimator, ESTIMATORS)
        _one_of("--scorer", self.scorer, SCORERS)
        _one_of("--by", self.by, BYS)
        for option, value in (
            ("--batch-size", self.batch_size),
            ("--processes", self.processes),
            ("--fit-samples", self.fit_samples),
            ("--rank", self.rank),
        ):
            if value < 1:
                raise UserError(f"{option}: expected at least 1, found {value}.")
        if self.resume and self.overwrite:
            raise UserError("--resume, --overwrite: expected one of them at most, found both.")
        if not self.models:
            raise UserError("--model: expected at least one model folder or checkpoint, found none.")
        if self.scorer == "forward" and self.estimator not in _FORWARD:
            raise UserError(
                f"--scorer forward: expected an estimator that needs no norms ({', '.join(_FORWARD)}), found "
                f"{self.estimator}. Use --scorer hook."
            )
        self._check_probes()
        object.__setattr__(self, "columns", ("self",) if self.estimator in PROBELESS else tuple(self.probes))

    def _check_probes(self) -> None:
        if self.estimator in PROBELESS:
            if self.probes:
                raise UserError(f"--estimator {self.estimator}: expected no probe, found {', '.join(self.probes)}.")
            return
        if not self.probes:
            raise UserError(
                "--probe: expected at least one probe to score for, found none. Name it: --probe NAME=FOLDER."
            )
        for name in self.probes:
            taken = name in RESERVED or (name.endswith("_error") and name.removesuffix("_error") in self.probes)
            if taken:
                raise UserError(f"--probe: '{name}' is a column of the scores already. Give the probe another name.")

    @property
    def parts_folder(self) -> Path:
        """Where unfinished work lies: beside the output, hidden."""
        return self.out.with_name(f".{self.out.name}.parts")

    @property
    def unit(self) -> Literal["sample", "document"]:
        """What is computed one by one; sources are means over samples."""
        return "document" if self.by == "document" else "sample"

    def process_device(self, process: int = 0) -> torch.device:
        """The device of a process."""
        kind = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device: {kind} was asked for, but torch finds no CUDA device. Use --device cpu.")
        return torch.device("cuda", process % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)


def identity_of(
    job: ScoringJob, sets: Sequence[ShardSet], probes: Mapping[str, ShardSet], fingerprint: str
) -> dict[str, Any]:
    """What decides the scores of one checkpoint, JSON-able: a run that goes on must have the same."""
    identity: dict[str, Any] = {
        "model": fingerprint,
        "estimator": job.estimator,
        "scorer": job.scorer,
        "layers": job.layers if isinstance(job.layers, str) else list(job.layers),
        "by": job.by,
        "batch_size": job.batch_size,
        "shards": {shard_set.name: shard_set.digest for shard_set in sets},
        "probes": {name: probe.digest for name, probe in probes.items()},
    }
    if job.estimator in FITTED:
        identity["fit_samples"] = job.fit_samples
    if job.estimator in STORED:
        identity |= {"rank": job.rank, "seed": job.seed, "damping": job.damping, "store_dtype": job.store_dtype}
    return identity


def check_model(path: Path, loaded: LoadedModel, sets: Sequence[ShardSet]) -> None:
    """Refuse shards that a model cannot read.

    Raises:
        UserError: they have more token ids or longer rows than the model.
    """
    for shard_set in sets:
        if shard_set.meta.vocab_size > loaded.vocabulary:
            raise UserError(
                f"{shard_set.folder}: expected token ids below the model's vocabulary of {loaded.vocabulary} ({path}), "
                f"found shards of {shard_set.meta.vocab_size}. Score with a model of the same tokenizer."
            )
        if loaded.positions is not None and shard_set.meta.seq_len > loaded.positions:
            raise UserError(
                f"{shard_set.folder}: expected rows of up to {loaded.positions} tokens, as the model's ({path}), found "
                f"{shard_set.meta.seq_len}. Make shorter rows, or score with another model."
            )


def _one_of(option: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise UserError(f"{option}: expected one of {', '.join(options)}, found '{value}'.{nearest(value, options)}")
