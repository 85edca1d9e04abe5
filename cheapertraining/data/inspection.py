"""What shard folders hold, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.rows import TokenRows
from cheapertraining.data.shard_files import LayoutError, ShardEntry, ShardRows, find_shard_folders, read_index
from cheapertraining.data.shards import ShardMeta, read_document_hashes, read_meta
from cheapertraining.errors import UserError

__all__ = ["Description", "Difference", "LengthBin", "describe", "diff", "open_shard", "read_rows"]

_ROWS_COMPARED = 1024


class LengthBin(NamedTuple):
    """Pieces of documents with ``low`` to ``high`` tokens."""

    low: int
    high: int
    pieces: int
    tokens: int


@dataclass(frozen=True)
class Description:
    """What one shard folder holds. Counts are of the rows themselves, not of ``meta``.

    Attributes:
        folder: it.
        meta: its ``meta.json``.
        shards: number of shards.
        samples: rows.
        documents: hashes in ``documents.u64``.
        pieces: pieces of documents in all rows.
        tokens: tokens of documents; ``padding`` is what fills up the rows.
        loss_tokens: tokens that are predicted; None where there is no loss mask and all are.
        lengths: histogram of the lengths of pieces in powers of two, from the shortest to the longest.
        token_counts: int64 ``[vocab_size]``, how often each id occurs in documents.
        raw_bytes: size of the shards without compression.
        disk_bytes: size of the shard files that are there.
    """

    folder: Path
    meta: ShardMeta
    shards: int
    samples: int
    documents: int
    pieces: int
    tokens: int
    padding: int
    loss_tokens: int | None
    lengths: tuple[LengthBin, ...]
    token_counts: NDArray[np.int64]
    raw_bytes: int
    disk_bytes: int

    @property
    def distinct_ids(self) -> int:
        """How many ids of the vocabulary occur."""
        return int(np.count_nonzero(self.token_counts))

    @property
    def compression_ratio(self) -> float:
        """Bytes without compression to bytes of the files; 1 where nothing is compressed."""
        return self.raw_bytes / max(1, self.disk_bytes)

    def most_frequent(self, n: int) -> list[tuple[int, int]]:
        """``(id, count)`` of the ``n`` most frequent ids, ties by id."""
        order = np.argsort(-self.token_counts, kind="stable")[:n]
        return [(int(i), int(self.token_counts[i])) for i in order if self.token_counts[i]]


def describe(folder: Path) -> list[Description]:
    """Describe a shard folder, or each of those below ``folder``; one shard is in memory at a time.

    Raises:
        UserError: no shards, or such as :func:`~cheapertraining.data.verification.verify` would find fault with.
    """
    return [_describe_folder(found) for found in find_shard_folders(folder)]


def read_rows(folder: Path, samples: Sequence[int]) -> TokenRows:
    """Rows of one shard folder by index, in the order given; reads the shards that they are in.

    Raises:
        UserError: a sample that is not there, or an unreadable shard.
    """
    meta, entries = read_meta(folder), read_index(folder)
    wanted = np.asarray(samples, np.int64)
    ends = np.cumsum([entry.samples for entry in entries])
    total = sum(entry.samples for entry in entries)
    if ((wanted < 0) | (wanted >= total)).any():
        raise UserError(f"{folder}: expected samples from 0 to {total - 1}, found {list(samples)}.")
    shards = np.searchsorted(ends, wanted, side="right")
    tokens = np.zeros((len(wanted), meta.seq_len), meta.token_dtype)
    mask = None if meta.loss_tokens is None else np.zeros(tokens.shape, np.uint8)
    lengths: dict[int, NDArray[np.uint32]] = {}
    for shard in np.unique(shards).tolist():
        rows = open_shard(entries[shard], meta)
        for i in np.flatnonzero(shards == shard).tolist():
            row = int(wanted[i] - (ends[shard] - entries[shard].samples))
            chunk = rows.take(np.array([row]))
            tokens[i], lengths[i] = chunk.tokens[0], rows.lengths_of(row, row + 1)
            if mask is not None and chunk.loss_mask is not None:
                mask[i] = chunk.loss_mask[0]
    pieces = np.array([len(lengths[i]) for i in range(len(wanted))], np.int64)
    in_order = [np.zeros(0, np.uint32), *(lengths[i] for i in range(len(wanted)))]
    return TokenRows(tokens, np.concatenate(in_order), pieces, mask)


@dataclass(frozen=True)
class Difference:
    """Something in which two shard folders differ: ``a`` and ``b`` say what each has."""

    what: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.what}: {self.a} | {self.b}"


def diff(a: Path, b: Path) -> list[Difference]:
    """In what two shard folders differ, or two folders of such, matched by name; nothing where they are the same.

    Compared are ``meta.json`` field by field, the hashes of the shards, the documents, and the rows up to the first
    that differs, whichever shards they are in.

    Raises:
        UserError: no shards in one of them, or unreadable ones.
    """
    here = {str(found.relative_to(a)): found for found in find_shard_folders(a)}
    there = {str(found.relative_to(b)): found for found in find_shard_folders(b)}
    differences = [
        Difference(name, "there" if name in here else "missing", "there" if name in there else "missing")
        for name in sorted(here.keys() ^ there.keys())
    ]
    for name in sorted(here.keys() & there.keys()):
        prefix = "" if name == "." else f"{name}: "
        for found in _diff_folders(here[name], there[name]):
            differences.append(Difference(prefix + found.what, found.a, found.b))
    return differences


def open_shard(entry: ShardEntry, meta: ShardMeta) -> ShardRows:
    """The rows of a shard, which is read whole.

    Raises:
        UserError: it has other columns than ``meta`` says, or is unreadable.
    """
    file = entry.folder / (entry.zip or entry.raw).name
    if dict(entry.columns) != meta.columns:
        raise UserError(f"{file}: expected the columns {meta.columns}, found {dict(entry.columns)}. Make it again.")
    try:
        return ShardRows(entry.read_raw(), entry.samples, meta)
    except (LayoutError, OSError) as error:
        raise UserError(f"{file}: {error}. Make or copy it again; inspect_shards.py verify says more.") from error


def _describe_folder(folder: Path) -> Description:
    meta, entries = read_meta(folder), read_index(folder)
    counts = np.zeros(max(meta.vocab_size, 1), np.int64)
    bins = np.zeros((2, 33), np.int64)  # by bit length of a uint32: pieces, tokens
    samples = tokens = loss_tokens = 0
    for entry in entries:
        rows = open_shard(entry, meta)
        samples += len(rows)
        tokens += int(rows.filled.sum())
        bits = np.frexp(rows.doc_lengths.astype(np.float64))[1]
        bins[0] += np.bincount(bits, minlength=33)
        bins[1] += np.bincount(bits, rows.doc_lengths, minlength=33).astype(np.int64)
        for chunk in rows.chunks():
            counts = _add(counts, np.bincount(chunk.tokens[~chunk.padded]))
            loss_tokens += 0 if chunk.loss_mask is None else int(chunk.loss_mask.sum(dtype=np.int64))
    return Description(
        folder=folder,
        meta=meta,
        shards=len(entries),
        samples=samples,
        documents=len(read_document_hashes(folder)),
        pieces=int(bins[0].sum()),
        tokens=tokens,
        padding=samples * meta.seq_len - tokens,
        loss_tokens=None if meta.loss_tokens is None else loss_tokens,
        lengths=_length_bins(bins),
        token_counts=counts,
        raw_bytes=sum(entry.raw.bytes for entry in entries),
        disk_bytes=sum((folder / part.name).stat().st_size for entry in entries for part in entry.present()),
    )


def _add(counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum; ids beyond the vocabulary make it longer."""
    if len(more) > len(counts):
        counts = np.pad(counts, (0, len(more) - len(counts)))
    counts[: len(more)] += more
    return counts


def _length_bins(bins: NDArray[np.int64]) -> tuple[LengthBin, ...]:
    used = np.flatnonzero(bins[0])
    if not len(used):
        return ()
    bits = range(int(used[0]), int(used[-1]) + 1)
    return tuple(LengthBin((1 << n) >> 1, (1 << n) - 1, int(bins[0][n]), int(bins[1][n])) for n in bits)


def _diff_folders(a: Path, b: Path) -> Iterator[Difference]:
    meta_a, meta_b = read_meta(a), read_meta(b)
    theirs = asdict(meta_b)
    for name, value in asdict(meta_a).items():
        if value != theirs[name]:
            yield Difference(f"meta.json, {name}", str(value), str(theirs[name]))
    entries_a, entries_b = read_index(a), read_index(b)
    yield from _diff_hashes(entries_a, entries_b)
    yield from _diff_documents(read_document_hashes(a), read_document_hashes(b))
    if meta_a.columns == meta_b.columns:
        yield from _diff_rows((meta_a, entries_a), (meta_b, entries_b))
    else:
        yield Difference("columns", str(meta_a.columns), str(meta_b.columns))


def _diff_hashes(a: list[ShardEntry], b: list[ShardEntry]) -> Iterator[Difference]:
    """Shards that both have, by position, under another hash; and how many each has."""
    if len(a) != len(b):
        yield Difference("number of shards", str(len(a)), str(len(b)))
    for mine, theirs in zip(a, b, strict=False):
        common = sorted(mine.raw.hashes.keys() & theirs.raw.hashes.keys())
        if common and mine.raw.hashes[common[0]] != theirs.raw.hashes[common[0]]:
            what = mine.raw.name if mine.raw.name == theirs.raw.name else f"{mine.raw.name} and {theirs.raw.name}"
            yield Difference(f"{common[0]} of {what}", mine.raw.hashes[common[0]], theirs.raw.hashes[common[0]])


def _diff_documents(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> Iterator[Difference]:
    """Documents that are in only one of them, or more often in one; the same ones in another order."""
    values, index = np.unique(np.concatenate([a, b]), return_inverse=True)
    surplus = np.bincount(index[: len(a)], minlength=len(values)) - np.bincount(index[len(a) :], minlength=len(values))
    if surplus.any():
        yield Difference("documents in only one", _documents(values, surplus), _documents(values, -surplus))
    elif not np.array_equal(a, b):
        first = int((a != b).argmax())
        yield Difference(f"order of documents, from number {first}", f"{a[first]:016x}", f"{b[first]:016x}")


def _documents(values: NDArray[np.uint64], surplus: NDArray[np.int64]) -> str:
    more = np.flatnonzero(surplus > 0)
    shown = ", ".join(f"{value:016x}" for value in values[more[:3]].tolist())
    return f"{int(surplus[more].sum())}" + (f" ({shown}{', …' if len(more) > 3 else ''})" if len(more) else "")


def _diff_rows(a: tuple[ShardMeta, list[ShardEntry]], b: tuple[ShardMeta, list[ShardEntry]]) -> Iterator[Difference]:
    """The first row that differs. Equal shards at the start, by their hashes, are not read."""
    same = 0
    for mine, theirs in zip(a[1], b[1], strict=False):
        if not mine.raw.hashes or (mine.samples, mine.raw.hashes) != (theirs.samples, theirs.raw.hashes):
            break
        same += 1
    row = sum(entry.samples for entry in a[1][:same])
    left, right = _RowReader(a[0], a[1][same:]), _RowReader(b[0], b[1][same:])
    while (count := min(left.available(), right.available(), _ROWS_COMPARED)) > 0:
        found = _first_difference(left.next_rows(count), right.next_rows(count))
        if found is not None:
            yield Difference(f"first row that differs, {row + found[0]}", found[1], found[2])
            return
        row += count
    if left.available() or right.available():
        yield Difference(f"row {row}", *("there" if reader.available() else "none" for reader in (left, right)))


class _RowReader:
    """The rows of a folder in order, whichever shards they are in."""

    def __init__(self, meta: ShardMeta, entries: Sequence[ShardEntry]) -> None:
        self._meta = meta
        self._entries = list(reversed(entries))
        self._rows: ShardRows | None = None
        self._row = 0

    def available(self) -> int:
        """Rows left in the current shard, the next one being opened where there are none; 0 at the end."""
        while (self._rows is None or self._row == len(self._rows)) and self._entries:
            self._rows, self._row = open_shard(self._entries.pop(), self._meta), 0
        return 0 if self._rows is None else len(self._rows) - self._row

    def next_rows(self, count: int) -> TokenRows:
        """The next ``count`` rows, at most the available ones."""
        assert self._rows is not None
        rows, first, last = self._rows, self._row, self._row + count
        self._row = last
        chunk = rows.take(np.arange(first, last))
        return TokenRows(chunk.tokens, rows.lengths_of(first, last), rows.pieces[first:last], chunk.loss_mask)


def _first_difference(a: TokenRows, b: TokenRows) -> tuple[int, str, str] | None:
    """The first row in which two runs of rows differ, and what each has there."""
    differs = (a.tokens != b.tokens).any(axis=1)
    if a.loss_mask is not None and b.loss_mask is not None:
        differs |= (a.loss_mask != b.loss_mask).any(axis=1)
    if not (np.array_equal(a.pieces, b.pieces) and np.array_equal(a.doc_lengths, b.doc_lengths)):
        pairs = zip(_lengths_by_row(a), _lengths_by_row(b), strict=True)
        differs |= np.array([not np.array_equal(mine, theirs) for mine, theirs in pairs])
    if not differs.any():
        return None
    row = int(differs.argmax())
    mine, theirs = _lengths_by_row(a)[row].tolist(), _lengths_by_row(b)[row].tolist()
    if mine != theirs:
        return row, f"doc_lengths {mine}", f"doc_lengths {theirs}"
    for name, x, y in (("token", a.tokens, b.tokens), ("loss_mask", a.loss_mask, b.loss_mask)):
        if x is not None and y is not None and (unequal := x[row] != y[row]).any():
            column = int(unequal.argmax())
            return row, f"{name} {x[row, column]} in column {column}", f"{name} {y[row, column]}"
    return None


def _lengths_by_row(rows: TokenRows) -> list[NDArray[np.uint32]]:
    return np.split(rows.doc_lengths, np.cumsum(rows.pieces)[:-1])
