"""Phase 2: the rows of all windows, in order, to shards of equal size; then the index, and the merging of parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.conversion.job import DONE_FILE, Job, write_json
from cheapertraining.data.conversion.windows import Window, committed_windows, disk_errors
from cheapertraining.data.rows import TokenRows, slice_rows
from cheapertraining.data.shards import (
    DOCUMENTS_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    META_FILE,
    ShardMeta,
    index_json,
    meta_json,
    rows_in_shard,
    write_shard,
)
from cheapertraining.errors import UserError

__all__ = ["ShardTask", "finish_part", "merge_parts", "plan_shards", "write_planned_shard"]


@dataclass(frozen=True)
class ShardTask:
    """Shard ``number`` of a split: runs of rows ``(window folder, first row, last row)``."""

    split: str
    number: int
    runs: tuple[tuple[Path, int, int], ...]


def plan_shards(job: Job) -> list[ShardTask]:
    """Which rows go into which shard.

    Raises:
        UserError: a split has no document.
    """
    found = _windows(job)
    tasks: list[ShardTask] = []
    for split, share in job.settings.splits:
        own = [window for window in found if split in window.splits]
        if not own and job.settings.part[1] == 1:
            documents = sum(window.documents for window in found)
            raise UserError(
                f"split '{split}': none of the {documents} documents with text fell into its share of {share:g}, and "
                "an empty source cannot be sampled. Give more input, or the split a larger share."
            )
        ends = np.cumsum([0, *(window.splits[split]["rows"] for window in own)]).tolist()
        size = rows_in_shard(_meta(job, split, own), job.settings.shard_bytes)
        for number, first in enumerate(range(0, ends[-1], size)):
            last = min(first + size, ends[-1])
            runs = [
                (window.folder, max(first, begin) - begin, min(last, end) - begin)
                for window, (begin, end) in zip(own, pairwise(ends), strict=True)
                if begin < last and end > first
            ]
            tasks.append(ShardTask(split, number, tuple(runs)))
    return tasks


def write_planned_shard(job: Job, task: ShardTask) -> None:
    """Write a shard, bring it to its destination, and keep its entry of the index; nothing where that is done."""
    entry_file = _entry_file(job, task.split, task.number)
    if entry_file.is_file():
        return
    number, count = job.settings.part
    prefix = "shard" if count == 1 else f"part-{number:04}"
    folder = job.work / "shards" / task.split
    with disk_errors(job):
        folder.mkdir(parents=True, exist_ok=True)
        entry = write_shard(
            folder,
            task.number,
            _rows_of(task),
            _meta(job, task.split, []).columns,
            prefix=prefix,
            compression=job.settings.compression,
            hashes=job.settings.hashes,
        )
        for kind in ("raw_data", "zip_data"):
            info = entry.get(kind)
            if info and (folder / info["basename"]).is_file():
                job.destination.put(folder / info["basename"], f"{task.split}/{info['basename']}")
        write_json(entry_file, entry)


def finish_part(job: Job) -> dict[str, ShardMeta]:
    """Write this part's share of the index; where there is only one part, merge it at once."""
    metas: dict[str, ShardMeta] = {}
    shards: dict[str, list[dict[str, Any]]] = {}
    found = _windows(job)
    for split, _ in job.settings.splits:
        own = [window for window in found if split in window.splits]
        documents = job.work / f"{split}.{DOCUMENTS_FILE}"
        with disk_errors(job), documents.open("wb") as handle:
            for window in own:
                handle.write(window.document_hashes(split).astype("<u8").tobytes())
        metas[split] = _meta(job, split, own)
        count = -(-metas[split].samples // rows_in_shard(metas[split], job.settings.shard_bytes))
        files = [_entry_file(job, split, number) for number in range(count)]
        shards[split] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        job.destination.put(documents, f"{job.part_name}/{split}.{DOCUMENTS_FILE}")
    content = {
        "job": job.describe(),
        "meta": {split: asdict(meta) for split, meta in metas.items()},
        "shards": shards,
    }
    local = job.work / DONE_FILE
    with disk_errors(job):
        write_json(local, content)
    job.destination.put(local, f"{job.part_name}/{DONE_FILE}")
    return merge_parts(job.destination.root) if job.settings.part[1] == 1 else metas


def merge_parts(out: str) -> dict[str, ShardMeta]:
    """Make one shard folder a split of the parts that machines have put under ``out`` (``--part i/n``).

    Shards stay where they are; the index is written last. Returns the metas by split.

    Raises:
        UserError: no parts, a part is missing, or parts of different conversions.
    """
    destination = Destination(out)
    parts = _read_parts(destination)
    splits = list(parts[0][1]["meta"])
    metas: dict[str, ShardMeta] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for split in splits:
            digest = hashlib.sha256()
            with (folder / DOCUMENTS_FILE).open("wb") as handle:
                for part, _ in parts:
                    hashes = destination.get(f"{part}/{split}.{DOCUMENTS_FILE}") or b""
                    digest.update(hashes)
                    handle.write(hashes)
            entries = [entry for _, content in parts for entry in content["shards"][split]]
            if not entries:
                raise UserError(f"{out}: no part has a document of split '{split}'. Give the split a larger share.")
            own = [ShardMeta(**content["meta"][split]) for _, content in parts]
            metas[split] = replace(_sum(own), input_hash=digest.hexdigest())
            (folder / META_FILE).write_text(meta_json(metas[split]), encoding="utf-8")
            (folder / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")
            for file in (DOCUMENTS_FILE, META_FILE, INDEX_FILE):
                _put(destination, folder / file, f"{split}/{file}")
        (folder / DONE_FILE).write_text(json.dumps({"job": parts[0][1]["job"]}, indent=1), encoding="utf-8")
        _put(destination, folder / DONE_FILE, DONE_FILE)
    destination.remove(".parts")
    return metas


def _put(destination: Destination, file: Path, name: str) -> None:
    """Put a file that lies on another file system, perhaps: through a neighbour of its final place."""
    if destination.is_remote:
        destination.put(file, name)
        return
    target = Path(destination.root, name)
    neighbour = target.with_name(f".{target.name}.unfinished")
    neighbour.write_bytes(file.read_bytes())
    destination.put(neighbour, name)


def _read_parts(destination: Destination) -> list[tuple[str, dict[str, Any]]]:
    found = sorted(name for name in destination.names(".parts") if name.endswith(DONE_FILE))
    if not found:
        raise UserError(f"{destination.root}: no parts to merge. Make them with --part 1/n … n/n and this --out.")
    parts = [(name.rsplit("/", 1)[0], json.loads(destination.get(name) or b"{}")) for name in found]
    count = parts[0][1]["job"]["settings"]["part"][1]
    numbers = [content["job"]["settings"]["part"][0] for _, content in parts]
    counts = {content["job"]["settings"]["part"][1] for _, content in parts}
    if len(counts) > 1:
        raise UserError(
            f"{destination.root}/.parts: parts of divisions into {' and '.join(map(str, sorted(counts)))}. "
            "Remove those that are not wanted."
        )
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        names = ", ".join(f"{number}/{count}" for number in missing)
        raise UserError(f"{destination.root}: {len(numbers)} of {count} parts are finished, missing: {names}.")
    for name, content in parts[1:]:
        for key, value in _comparable(parts[0][1]).items():
            if _comparable(content)[key] != value:
                raise UserError(
                    f"{destination.root}/{name}: its {key} differs from {parts[0][0]}: {_comparable(content)[key]} "
                    f"and {value}. Make all parts with the same command."
                )
    return parts


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    job = content["job"]
    settings = {key: value for key, value in job["settings"].items() if key != "part"}
    return settings | {"encoder": job["encoder"], "tokenizer": job["tokenizer"], "inputs": job["inputs"]}


def _meta(job: Job, split: str, own: list[Window]) -> ShardMeta:
    settings = job.settings
    tokenizer = job.encoder.tokenizer

    def total(key: str) -> int:
        return sum(window.splits[split][key] for window in own)

    return ShardMeta(
        format_version=FORMAT_VERSION,
        source=settings.source,
        split=split,
        seq_len=settings.seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        token_dtype=job.token_dtype,
        packing=settings.packing,
        samples=total("rows"),
        documents=total("documents"),
        tokens=total("tokens"),
        padding=total("rows") * settings.seq_len - total("tokens"),
        cut_documents=total("cut_documents"),
        input_hash="",
        license=settings.license,
        origin=settings.origin,
        loss_tokens=total("loss_tokens") if job.encoder.masked else None,
    )


def _sum(metas: list[ShardMeta]) -> ShardMeta:
    counted = ("samples", "documents", "tokens", "padding", "cut_documents")
    sums = {name: sum(getattr(meta, name) for meta in metas) for name in counted}
    if metas[0].loss_tokens is not None:
        sums["loss_tokens"] = sum(meta.loss_tokens or 0 for meta in metas)
    return replace(metas[0], **sums)


def _windows(job: Job) -> list[Window]:
    """All windows of this part, in order."""
    return [window for number in job.my_pieces for window in committed_windows(job, number)]


def _entry_file(job: Job, split: str, number: int) -> Path:
    return job.work / "shards" / f"{split}.{number:05}.json"


def _rows_of(task: ShardTask) -> Iterator[TokenRows]:
    for folder, first, last in task.runs:
        yield slice_rows(Window(folder, {}).rows(task.split), first, last)
