"""Files, folders and Hugging Face data sets, cut into pieces that are the same on every machine.

A *piece* is the unit of work of a conversion: some megabytes of input that one process reads. How inputs are cut
depends on them alone, never on the number of processes.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from cheapertraining.errors import UserError, nearest

__all__ = [
    "FORMATS",
    "TEXT_UNITS",
    "HubData",
    "Piece",
    "Slice",
    "compression_of",
    "list_pieces",
    "load_hub_data",
    "load_saved_data",
    "one_line",
    "open_input",
]

FORMATS = ("auto", "jsonl", "parquet", "text")
TEXT_UNITS = ("file", "line", "paragraph")
SMALLEST_PIECE, LARGEST_PIECE = 8_000_000, 128_000_000  # bytes of input
_PIECES = 128
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_SNIFFED_BYTES = 8192


@dataclass(frozen=True)
class Slice:
    """A part of one input.

    Attributes:
        path: of the file or folder, or the name of a hub data set.
        kind: ``jsonl``, ``text/file``, ``text/line``, ``text/paragraph``, ``parquet``, ``arrow`` (a data set saved by
            ``datasets``) or ``hub``.
        first, last: bytes of a plain file of lines, row groups of a parquet file, rows of an arrow data set, shards of
            a hub data set.
        bytes: about how much input this is, for progress.
    """

    path: str
    kind: str
    first: int
    last: int
    bytes: int


@dataclass(frozen=True)
class Piece:
    """What one process reads: slices, one after the other."""

    slices: tuple[Slice, ...]

    @property
    def bytes(self) -> int:
        """About how much input this is."""
        return sum(part.bytes for part in self.slices)


@dataclass(frozen=True)
class HubData:
    """A data set by its name on the Hugging Face hub, or a folder that ``datasets`` saved or can load."""

    name: str
    config: str | None = None
    split: str = "train"


def list_pieces(
    inputs: Sequence[str] = (), hub: HubData | None = None, format: str = "auto", text_unit: str = "file"
) -> list[Piece]:
    """Cut inputs into pieces, in the order of ``inputs`` and, within a glob or folder, of the names.

    Args:
        inputs: files, globs and folders. A folder gives all files below it but hidden ones; what is neither JSON lines
            nor parquet is text, binary files are passed over.
        hub: a data set besides.
        format: ``auto`` goes by the name: ``.jsonl``, ``.ndjson``, ``.json`` (each also ``.gz``, ``.zst``),
            ``.parquet``; all else is text.
        text_unit: what a document is in a text file: the ``file``, each ``line``, or each ``paragraph`` (ended by an
            empty line).

    Raises:
        UserError: nothing is found at an input, a file is empty or unreadable, or an unknown format or unit.
    """
    for key, value, options in (("format", format, FORMATS), ("text unit", text_unit, TEXT_UNITS)):
        if value not in options:
            raise UserError(f"{key}: expected one of {', '.join(options)}, found '{value}'.{nearest(value, options)}")
    files = list(dict.fromkeys(file for given in inputs for file in _files_of(given)))
    if not files and hub is None:
        raise UserError("no input: name files, globs or folders, or a data set (--dataset).")
    sizes = {file: _size_of(file) for file in files}
    if files and not any(sizes.values()):
        raise UserError(f"{files[0]}: all input files are empty. Check the paths.")
    total = sum(size * _expansion(file) for file, size in sizes.items())
    size = min(max(total // _PIECES, SMALLEST_PIECE), LARGEST_PIECE)
    slices = [part for file in files if sizes[file] for part in _slices_of(file, sizes[file], size, format, text_unit)]
    if hub is not None:
        slices += _hub_slices(hub, size)
    return _group(slices, size)


def _files_of(given: str) -> list[str]:
    if os.path.isdir(given):
        if _is_saved_dataset(given):
            return [given]
        found = [
            os.path.join(folder, name)
            for folder, folders, names in os.walk(given)
            if _drop_hidden(folders)
            for name in names
            if not name.startswith(".")
        ]
        found = [file for file in sorted(found) if _kind_of(file) != "text" or not _is_binary(file)]
    elif os.path.exists(given):
        return [given]
    else:
        found = sorted(file for file in glob.glob(given, recursive=True) if os.path.isfile(file))
    if not found:
        raise UserError(f"input '{given}': expected a file, a folder with files or a glob, found nothing there.")
    return found


def _drop_hidden(folders: list[str]) -> bool:
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    return True


def _is_saved_dataset(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _is_binary(file: str) -> bool:
    with open_input(file) as handle:
        return b"\0" in handle.read(_SNIFFED_BYTES)


def open_input(file: str) -> IO[bytes]:
    """Open a file, or say why not."""
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _size_of(file: str) -> int:
    if os.path.isdir(file):
        return sum(entry.stat().st_size for entry in Path(file).rglob("*") if entry.is_file())
    open_input(file).close()
    return os.path.getsize(file)


def _kind_of(file: str) -> str:
    stem, suffix = os.path.splitext(file.lower())
    return _KINDS.get(os.path.splitext(stem)[1] if suffix in _COMPRESSION else suffix, "text")


def _slices_of(file: str, size: int, piece_bytes: int, format: str, text_unit: str) -> list[Slice]:
    if os.path.isdir(file):
        return _arrow_slices(file, size, piece_bytes)
    kind = _kind_of(file) if format == "auto" else format
    if kind == "parquet":
        return _parquet_slices(file)
    if kind == "text":
        kind = f"text/{text_unit}"
    if kind in ("text/file", "text/paragraph") or compression_of(file):  # these cannot be entered in the middle
        return [Slice(file, kind, 0, size, size)]
    starts = range(0, size, piece_bytes)
    return [
        Slice(file, kind, first, min(first + piece_bytes, size), min(piece_bytes, size - first)) for first in starts
    ]


def _parquet_slices(file: str) -> list[Slice]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: no readable parquet file ({one_line(error)}). Make or copy it again.") from error
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [Slice(file, "parquet", i, i + 1, group.total_byte_size) for i, group in enumerate(groups)]


def _arrow_slices(folder: str, size: int, piece_bytes: int) -> list[Slice]:
    rows = len(load_saved_data(folder))
    count = max(1, -(-size // piece_bytes))
    bounds = [rows * number // count for number in range(count + 1)]
    return [Slice(folder, "arrow", first, last, size // count) for first, last in pairwise(bounds) if last > first]


def _hub_slices(hub: HubData, piece_bytes: int) -> list[Slice]:
    if os.path.isdir(hub.name) and _is_saved_dataset(hub.name):
        folder = os.path.join(hub.name, hub.split)
        folder = folder if os.path.isdir(folder) else hub.name
        return _arrow_slices(folder, _size_of(folder), piece_bytes)
    name = json.dumps([hub.name, hub.config, hub.split])
    shards = int(load_hub_data(name).num_shards)
    return [Slice(name, "hub", number, shards, 0) for number in range(shards)]


def _expansion(file: str) -> int:
    """About how much more text a compressed file holds than bytes."""
    return 3 if compression_of(file) or file.endswith(".parquet") else 1


def _group(slices: Iterable[Slice], piece_bytes: int) -> list[Piece]:
    """Pieces of about ``piece_bytes``: small inputs together, each shard of a hub data set alone."""
    pieces: list[Piece] = []
    current: list[Slice] = []
    weight = 0
    for part in slices:
        weight += part.bytes * _expansion(part.path)
        if current and (part.kind == "hub" or weight > piece_bytes):
            pieces.append(Piece(tuple(current)))
            current, weight = [], part.bytes * _expansion(part.path)
        current.append(part)
    return [*pieces, Piece(tuple(current))] if current else pieces


def compression_of(file: str) -> str | None:
    """``gzip``, ``zstd`` or None, by the name."""
    return _COMPRESSION.get(os.path.splitext(file.lower())[1])


def load_saved_data(folder: str) -> Any:
    """The data set in a folder that ``datasets.save_to_disk`` wrote."""
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(folder)
    except Exception as error:  # Arrow, JSON and the library each raise their own
        raise UserError(
            f"data set '{folder}': cannot be opened ({one_line(error)}). Save it again with datasets.save_to_disk."
        ) from error
    if not isinstance(data, Dataset):
        raise UserError(f"data set '{folder}': it has the splits {', '.join(data)}. Choose one with --dataset-split.")
    return data


def load_hub_data(name: str) -> Any:
    """The hub data set ``[name, config, split]`` (JSON), read as a stream."""
    from datasets import load_dataset

    path, config, split = json.loads(name)
    try:
        return load_dataset(path, config, split=split, streaming=True)
    except Exception as error:  # network, name, config, split: the library raises many kinds
        raise UserError(
            f"data set '{path}' (config {config}, split {split}): cannot be opened: {one_line(error)}. "
            "Check the names and the network, or give a local folder."
        ) from error


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
