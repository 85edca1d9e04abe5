"""Shards in, scores out: parts of the work, shared by processes, committed one by one, put together at the end."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.offline.job import LoadModel, ScoringJob, check_model, identity_of
from cheapertraining.influence.offline.output import (
    average,
    check_finished,
    source_table,
    unit_tables,
    write_parquet,
)
from cheapertraining.influence.offline.rows import Part, ShardSet, check_alike, open_sets, plan_parts
from cheapertraining.influence.offline.scoring import Checkpoint
from cheapertraining.influence.offline.workers import limited_threads, run_workers, work_on
from cheapertraining.influence.store import Records, model_fingerprint

__all__ = ["ScoringReport", "score_shards"]


@dataclass(frozen=True)
class ScoringReport:
    """What a run did.

    Attributes:
        rows: rows of the scores file.
        samples: passes over a row of the shards that this run made, over all checkpoints.
        seconds: wall time, models' loading included.
    """

    rows: int
    samples: int
    seconds: float


def score_shards(job: ScoringJob, load: LoadModel, *, progress: bool = True) -> ScoringReport:
    """Score every row of the job's shards and write ``job.out``.

    The file is the same, byte for byte, for any number of processes, and after any number of kills and resumptions.

    Args:
        job: what to score.
        load: makes a model from a path; picklable where there are several processes.
        progress: show samples, samples a second and the time left on standard error.

    Raises:
        UserError: bad settings, shards, probes or models; something is there already; another run's parts.
    """
    started = time.perf_counter()
    sets, probes = _open(job)
    parts = plan_parts(sets, job.batch_size)
    _make_room(job)
    with limited_threads():
        if job.out.exists():
            rows = check_finished(job.out, _identity(job, sets, probes, load))
            shutil.rmtree(job.parts_folder, ignore_errors=True)
            return ScoringReport(rows, 0, time.perf_counter() - started)
        checkpoints, done = _score(job, sets, probes, parts, load, progress)
        rows = _write(job, sets, parts, checkpoints)
    shutil.rmtree(job.parts_folder)
    return ScoringReport(rows, done, time.perf_counter() - started)


def _open(job: ScoringJob) -> tuple[tuple[ShardSet, ...], dict[str, ShardSet]]:
    sets = open_sets(job.shards, "--shards")
    probes = {}
    for name, folder in job.probes.items():
        found = open_sets([folder], f"--probe {name}")
        if len(found) > 1:
            raise UserError(f"--probe {name}: expected one shard folder, found {len(found)} below {folder}. Name one.")
        probes[name] = found[0]
    check_alike([*sets, *probes.values()])
    return sets, probes


def _make_room(job: ScoringJob) -> None:
    """Refuse to touch what is there, unless the job says what to do with it."""
    if job.out.is_dir():
        raise UserError(
            f"--out: expected a file, found the folder {job.out}. Name a file in it, such as scores.parquet."
        )
    if job.overwrite:
        job.out.unlink(missing_ok=True)
        shutil.rmtree(job.parts_folder, ignore_errors=True)
    if job.resume:
        return
    for found, what in ((job.out, "a file"), (job.parts_folder, "an unfinished run")):
        if found.exists():
            raise UserError(
                f"{job.out}: expected nothing there, found {what} ({found}). Go on with --resume, begin anew with "
                "--overwrite, or name another --out."
            )


def _identity(
    job: ScoringJob, sets: Sequence[ShardSet], probes: Mapping[str, ShardSet], load: LoadModel
) -> dict[str, Any]:
    """What decides the scores of all checkpoints together."""
    prints = [model_fingerprint(load(path, torch.device("cpu")).model) for path in job.models]
    return _joined([identity_of(job, sets, probes, each) for each in prints])


def _joined(identities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {**identities[0], "model": [identity["model"] for identity in identities]}


def _score(
    job: ScoringJob,
    sets: Sequence[ShardSet],
    probes: Mapping[str, ShardSet],
    parts: Sequence[Part],
    load: LoadModel,
    progress: bool,
) -> tuple[list[Checkpoint], int]:
    """Commit every missing part; the checkpoints, and the number of rows passed over."""
    checkpoints: list[Checkpoint] = []
    rows = {number: part.last - part.first for number, part in enumerate(parts)}
    with _bar(len(job.models) * sum(rows.values()), progress) as shown:
        for number, path in enumerate(job.models):
            loaded = load(path, job.process_device())
            check_model(path, loaded, [*sets, *probes.values()])
            identity = identity_of(job, sets, probes, model_fingerprint(loaded.model))
            checkpoint = Checkpoint.prepare(job, number, loaded, sets, probes, len(parts), identity)
            checkpoints.append(checkpoint)
            missing = checkpoint.parts.missing()
            shown.skip(sum(rows.values()) - sum(rows[part] for part in missing))
            if job.processes == 1:
                work_on(job, checkpoint, loaded, sets, parts, missing, shown.advance)
            del loaded
        if job.processes > 1:
            run_workers(job, checkpoints, load, sets, parts, shown.advance)
        return checkpoints, shown.done


def _write(job: ScoringJob, sets: Sequence[ShardSet], parts: Sequence[Part], checkpoints: Sequence[Checkpoint]) -> int:
    """Put the parts together in the order of the shards."""
    by_checkpoint = [checkpoint.scores(job) for checkpoint in checkpoints]
    merged: Iterator[Records] = (average(records) for records in zip(*by_checkpoint, strict=True))
    names = [shard_set.name for shard_set in sets]
    if job.by == "source":
        by_token = "cosine" not in job.estimator and "self" not in job.estimator
        tables: Any = [source_table(merged, names, job.columns, by_token)]
    else:
        tables = unit_tables(merged, names, job.columns, job.unit == "document")
    return write_parquet(job.out, tables, _joined([checkpoint.identity for checkpoint in checkpoints]))


class _Progress:
    """Rows that are done, on a bar that says samples a second and time left."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self.done = 0

    def advance(self, rows: int) -> None:
        """Count rows that this run passed over; the first ones start the clock, loading models is not their cost."""
        if not self.done:
            self._bar.unpause()
        self.done += rows
        self._bar.update(rows)

    def skip(self, rows: int) -> None:
        """Count rows that an earlier run passed over: they are not part of the rate."""
        if not self._bar.disable:
            self._bar.initial += rows
            self._bar.n += rows


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[_Progress]:
    from tqdm import tqdm

    with tqdm(total=total, unit=" samples", disable=not shown, mininterval=1.0, dynamic_ncols=True) as bar:
        yield _Progress(bar)
