"""Shards and a teacher in, its targets out: parts of the work, shared by processes, committed one by one.

Parts and batches depend on the shards and the batch size alone, and draws on the row: the files are the same, byte for
byte, for any number of processes and after any number of kills.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cheapertraining.data.collate import Batch
from cheapertraining.data.shards import INDEX_FILE, META_FILE, index_json, sync_folder, write_samples
from cheapertraining.data.sidecar import SIDECAR_COLUMNS, token_checksum
from cheapertraining.distillation.cache import CACHE_VERSION, CacheMeta, cache_folder, read_cache_meta
from cheapertraining.distillation.cache_job import CacheJob
from cheapertraining.distillation.drawing import draw, uniforms
from cheapertraining.distillation.losses import shifted_mask
from cheapertraining.distillation.packing import Layout, pack_sampled, pack_top
from cheapertraining.distillation.sparse import top_k_targets
from cheapertraining.distillation.targets import TopKTargets
from cheapertraining.distillation.teacher import TeacherWrapper
from cheapertraining.errors import UserError
from cheapertraining.influence.model_access import to_device
from cheapertraining.influence.offline.rows import Part, ShardSet, open_sets, part_batches, plan_parts
from cheapertraining.influence.offline.workers import limited_threads, run_processes
from cheapertraining.influence.store import check_same, read_json, write_whole

__all__ = ["CacheJob", "CacheReport", "cache_teacher"]

_COUNTED = ("samples", "positions", "entries", "record_bytes")
_FILE_BYTES = 1 << 30  # of records in a file; MDS offsets have 32 bits


@dataclass(frozen=True)
class CacheReport:
    """What a run did: rows and positions with targets in the cache, bytes of records, rows of this run, seconds."""

    samples: int
    positions: int
    entries: int
    record_bytes: int
    rows: int
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes of records for each position with targets."""
        return self.record_bytes / max(self.positions, 1)


class _Records(NamedTuple):
    """Records of some rows: indices and checksums of the rows, sizes of the records, the records one after another."""

    samples: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    positions: int
    entries: int
    content: NDArray[np.uint8]


def cache_teacher(job: CacheJob, *, progress: bool = True) -> CacheReport:
    """Write the teacher's targets for every row of the job's shards.

    Raises:
        UserError: bad settings, shards or teacher; something is there already; a part of another job; NaN logits.
    """
    started = time.perf_counter()
    sets = open_sets(job.shards, "--shards")
    with limited_threads():
        metas = _metas(job, sets)
        finished = _make_room(job, metas)
        parts = plan_parts(sets, job.batch_size)
        todo = [number for number, part in enumerate(parts) if part.source not in finished]
        missing = [number for number in todo if not _part_file(job, number).is_file()]
        rows = sum(parts[number].last - parts[number].first for number in missing)
        with _bar(rows, progress) as advance:
            if job.processes == 1:
                _work_on(0, job, sets, metas, parts, missing, advance)
            elif missing:
                shares = [missing[process :: job.processes] for process in range(job.processes)]
                work = [(n, job, sets, metas, parts, share) for n, share in enumerate(shares) if share]
                run_processes(_work_on, work, advance)
        for source, meta in enumerate(metas):
            if source not in finished:
                _assemble(job, sets[source], meta, [(n, p) for n, p in enumerate(parts) if p.source == source])
    shutil.rmtree(job.parts_folder, ignore_errors=True)
    done = [read_cache_meta(_folder(job, shard_set)) for shard_set in sets]
    counts = {key: sum(getattr(meta, key) for meta in done) for key in _COUNTED}
    return CacheReport(**counts, rows=rows, seconds=time.perf_counter() - started)


def _metas(job: CacheJob, sets: Sequence[ShardSet]) -> list[CacheMeta]:
    """What each folder will say of itself, before anything is counted."""
    teacher = job.load()
    for shard_set in sets:
        if shard_set.meta.vocab_size > teacher.vocabulary:
            raise UserError(
                f"{shard_set.folder}: expected token ids below the teacher's vocabulary of {teacher.vocabulary}, found "
                f"shards of {shard_set.meta.vocab_size}. Use a teacher of the same tokenizer."
            )
        teacher.check_context(shard_set.meta.seq_len)
    fingerprint, vocabulary = teacher.fingerprint(), teacher.vocabulary
    sampled = job.kind == "sampled"
    size = job.size or (50 if sampled else 12)
    return [
        CacheMeta(
            format_version=CACHE_VERSION,
            source=each.meta.source,
            split=each.meta.split,
            seq_len=each.meta.seq_len,
            samples=each.samples,
            tokenizer_fingerprint=each.meta.tokenizer_fingerprint,
            shards=each.digest,
            teacher=fingerprint,
            dtype=job.quantization or job.dtype,
            batch_size=job.batch_size,
            kind=job.kind,
            size=Layout(job.kind, size, vocabulary, each.meta.seq_len).size,
            temperature=job.temperature,
            drawing=job.drawing if sampled else None,
            seed=job.seed,
            vocab_size=vocabulary,
        )
        for each in sets
    ]


def _make_room(job: CacheJob, metas: Sequence[CacheMeta]) -> set[int]:
    """Numbers of the folders that are finished; refuse to touch what is there, unless the job says what to do."""
    folders = [job.out / meta.source / meta.split for meta in metas]
    if job.overwrite:
        for folder in [*folders, job.parts_folder]:
            shutil.rmtree(folder, ignore_errors=True)
    if not job.resume:
        for folder in [*folders, job.parts_folder]:
            if folder.exists():
                raise UserError(
                    f"{folder}: expected nothing there, found a cache or an unfinished one. Go on with --resume, begin "
                    "anew with --overwrite, or name another --out."
                )
    finished = set()
    remedy = "Give what it was made with, another --out, or --overwrite."
    for number, (folder, meta) in enumerate(zip(folders, metas, strict=True)):
        if folder.exists():
            check_same(folder, read_cache_meta(folder).identity(), meta.identity(), remedy)
            finished.add(number)
    job.parts_folder.mkdir(parents=True, exist_ok=True)
    identity = {f"{meta.source}/{meta.split}": json.loads(json.dumps(meta.identity())) for meta in metas}
    file = job.parts_folder / META_FILE
    if file.is_file():
        check_same(job.parts_folder, read_json(file), identity, remedy)
    else:
        write_whole(file, json.dumps(identity, indent=2).encode())
    return finished


def _work_on(
    process: int,
    job: CacheJob,
    sets: Sequence[ShardSet],
    metas: Sequence[CacheMeta],
    parts: Sequence[Part],
    numbers: Sequence[int],
    advance: Callable[[int], None],
) -> None:
    """Make some parts and commit them one by one."""
    if not numbers:
        return
    teacher = job.load(process)
    device = job.process_device(process)
    for number in numbers:
        part = parts[number]
        found = []
        for batch in part_batches(sets, part, job.batch_size):
            found.append(_records_of(teacher, to_device(batch, device), sets[part.source], metas[part.source]))
            advance(len(batch["input_ids"]))
        _write_part(_part_file(job, number), found)


def _records_of(teacher: TeacherWrapper, batch: Batch, shard_set: ShardSet, meta: CacheMeta) -> _Records:
    """The records of the rows of one batch."""
    mask = shifted_mask(batch["labels"])
    targets = teacher(batch)
    records, entries = [], 0
    stored = np.dtype(shard_set.meta.token_dtype)
    for row, sample in enumerate(batch["sample_id"].tolist()):
        positions = mask[row].nonzero().squeeze(1)
        logits = targets.rows(row * mask.shape[1] + positions).logits
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise UserError(
                f"teacher {teacher.name}: expected finite logits, found NaN or infinity for row {sample} of "
                f"{shard_set.folder}. Look at its weights, or use --dtype float32."
            )
        record, count = _record(meta, f"{meta.source}/{meta.split}", sample, logits, mask[row].cpu().numpy())
        records.append(np.frombuffer(record, np.uint8))
        entries += count
    tokens = batch["input_ids"].cpu().numpy().astype(stored)
    return _Records(
        batch["sample_id"].cpu().numpy(),
        np.array([token_checksum(row) for row in tokens], np.uint32),
        np.array([len(record) for record in records], np.int64),
        int(mask.sum()),
        entries,
        np.concatenate(records),
    )


def _record(
    meta: CacheMeta, source: str, sample: int, logits: torch.Tensor, mask: NDArray[np.bool_]
) -> tuple[bytes, int]:
    """The record of one row and how many ids are in it, from logits ``[N, V]`` of its positions in ``mask`` ``[S]``."""
    layout = meta.layout
    if meta.drawing is None:
        top: TopKTargets = top_k_targets(logits, layout.size, temperature=meta.temperature)
        ids, logs, tail = (_spread(each.cpu().numpy(), mask) for each in (top.ids, top.log_probs, top.tail))
        return pack_top(layout, ids, logs, tail, mask), layout.size * int(mask.sum())
    # One number a position of the row, whatever is masked: the draws of a row do not depend on its mask.
    numbers = uniforms(meta.seed, source, sample, len(mask), layout.size, meta.drawing)[mask]
    drawn, counts = draw((logits / meta.temperature).log_softmax(dim=-1), numbers)
    return pack_sampled(layout, _spread(drawn, mask), _spread(counts, mask)), int((counts > 0).sum())


def _spread(values: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """``[N, ...]`` at the ``N`` places of ``mask`` ``[S]``, zeros elsewhere: ``[S, ...]``."""
    out = np.zeros((len(mask), *values.shape[1:]), values.dtype)
    out[mask] = values
    return out


def _folder(job: CacheJob, shard_set: ShardSet) -> Path:
    return cache_folder(job.out, shard_set.meta)


def _part_file(job: CacheJob, number: int) -> Path:
    return job.parts_folder / f"part-{number:06}.npz"


def _write_part(file: Path, batches: Sequence[_Records]) -> None:
    columns = ("samples", "checksums", "sizes", "content")
    arrays = {name: np.concatenate([getattr(each, name) for each in batches]) for name in columns}
    counts = np.array([sum(each.positions for each in batches), sum(each.entries for each in batches)])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, counts=counts)
    write_whole(file, buffer.getvalue())


def _read_part(file: Path) -> _Records:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            positions, entries = arrays["counts"].tolist()
            return _Records(
                arrays["samples"], arrays["checksums"], arrays["sizes"], positions, entries, arrays["content"]
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: unreadable ({error}). Remove it and go on with --resume.") from error


def _assemble(job: CacheJob, shard_set: ShardSet, meta: CacheMeta, parts: Sequence[tuple[int, Part]]) -> None:
    """Put the parts of one shard folder together; the folder appears whole or not at all."""
    folder = _folder(job, shard_set)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    positions = ids = size = 0
    for group in _files(job, parts):
        entries.append(write_samples(unfinished, len(entries), _samples(job, group), SIDECAR_COLUMNS))
        for number in group:
            records = _read_part(_part_file(job, number))
            positions, ids, size = positions + records.positions, ids + records.entries, size + len(records.content)
    counted = replace(meta, positions=positions, entries=ids, record_bytes=size)
    (unfinished / META_FILE).write_text(json.dumps(asdict(counted), indent=2) + "\n", encoding="utf-8")
    (unfinished / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")
    sync_folder(unfinished)
    unfinished.rename(folder)


def _files(job: CacheJob, parts: Sequence[tuple[int, Part]]) -> Iterator[list[int]]:
    """Parts that go into one file: those of one shard, fewer where they are large."""
    group: list[int] = []
    shard, size = -1, 0
    for number, part in parts:
        more = _part_file(job, number).stat().st_size
        if group and (part.shard != shard or size + more > _FILE_BYTES):
            yield group
            group, size = [], 0
        group.append(number)
        shard, size = part.shard, size + more
    if group:
        yield group


def _samples(job: CacheJob, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        records = _read_part(_part_file(job, number))
        ends = np.cumsum(records.sizes).tolist()
        rows = zip(records.samples, records.checksums, records.sizes.tolist(), ends, strict=True)
        for sample, checksum, size, end in rows:
            content = records.content[end - size : end].tobytes()
            yield {"crc32": np.uint32(checksum), "record": content, "sample": np.uint64(sample)}


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Rows that are done, with rows a second and the time left, on standard error."""
    from tqdm import tqdm

    with tqdm(total=total, unit=" rows", disable=not shown, mininterval=1.0, dynamic_ncols=True) as bar:

        def advance(rows: int) -> None:
            bar.update(rows)

        yield advance
