"""Shard files as they lie on disk, read whole: what looks at shards rather than trains on them.

The store (:mod:`cheapertraining.data.store`) reads rows at random and trusts the files; here nothing is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.shards import INDEX_FILE, ShardMeta
from cheapertraining.errors import UserError

__all__ = ["FileEntry", "LayoutError", "RowChunk", "ShardEntry", "ShardRows", "find_shard_folders", "read_index"]

Int64 = NDArray[np.int64]

_CHUNK_BYTES = 1 << 18  # of tokens looked at together: they stay in the processor's cache


class LayoutError(Exception):
    """A file is no shard of these rows: what was expected, and what was found."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


@dataclass(frozen=True)
class FileEntry:
    """One file as ``index.json`` names it; ``hashes`` are hex digests by algorithm."""

    name: str
    bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class ShardEntry:
    """One shard as ``index.json`` names it: the file with its rows and, perhaps, the compressed one.

    ``columns`` are encodings by name, as :attr:`~cheapertraining.data.shards.ShardMeta.columns`.
    """

    folder: Path
    samples: int
    columns: Mapping[str, str]
    raw: FileEntry
    zip: FileEntry | None
    compression: str | None

    def present(self) -> list[FileEntry]:
        """Its files that are there: the one with the rows first."""
        return [entry for entry in (self.raw, self.zip) if entry and (self.folder / entry.name).is_file()]

    def read_raw(self) -> NDArray[np.uint8]:
        """The bytes of the file with the rows, decompressed where only the compressed one is there.

        Raises:
            LayoutError: it cannot be decompressed.
            OSError: there is no file, or it cannot be read.
        """
        if self.zip is None or (self.folder / self.raw.name).is_file():
            return np.fromfile(self.folder / self.raw.name, np.uint8)
        return self.decompress(np.fromfile(self.folder / self.zip.name, np.uint8))

    def decompress(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes of the file with the rows, from those of the compressed one.

        Raises:
            LayoutError: they cannot be decompressed.
        """
        from streaming.base.compression import decompress

        try:
            return np.frombuffer(decompress(self.compression, packed.tobytes()), np.uint8)
        except Exception as error:  # every library raises its own kinds
            reason = str(error).strip() or type(error).__name__
            raise LayoutError(f"data compressed with {self.compression}", f"'{reason}'") from error


@dataclass(frozen=True)
class RowChunk:
    """Some consecutive rows of a shard.

    Attributes:
        first: index of the first of them within the shard.
        tokens: uint16 or uint32 ``[n, S]``.
        loss_mask: uint8 ``[n, S]``, or None.
        filled: int64 ``[n]``, tokens in the pieces of each row; padding follows them.
    """

    first: int
    tokens: NDArray[Any]
    loss_mask: NDArray[np.uint8] | None
    filled: Int64

    @property
    def padded(self) -> NDArray[np.bool_]:
        """bool ``[n, S]``: where there is padding."""
        return np.asarray(np.arange(self.tokens.shape[1]) >= self.filled[:, None])


class ShardRows:
    """The rows of one shard, located without a loop over them.

    MDS file: uint32 count ``n``, uint32 ``n + 1`` offsets, a header, then the samples. A sample of ours: uint32 size of
    the ``doc_lengths`` field, that field (one byte with rank and width of the shape, the shape, uint32 values), the
    loss mask of conversations, then the tokens.

    Args:
        raw: uint8, the bytes of the file.
        samples: how many the index says there are.
        meta: says what a row is.

    Attributes:
        doc_lengths: uint32, the pieces of all rows one after the other.
        pieces: int64 ``[N]``, how many pieces each row has.
        piece_starts: int64 ``[N + 1]``, the first of each row's lengths in ``doc_lengths``, and the end.
        filled: int64 ``[N]``, the sum of each row's pieces.

    Raises:
        LayoutError: the bytes are something else.
    """

    def __init__(self, raw: NDArray[np.uint8], samples: int, meta: ShardMeta) -> None:
        self._raw = raw
        self._dtype = np.dtype(meta.token_dtype).newbyteorder("<")
        self._seq_len = meta.seq_len
        self._masked = meta.loss_tokens is not None
        row_bytes = meta.seq_len * (self._dtype.itemsize + self._masked)
        offsets = _sample_offsets(raw, samples)
        self._rows = offsets[1:] - row_bytes  # where the loss mask, or else the tokens, begin
        values = self._check_fields(offsets, self._rows - offsets[:-1])
        self.pieces: Int64 = (self._rows - values) // 4
        self.piece_starts: Int64 = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.pieces)])
        starts = self.piece_starts
        where = np.repeat(values - 4 * starts[:-1], self.pieces) + 4 * np.arange(starts[-1])
        self.doc_lengths: NDArray[np.uint32] = _values_at(raw, where, "<u4")
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.doc_lengths, dtype=np.int64)])
        self.filled: Int64 = sums[starts[1:]] - sums[starts[:-1]]

    def __len__(self) -> int:
        return len(self._rows)

    def chunks(self) -> Iterator[RowChunk]:
        """All rows in order, some at a time."""
        step = max(1, _CHUNK_BYTES // (self._seq_len * self._dtype.itemsize))
        for first in range(0, len(self), step):
            yield self.take(np.arange(first, min(first + step, len(self))))

    def take(self, rows: Int64) -> RowChunk:
        """The rows with these indices."""
        starts, mask = self._rows[rows], None
        if self._masked:
            mask = _values_at(self._raw, starts, f"V{self._seq_len}").view(np.uint8).reshape(len(rows), -1)
            starts = starts + self._seq_len
        tokens = _values_at(self._raw, starts, f"V{self._seq_len * self._dtype.itemsize}").view(self._dtype)
        return RowChunk(int(rows[0]), tokens.reshape(len(rows), -1), mask, self.filled[rows])

    def lengths_of(self, first: int, last: int) -> NDArray[np.uint32]:
        """uint32: the pieces of rows ``first`` to ``last - 1``."""
        return self.doc_lengths[self.piece_starts[first] : self.piece_starts[last]]

    def _check_fields(self, offsets: Int64, fields: Int64) -> Int64:
        """int64 ``[N]``: where the values of ``doc_lengths`` begin, if the field's sizes agree with one another.

        Args:
            offsets: of the samples.
            fields: bytes of each sample before the loss mask or the tokens.
        """
        if (short := fields < 4 + 1 + 1).any():
            row = int(short.argmax())
            expected = f"rows of {self._seq_len} tokens ({self._dtype.name}{' with loss_mask' * self._masked})"
            size = offsets[row + 1] - offsets[row]
            raise LayoutError(expected, f"row {row} of {size} bytes{_others(short)}")
        kind = _values_at(self._raw, offsets[:-1] + 4, "u1").astype(np.int64)
        width = 1 << (kind & 3)
        head = 4 + 1 + width
        good = (_values_at(self._raw, offsets[:-1], "<u4") == fields - 4) & (kind >> 2 == 1)
        good &= (fields >= head) & ((fields - head) % 4 == 0)
        for size in (1, 2, 4, 8):
            mine = np.flatnonzero(good & (width == size))
            counts = _values_at(self._raw, offsets[mine] + 5, f"<u{size}")
            good[mine] = counts == ((fields - head)[mine] // 4).astype(np.uint64)
        if not good.all():
            raise LayoutError(
                "doc_lengths as a list of uint32", f"something else in row {int(good.argmin())}{_others(~good)}"
            )
        return np.asarray(offsets[:-1] + head)


def find_shard_folders(folder: Path) -> list[Path]:
    """``folder`` itself if it holds shards, else the folders below it that do, such as the splits of a source.

    Folders with shards but without index are among them; those whose names begin with a dot are not.

    Raises:
        UserError: there are none.
    """
    if (folder / INDEX_FILE).is_file():
        return [folder]
    files = [file.relative_to(folder) for kind in (INDEX_FILE, "*.mds", "*.mds.*") for file in folder.rglob(kind)]
    found = sorted({folder / file.parent for file in files if not any(part.startswith(".") for part in file.parts)})
    if not found:
        raise UserError(
            f"{folder}: expected a shard folder (with {INDEX_FILE}) or a folder of such, found "
            f"{'no shards in it' if folder.is_dir() else 'no such folder'}. Check the path."
        )
    return found


def read_index(folder: Path) -> list[ShardEntry]:
    """The shards that the ``index.json`` of a folder names, in order.

    Raises:
        UserError: it is missing, unreadable, or not one of MDS shards.
    """
    file = folder / INDEX_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != 2:
            raise UserError(f"{file}: expected version 2, found {content['version']}. Make the shards anew.")
        return [_shard_entry(folder, entry) for entry in content["shards"]]
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found, so the folder is not finished. Make or copy its shards again.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: unreadable ({error!r}). Make or copy the shards of this folder again.") from error


def _shard_entry(folder: Path, entry: Mapping[str, Any]) -> ShardEntry:
    def file(part: Mapping[str, Any] | None) -> FileEntry | None:
        return FileEntry(str(part["basename"]), int(part["bytes"]), dict(part["hashes"])) if part else None

    raw = file(entry["raw_data"])
    if entry["format"] != "mds" or raw is None:
        raise UserError(f"{folder / INDEX_FILE}: expected MDS shards, found '{entry['format']}'. Make them anew.")
    columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    return ShardEntry(folder, int(entry["samples"]), columns, raw, file(entry["zip_data"]), entry["compression"])


def _sample_offsets(raw: NDArray[np.uint8], samples: int) -> Int64:
    """int64 ``[samples + 1]``: where each sample begins, and the end."""
    if len(raw) < 4 * (samples + 2):
        raise LayoutError(f"{samples} samples", f"a file of {len(raw)} bytes")
    if (found := int(raw[:4].view("<u4")[0])) != samples:
        raise LayoutError(f"{samples} samples", f"{found}")
    offsets: Int64 = raw[4 : 4 * (samples + 2)].view("<u4").astype(np.int64)
    if offsets[0] < 4 * (samples + 2) or (np.diff(offsets) <= 0).any():
        raise LayoutError("samples one behind the other", "offsets that are not in order")
    if offsets[-1] != len(raw):
        raise LayoutError(f"an end at byte {offsets[-1]}, by its own offsets", f"one at {len(raw)}")
    return offsets


def _values_at(raw: NDArray[np.uint8], starts: Int64, dtype: str) -> NDArray[Any]:
    """The values at any bytes, aligned or not: one gather from a view that overlaps itself."""
    kind = np.dtype(dtype)
    overlapping: NDArray[Any] = np.ndarray(max(0, len(raw) - kind.itemsize + 1), kind, raw, strides=(1,))
    return np.asarray(overlapping[starts])


def _others(bad: NDArray[np.bool_]) -> str:
    count = int(bad.sum()) - 1
    return f" and in {count} more" if count else ""
