"""Pieces of input to records: JSON lines, plain text, parquet, and data sets of the ``datasets`` library."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from cheapertraining.data.documents import Record
from cheapertraining.data.pieces import (
    Piece,
    Slice,
    compression_of,
    load_hub_data,
    load_saved_data,
    one_line,
    open_input,
)

__all__ = ["read_piece"]

_ROWS_PER_READ = 1024

Advance = Callable[[int], None]


def read_piece(piece: Piece, advance: Advance | None = None, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a piece, in order; what cannot be read is a record with a problem.

    Args:
        piece: of :func:`list_pieces`.
        advance: called now and then with the bytes of input read since the last call.
        columns: of parquet files and data sets, where only these are needed.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow, "hub": _read_hub}
    for part in piece.slices:
        read = readers.get(part.kind, _read_text)
        yield from read(part, advance or (lambda _: None), columns)


class _Place:
    """A line of a slice that may begin in the middle of its file; the lines before it are counted only when asked."""

    def __init__(self, part: Slice, line: int) -> None:
        self.part = part
        self.line = line

    def __str__(self) -> str:
        return f"{self.part.path}:{_lines_before(self.part.path, self.part.first) + self.line}"


@lru_cache(maxsize=64)
def _lines_before(file: str, end: int) -> int:
    """Line ends before the first line that begins at or behind byte ``end``."""
    if end == 0:
        return 0
    count = 0
    with open_input(file) as handle:
        while handle.tell() < end and (block := handle.read(min(1 << 20, end - handle.tell()))):
            count += block.count(b"\n")
            last = block[-1:]
        return count if last == b"\n" else count + 1


def _lines(part: Slice, advance: Advance) -> Iterator[tuple[_Place, bytes | Exception]]:
    """Lines that begin within a slice; an error where the file cannot be read on."""
    import pyarrow as pa

    number = 0
    with open_input(part.path) as raw:
        packed = compression_of(part.path)
        handle: Any = raw
        if packed == "gzip":
            handle = gzip.GzipFile(fileobj=raw)
        elif packed == "zstd":
            handle = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), 1 << 20)
        elif part.first:
            raw.seek(part.first - 1)
            raw.readline()  # the line that began before belongs to the slice before
        position = raw.tell()
        try:
            while packed or position < part.last:
                line = handle.readline()
                if not line:
                    break
                number += 1
                if packed:
                    read, position = raw.tell() - position, raw.tell()
                else:
                    read, position = len(line), position + len(line)
                if read:
                    advance(read)
                yield _Place(part, number), line
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            yield _Place(part, number + 1), error


def _decoded(place: _Place, line: bytes | Exception, first: bool) -> Record:
    """A line as text, or what is wrong with it."""
    if isinstance(line, Exception):
        problem = f"the file cannot be read from here on ({one_line(line)}): truncated or damaged. Copy it again."
        return Record(str(place), None, problem)
    try:
        return Record(place, line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return Record(str(place), None, f"invalid UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x}).")


def _read_jsonl(part: Slice, advance: Advance, columns: Sequence[str] | None) -> Iterator[Record]:
    first = part.first == 0
    for place, line in _lines(part, advance):
        record = _decoded(place, line, first)
        first = False
        if record.problem is not None:
            yield record
        elif isinstance(record.value, str) and record.value.strip():
            yield _parsed(place, record.value)


def _parsed(place: _Place, line: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Record(str(place), None, f"broken JSON ({one_line(error)}).")
    if not isinstance(value, dict):
        problem = f"expected one JSON object a line, found {type(value).__name__}."
        return Record(str(place), None, problem)
    return Record(place, value)  # its string is made only when a message needs it


def _read_text(part: Slice, advance: Advance, columns: Sequence[str] | None) -> Iterator[Record]:
    unit = part.kind.removeprefix("text/")
    collected: list[str] = []
    begin: _Place | None = None
    first = part.first == 0
    for place, line in _lines(part, advance):
        record = _decoded(place, line, first)
        first = False
        if record.problem is not None or not isinstance(record.value, str):
            yield record
            if unit == "file":
                return
            continue
        begin = begin or place
        if unit == "line":
            yield Record(place, record.value.rstrip("\r\n"))
        elif unit == "paragraph" and not record.value.strip():
            yield Record(begin, "".join(collected).strip("\r\n"))
            collected, begin = [], None
        else:
            collected.append(record.value)
    if collected:
        text = "".join(collected)
        yield Record(str(begin), text.strip("\r\n") if unit == "paragraph" else text)


def _read_parquet(part: Slice, advance: Advance, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(part.path) as file:
            row = sum(file.metadata.row_group(number).num_rows for number in range(part.first))
            wanted = [name for name in columns or () if name in file.schema_arrow.names]
            batches = file.iter_batches(_ROWS_PER_READ, row_groups=[part.first], columns=wanted or None)
            rows = max(1, file.metadata.row_group(part.first).num_rows)
            for batch in batches:
                for value in batch.to_pylist():
                    yield Record(f"{part.path}: row {row}", value)
                    row += 1
                advance(part.bytes * batch.num_rows // rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"row group {part.first} cannot be read ({one_line(error)}): damaged. Make or copy it again."
        yield Record(part.path, None, problem)


def _read_arrow(part: Slice, advance: Advance, columns: Sequence[str] | None) -> Iterator[Record]:
    data = load_saved_data(part.path)
    wanted = [name for name in columns or () if name in data.column_names]
    data = data.select_columns(wanted) if wanted else data
    for first in range(part.first, part.last, _ROWS_PER_READ):
        last = min(first + _ROWS_PER_READ, part.last)
        for row, value in zip(range(first, last), data.select(range(first, last)), strict=True):
            yield Record(f"{part.path}: row {row}", value)
        advance(part.bytes * (last - first) // (part.last - part.first))


def _read_hub(part: Slice, advance: Advance, columns: Sequence[str] | None) -> Iterator[Record]:
    name = json.loads(part.path)[0]
    data = load_hub_data(part.path).shard(num_shards=part.last, index=part.first)
    for row, value in enumerate(data):
        yield Record(f"{name}, shard {part.first}: row {row}", value)
