"""Whether shard folders are what they say: every file against its hashes, every sample against the schema."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.shard_files import (
    FileEntry,
    LayoutError,
    RowChunk,
    ShardEntry,
    ShardRows,
    find_shard_folders,
    read_index,
)
from cheapertraining.data.shards import (
    DOCUMENTS_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    META_FILE,
    ShardMeta,
    hash_of_hashes,
    read_document_hashes,
    read_meta,
)
from cheapertraining.errors import UserError

__all__ = ["Finding", "Verification", "verify"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a file."""

    file: Path
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}."


@dataclass
class Verification:
    """What :func:`verify` found.

    ``samples`` is how many were checked; ``bytes`` is what was read of shard files; ``unhashed`` shards have no hash in
    their index.
    """

    findings: list[Finding] = field(default_factory=list)
    folders: int = 0
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    unhashed: int = 0
    seconds: float = 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """1e9 bytes of shard files per second."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)


def verify(folder: Path, *, workers: int = 1) -> Verification:
    """Check shard folders down to the last token.

    Of every shard: that its file is there, with the size and all the hashes that ``index.json`` names, compressed
    shards before and after decompression; that each sample is a row of ``seq_len`` tokens below ``vocab_size`` and
    ``doc_lengths`` of at least 1 that sum to no more than the row; that what follows them is one padding id, the same
    in the whole folder; that ``loss_mask`` is 0 or 1, and 0 in padding. Of every folder: that shards, ``meta.json`` and
    ``documents.u64`` count the same, and that there is no shard file that the index does not name.

    Args:
        folder: a shard folder, or one that holds such, as a source holds its splits.
        workers: threads. Each has one shard in memory (a compressed one twice).

    Raises:
        UserError: no shards at ``folder``.
    """
    import streaming.base.hashing  # noqa: F401  # takes seconds, which are none of the shards'

    start = time.perf_counter()
    result = Verification()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for split in find_shard_folders(folder):
            _verify_folder(split, pool, result)
    result.seconds = time.perf_counter() - start
    return result


@dataclass
class _ShardCheck:
    """What was found in one shard; ``whole`` where all its rows could be counted."""

    findings: list[Finding] = field(default_factory=list)
    bytes: int = 0
    whole: bool = False
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    pad_id: int | None = None


def _verify_folder(folder: Path, pool: ThreadPoolExecutor, result: Verification) -> None:
    result.folders += 1
    found = result.findings
    meta = _read(folder / META_FILE, f"what the shards hold, in format {FORMAT_VERSION}", read_meta, found)
    entries = _read(folder / INDEX_FILE, "an index of MDS shards", read_index, found)
    if entries is None:
        return
    found.extend(_check_names(folder, entries))
    checks = list(pool.map(lambda entry: _check_shard(entry, meta), entries))
    for check in checks:
        found.extend(check.findings)
        result.bytes += check.bytes
        result.samples += check.samples
    result.shards += len(entries)
    result.unhashed += sum(not any(part.hashes for part in (entry.raw, entry.zip) if part) for entry in entries)
    if meta is not None:
        found.extend(_check_padding_ids(folder, entries, checks))
        found.extend(_check_counts(folder, meta, entries, checks))
        found.extend(_check_documents(folder, meta))


def _read(file: Path, expected: str, read: Callable[[Path], _T], findings: list[Finding]) -> _T | None:
    try:
        return read(file.parent)
    except UserError as error:
        reason = str(error).removeprefix(f"{file}: ").split(". ")[0]
        findings.append(Finding(file, expected, f"'{reason}'"))
        return None


def _check_names(folder: Path, entries: list[ShardEntry]) -> Iterator[Finding]:
    """Shards that the index names twice, and files that it does not name."""
    for name, times in Counter(entry.raw.name for entry in entries).items():
        if times > 1:
            yield Finding(folder / INDEX_FILE, f"'{name}' once", f"it {times} times")
    named = {folder / part.name for entry in entries for part in (entry.raw, entry.zip) if part}
    for file in sorted({*folder.rglob("*.mds"), *folder.rglob("*.mds.*")} - named):
        yield Finding(file, f"only shards that {INDEX_FILE} names", "one that it does not name")


def _check_shard(entry: ShardEntry, meta: ShardMeta | None) -> _ShardCheck:
    check = _ShardCheck()
    file = entry.folder / (entry.zip or entry.raw).name
    present = entry.present()
    if not present:
        check.findings.append(Finding(file, "a shard file", "none"))
        return check
    raw = None
    for part in present:
        file = entry.folder / part.name
        try:
            data = np.fromfile(file, np.uint8)
            check.bytes += len(data)
            check.findings.extend(_check_bytes(file, part, data))
            if part is entry.zip:
                data = entry.decompress(data)
                check.findings.extend(_check_bytes(file, entry.raw, data, "decompressed "))
            raw = data if raw is None else raw
        except OSError as error:
            check.findings.append(Finding(file, "a readable file", f"'{error.strerror or error}'"))
        except LayoutError as error:
            check.findings.append(Finding(file, error.expected, error.found))
    file = entry.folder / present[0].name
    if raw is None or meta is None:
        return check
    if dict(entry.columns) != meta.columns:
        found = f"{dict(entry.columns)} in {INDEX_FILE}"
        check.findings.append(Finding(file, f"the columns {meta.columns} of {META_FILE}", found))
        return check
    try:
        _check_rows(file, ShardRows(raw, entry.samples, meta), meta, check)
    except LayoutError as error:
        check.findings.append(Finding(file, error.expected, error.found))
    return check


def _check_bytes(file: Path, entry: FileEntry, data: NDArray[np.uint8], what: str = "") -> Iterator[Finding]:
    """Size and hashes of a file, or of what it is when decompressed."""
    from streaming.base.hashing import get_hash, is_hash

    # Streaming says bytes; its algorithms take any buffer, and a copy would cost as much as the hash.
    if len(data) != entry.bytes:
        yield Finding(file, f"{entry.bytes} {what}bytes", f"{len(data)}")
    for algorithm, expected in entry.hashes.items():
        if not is_hash(algorithm):
            yield Finding(file, "a hash that Streaming knows", f"'{algorithm}'")
        elif (found := get_hash(algorithm, cast(bytes, data))) != expected:
            yield Finding(file, f"{what}{algorithm} {expected}", found)


def _check_rows(file: Path, rows: ShardRows, meta: ShardMeta, check: _ShardCheck) -> None:
    """The schema of every sample, and counts."""
    tally = _Tally(file)
    row_of_piece = np.repeat(np.arange(len(rows)), rows.pieces)
    tally.add("doc_lengths of at least 1", "0", row_of_piece[rows.doc_lengths < 1])
    tally.add("at least one piece in a row", "none", np.flatnonzero(rows.pieces < 1))
    over = np.flatnonzero(rows.filled > meta.seq_len)
    tally.add(f"doc_lengths that sum to at most {meta.seq_len}", _first(rows.filled, over), over)
    for chunk in rows.chunks():
        _check_tokens(chunk, meta, check, tally)
        if chunk.loss_mask is not None:
            _check_loss_mask(chunk, chunk.loss_mask, check, tally)
    check.findings.extend(tally.findings())
    check.samples = len(rows)
    check.tokens = int(rows.filled.sum())
    check.whole = True


def _check_tokens(chunk: RowChunk, meta: ShardMeta, check: _ShardCheck, tally: _Tally) -> None:
    most = chunk.tokens.max(axis=1)
    beyond = np.flatnonzero(most >= meta.vocab_size)
    tally.add(f"token ids below {meta.vocab_size}", _first(most, beyond), chunk.first + beyond)
    short = np.flatnonzero(chunk.filled < meta.seq_len)
    if not len(short):
        return
    if check.pad_id is None:
        check.pad_id = int(chunk.tokens[short[0], -1])
    tokens = chunk.tokens[short]
    wrong = (tokens != check.pad_id) & (np.arange(meta.seq_len) >= chunk.filled[short, None])
    if wrong.any():
        bad = np.flatnonzero(wrong.any(axis=1))
        found = _first(tokens.ravel(), np.flatnonzero(wrong))
        tally.add(f"only id {check.pad_id} as padding", found, chunk.first + short[bad])


def _check_loss_mask(chunk: RowChunk, mask: NDArray[np.uint8], check: _ShardCheck, tally: _Tally) -> None:
    most = mask.max(axis=1)
    beyond = np.flatnonzero(most > 1)
    tally.add("a loss_mask of 0 and 1", _first(most, beyond), chunk.first + beyond)
    check.loss_tokens += int(mask.sum(dtype=np.int64))
    short = np.flatnonzero(chunk.filled < mask.shape[1])
    in_padding = short[(mask[short] * (np.arange(mask.shape[1]) >= chunk.filled[short, None])).any(axis=1)]
    tally.add("a loss_mask of 0 in padding", "1", chunk.first + in_padding)


def _first(values: NDArray[Any], which: NDArray[np.int64]) -> str:
    return str(values[which[0]]) if len(which) else ""


class _Tally:
    """Bad rows of one file by what was expected of them: the first, and how many there are."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._bad: dict[str, tuple[str, int, int]] = {}

    def add(self, expected: str, found: str, rows: NDArray[np.int64]) -> None:
        """Note rows in which ``found`` (in the first of them) is not as expected."""
        if len(rows):
            first, row, count = self._bad.get(expected, (found, int(rows[0]), 0))
            self._bad[expected] = (first, row, count + len(np.unique(rows)))

    def findings(self) -> Iterator[Finding]:
        for expected, (found, row, count) in self._bad.items():
            others = f" (as in {count - 1} more rows)" if count > 1 else ""
            yield Finding(self._file, expected, f"{found} in row {row}{others}")


def _check_padding_ids(folder: Path, entries: list[ShardEntry], checks: list[_ShardCheck]) -> Iterator[Finding]:
    padded = [(entry, check.pad_id) for entry, check in zip(entries, checks, strict=True) if check.pad_id is not None]
    for entry, pad_id in padded:
        if pad_id != padded[0][1]:
            expected = f"padding of id {padded[0][1]} as in {padded[0][0].raw.name}"
            yield Finding(folder / entry.present()[0].name, expected, f"id {pad_id}")


def _check_counts(
    folder: Path, meta: ShardMeta, entries: list[ShardEntry], checks: list[_ShardCheck]
) -> Iterator[Finding]:
    """What ``meta.json`` counts against the index and, where every row could be read, against the rows."""
    counted = {"samples": sum(entry.samples for entry in entries)}
    if all(check.whole for check in checks):
        counted["tokens"] = sum(check.tokens for check in checks)
        counted["padding"] = meta.seq_len * counted["samples"] - counted["tokens"]
        if meta.loss_tokens is not None:
            counted["loss_tokens"] = sum(check.loss_tokens for check in checks)
    for name, number in counted.items():
        if (stated := getattr(meta, name)) != number:
            yield Finding(folder / META_FILE, f"{number} {name}, as the shards have", f"{stated}")


def _check_documents(folder: Path, meta: ShardMeta) -> Iterator[Finding]:
    file = folder / DOCUMENTS_FILE
    if not file.is_file():
        yield Finding(file, f"{meta.documents} hashes of documents", "no such file")
        return
    if (size := file.stat().st_size) != 8 * meta.documents:
        yield Finding(file, f"{8 * meta.documents} bytes for {meta.documents} documents", f"{size}")
    elif (digest := hash_of_hashes(read_document_hashes(folder))) != meta.input_hash:
        yield Finding(file, f"input_hash {meta.input_hash} of {META_FILE}", digest)
