"""Records beside token shards: an MDS folder of its own whose sample ``i`` belongs to row ``i`` of a shard folder.

Columns: ``record`` (bytes, whatever it means to whoever made it), ``sample`` (uint64, the index of the row) and
``crc32`` (uint32, of the bytes of the row's tokens). The two let a record that belongs to another row, or to a row that
was made anew since, be told from the right one.
"""

from __future__ import annotations

import mmap
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.shard_files import ShardEntry, read_index
from cheapertraining.data.shards import INDEX_FILE
from cheapertraining.errors import UserError

__all__ = ["SIDECAR_COLUMNS", "SidecarFolder", "token_checksum"]

SIDECAR_COLUMNS = {"crc32": "uint32", "record": "bytes", "sample": "uint64"}
_HEAD, _TAIL = 4 + 4, 8  # bytes around a record: its size, crc32; sample
_KEEP_MAPS = 256


def token_checksum(tokens: NDArray[Any]) -> int:
    """CRC-32 of the bytes of one row of tokens, uint16 or uint32 ``[S]`` as in its shard."""
    return zlib.crc32(np.ascontiguousarray(tokens).data)


class SidecarFolder:
    """The records of one shard folder, read through one memory map a file.

    Args:
        folder: of the records; on a disk that every process sees.
        samples: rows of the shard folder that they belong to.
        remedy: what to do about a folder that is not what it should be; the end of every message.

    Raises:
        UserError: no such folder, other columns, a number of records that is not ``samples``, or a file of another size
            than the index names.
    """

    def __init__(self, folder: Path, samples: int, remedy: str) -> None:
        self.folder = folder
        self.remedy = remedy
        if not (folder / INDEX_FILE).is_file():
            raise UserError(f"{folder / INDEX_FILE}: expected a finished folder of records, found none. {remedy}")
        self._entries = read_index(folder)
        self._ends: NDArray[np.int64] = np.cumsum([entry.samples for entry in self._entries], dtype=np.int64)
        found = int(self._ends[-1]) if len(self._ends) else 0
        if found != samples:
            raise UserError(f"{folder}: expected a record for each of {samples} rows, found {found}. {remedy}")
        for entry in self._entries:
            self._check(entry)
        self._maps: OrderedDict[int, tuple[memoryview, NDArray[np.int64]]] = OrderedDict()

    def read(self, samples: NDArray[np.int64], tokens: NDArray[Any]) -> list[memoryview]:
        """The records of rows.

        Args:
            samples: int64 ``[N]``, indices of rows.
            tokens: uint16 or uint32 ``[N, S]``, the rows.

        Raises:
            UserError: a record is of another row or of other tokens.
        """
        files = np.searchsorted(self._ends, samples, side="right")
        records = []
        for file, sample, row in zip(files.tolist(), samples.tolist(), tokens, strict=True):
            data, offsets = self._maps.get(file) or self._map(file)
            place = sample - (int(self._ends[file]) - self._entries[file].samples)
            first, last = int(offsets[place]), int(offsets[place + 1])
            checksum = int.from_bytes(data[first + 4 : first + _HEAD], "little")
            found = int.from_bytes(data[last - _TAIL : last], "little")
            if found != sample:
                raise UserError(
                    f"{self.folder}: expected the record of row {sample}, found that of {found}. {self.remedy}"
                )
            if checksum != token_checksum(row):
                raise UserError(f"{self.folder}: the record of row {sample} is of other tokens. {self.remedy}")
            records.append(data[first + _HEAD : last - _TAIL])
        return records

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps stay with their process."""
        return self.__dict__ | {"_maps": OrderedDict()}

    def _check(self, entry: ShardEntry) -> None:
        file = self.folder / entry.raw.name
        if dict(entry.columns) != SIDECAR_COLUMNS or entry.zip is not None:
            columns = dict(entry.columns)
            raise UserError(f"{file}: expected columns {SIDECAR_COLUMNS}, uncompressed, found {columns}. {self.remedy}")
        size = file.stat().st_size if file.is_file() else None
        if size != entry.raw.bytes:
            found = "no file" if size is None else f"{size}"
            raise UserError(
                f"{file}: truncated or missing: expected {entry.raw.bytes} bytes, found {found}. {self.remedy}"
            )

    def _map(self, number: int) -> tuple[memoryview, NDArray[np.int64]]:
        """The bytes of a file and where its samples begin, ``[samples + 1]`` (MDS: a count, then uint32 offsets)."""
        entry = self._entries[number]
        with (self.folder / entry.raw.name).open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = np.frombuffer(mapped, "<u4", entry.samples + 1, 4).astype(np.int64)
        if offsets[-1] != len(mapped) or (np.diff(offsets) < _HEAD + _TAIL).any():
            raise UserError(f"{self.folder / entry.raw.name}: damaged: its samples do not fill it. {self.remedy}")
        self._maps[number] = memoryview(mapped), offsets
        if len(self._maps) > _KEEP_MAPS:
            self._maps.popitem(last=False)
        return self._maps[number]
