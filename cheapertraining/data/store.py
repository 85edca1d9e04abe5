"""Random access to the rows of token shards: a StreamingDataset below, memory maps above.

StreamingDataset downloads, caches, decompresses, hash-checks and evicts shards; it is never asked which sample comes
next. Rows are read here through one memory map a shard, since opening a file for every sample is most of the cost of
its own reader.
"""

from __future__ import annotations

import mmap
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data import shared_memory
from cheapertraining.data.rows import TokenRows
from cheapertraining.data.shards import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    META_FILE,
    ShardMeta,
    check_compatible,
    read_document_hashes,
    read_meta,
)
from cheapertraining.data.sidecar import SidecarFolder
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from streaming import StreamingDataset
    from streaming.base.format.base.reader import JointReader

__all__ = ["ShardFolder", "ShardStore", "missing_shards"]

_EVICTION_RETRIES = 8
_REMOTE, _PREPARING = 1, 2  # states of a shard in Streaming, which exports no names for them


@dataclass(frozen=True)
class ShardFolder:
    """Where the shards of one source and split lie: ``local`` is the folder, or the cache of ``remote``."""

    name: str
    local: Path
    remote: str | None = None


def missing_shards(folder: ShardFolder, hint: str | None) -> UserError:
    """What to say where a folder has no index; ``hint`` is what to run."""
    todo = f"Run `{hint}` first." if hint else "Check the path, or make the shards."
    return UserError(f"no shards of '{folder.name}': {folder.local / INDEX_FILE} not found. {todo}")


class ShardStore:
    """All shard folders of a run, numbered in the order given.

    Args:
        folders: one per source and split.
        seq_len: tokens in a row; shards with another are refused.
        tokenizer: shards made with another are refused; None skips that check.
        cache_limit: most bytes of remote shards to keep on disk, such as ``"100gb"``; refused for local-only folders,
            whose only copy eviction would delete.
        validate_hash: hash algorithm to check downloads with.
        download_retry: attempts a download gets after the first.
        hint: what to run when shards are missing; part of the message.

    Raises:
        UserError: missing, truncated or empty shards, another ``seq_len`` or tokenizer.
    """

    def __init__(
        self,
        folders: Sequence[ShardFolder],
        *,
        seq_len: int,
        tokenizer: TokenizerWrapper | None = None,
        cache_limit: str | None = None,
        validate_hash: str | None = None,
        download_retry: int = 2,
        hint: str | None = None,
    ) -> None:
        self.folders = tuple(folders)
        self.seq_len = seq_len
        local_only = [folder for folder in folders if folder.remote is None]
        if cache_limit is not None and local_only:
            raise UserError(
                f"data.cache_limit: eviction would delete the only copy of the shards in {local_only[0].local}. "
                "Give the folder a remote, or remove cache_limit."
            )
        self._cache_limit = cache_limit
        self._download_retry = download_retry
        self._fetch_metas(hint)
        self.metas: tuple[ShardMeta, ...] = tuple(read_meta(folder.local) for folder in folders)
        for folder, meta in zip(folders, self.metas, strict=True):
            check_compatible(folder.local, meta, seq_len=seq_len, tokenizer=tokenizer)
        self._dataset = self._open_dataset(validate_hash, download_retry)
        self._check_shards()
        sizes = self._dataset.samples_per_shard
        self._shard_ends: NDArray[np.int64] = np.cumsum(sizes)
        self._first_sample = np.append(self._dataset.sample_offset_per_stream, self._dataset.num_samples)
        self.row_dtype = np.dtype(self.metas[0].token_dtype)
        self._masked = np.array([meta.loss_tokens is not None for meta in self.metas])
        self._sidecars: dict[str, dict[int, SidecarFolder]] = {}
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()
        # Evicted shards keep their disk space for as long as they are mapped, see _touch.
        self._keep_maps = 64 if cache_limit else 1024

    def shard_sizes(self, folder: int) -> list[int]:
        """Samples in each shard of folder number ``folder``."""
        first, count = self._shards_of(folder)
        return [int(n) for n in self._dataset.samples_per_shard[first : first + count]]

    def samples(self, folder: int) -> int:
        """Samples in folder number ``folder``."""
        return int(self._dataset.samples_per_stream[folder])

    def ids(self, folders: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row ids of samples: one number for (folder, index within the folder)."""
        return np.asarray(self._first_sample[folders] + samples, np.int64)

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Folder and index within the folder of row ids."""
        folders = np.searchsorted(self._first_sample, ids, side="right") - 1
        return folders, ids - self._first_sample[folders]

    def attach(self, name: str, sidecars: Mapping[int, SidecarFolder]) -> None:
        """Read a record beside each row of some folders from now on; workers that run already do not notice.

        Args:
            name: of the records in what :meth:`read` returns, and in batches.
            sidecars: by number of the folder; rows of other folders have records of zeros, and where no row of a read
                has one, there is none in it.
        """
        self._sidecars[name] = dict(sidecars)

    def read(self, ids: NDArray[np.int64]) -> TokenRows:
        """The rows with these ids, in this order, downloading their shards where needed."""
        shards = np.searchsorted(self._shard_ends, ids, side="right")
        within = ids - (self._shard_ends[shards] - self._dataset.samples_per_shard[shards])
        row_bytes = self.seq_len * self.row_dtype.itemsize
        maps = self._maps
        tokens, lengths, pieces = [], [], []
        loss_mask = self._read_loss_mask(shards, within) if self._masked.any() else None
        for shard, row in zip(shards.tolist(), within.tolist(), strict=True):  # the hot loop of the loader
            data, token_starts, piece_lengths, piece_starts = maps.get(shard) or self._map(shard)
            start = token_starts[row]
            tokens.append(data[start : start + row_bytes])
            first, last = piece_starts[row], piece_starts[row + 1]
            lengths.append(piece_lengths[first:last])
            pieces.append(last - first)
        if self._cache_limit:
            self._touch(shards)
        rows = np.frombuffer(b"".join(tokens), self.row_dtype).reshape(len(ids), self.seq_len)
        return TokenRows(
            rows,
            np.frombuffer(b"".join(lengths), "<u4"),
            np.array(pieces, np.int64),
            loss_mask,
            self._read_sidecars(ids, rows) if self._sidecars else {},
        )

    def _read_sidecars(self, ids: NDArray[np.int64], tokens: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
        """uint8 ``[N, L]`` by name."""
        folders, samples = self.locate(ids)
        found = {}
        for name, sidecars in self._sidecars.items():
            records: dict[int, memoryview] = {}
            for folder in np.unique(folders).tolist():
                if (sidecar := sidecars.get(folder)) is not None:
                    mine = np.flatnonzero(folders == folder)
                    records |= zip(mine.tolist(), sidecar.read(samples[mine], tokens[mine]), strict=True)
            if records:
                found[name] = np.zeros((len(ids), max(map(len, records.values()))), np.uint8)
                for row, record in records.items():
                    found[name][row, : len(record)] = np.frombuffer(record, np.uint8)
        return found

    def _read_loss_mask(self, shards: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 ``[N, S]``; ones for rows of shards without a loss mask."""
        mask = np.ones((len(shards), self.seq_len), np.uint8)
        masked = self._masked[self._dataset.stream_per_shard[shards]]
        for number in np.flatnonzero(masked).tolist():
            shard = int(shards[number])
            mapped = self._maps.get(shard) or self._map(shard)
            end = mapped.token_starts[int(within[number])]
            mask[number] = np.frombuffer(mapped.data[end - self.seq_len : end], np.uint8)
        return mask

    @property
    def has_remote(self) -> bool:
        """Whether any folder may have to be downloaded."""
        return any(folder.remote is not None for folder in self.folders)

    def fetch(self, folder: int, shard: int) -> None:
        """Download shard number ``shard`` of a folder unless it is there or on its way."""
        self._prepare(self._shards_of(folder)[0] + shard, blocking=False)

    def document_hashes(self, folder: int) -> NDArray[np.uint64]:
        """uint64 ``[documents]`` hashes of the documents of a folder, downloaded when first asked for.

        Raises:
            UserError: they cannot be downloaded.
        """
        self._fetch_sidecar(self.folders[folder], DOCUMENTS_FILE)
        return read_document_hashes(self.folders[folder].local)

    def after_fork(self) -> None:
        """To be called in a DataLoader worker: a file lock must not be shared with the parent process."""
        self._dataset.__dict__.pop("_cache_filelock", None)

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps and file locks stay with their process (workers that are spawned make their own)."""
        state = self.__dict__.copy()
        state["_maps"] = OrderedDict()
        return state

    def _shards_of(self, folder: int) -> tuple[int, int]:
        return int(self._dataset.shard_offset_per_stream[folder]), int(self._dataset.shards_per_stream[folder])

    def _fetch_metas(self, hint: str | None) -> None:
        """Bring ``meta.json`` of remote folders; refuse local folders without an index."""
        for folder in self.folders:
            if folder.remote is not None:
                self._fetch_sidecar(folder, META_FILE)
            elif not (folder.local / INDEX_FILE).is_file():
                raise missing_shards(folder, hint)

    def _fetch_sidecar(self, folder: ShardFolder, name: str) -> None:
        """Bring one file that lies beside the shards; kept once it is there."""
        if folder.remote is not None and not (folder.local / name).is_file():
            from cheapertraining.data.stream import download_beside

            download_beside(folder.name, folder.remote, folder.local, (name,), self._download_retry)

    def _open_dataset(self, validate_hash: str | None, download_retry: int) -> StreamingDataset:
        from streaming import StreamingDataset

        from cheapertraining.data.stream import ShardStream

        streams = [
            ShardStream(folder.name, folder.remote, folder.local, download_retry, validate_hash)
            for folder in self.folders
        ]

        def make() -> StreamingDataset:
            _barrier()  # ranks must look for a free prefix only after the first has cleaned
            return StreamingDataset(streams=streams, cache_limit=self._cache_limit, batch_size=1)

        try:
            return shared_memory.open_dataset(make)
        except UserError:
            raise
        except RuntimeError as error:
            if "contains no samples" in str(error):
                raise UserError(
                    f"{error} An empty source cannot be sampled; remove it or make its shards anew."
                ) from error
            if "took too long" in str(error):  # said where the node's first rank could not bring an index
                raise UserError(f"{error}") from error
            raise
        except (KeyError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"shards of {', '.join(folder.name for folder in self.folders)}: cannot be opened: {reason}"
            ) from error

    def _check_shards(self) -> None:
        """Compare each shard file that is there with the size and the number of samples its index names."""
        shards = cast("list[JointReader]", self._dataset.shards)  # an MDS shard is one raw file, perhaps one zip
        for number, shard in enumerate(shards):
            folder = int(self._dataset.stream_per_shard[number])
            for info in (shard.raw_data, shard.zip_data):
                if info is None or not (file := self.folders[folder].local / info.basename).is_file():
                    continue
                if (found := file.stat().st_size) != info.bytes:
                    raise UserError(
                        f"{file}: truncated or overwritten: expected {info.bytes} bytes, found {found}. "
                        "Make or copy this shard again."
                    )
            if self.folders[folder].remote is None and not self._is_present(folder, shard):
                raise UserError(
                    f"{self.folders[folder].local / shard.raw_data.basename}: "
                    "shard file not found. Make or copy it again."
                )
        for folder, meta in enumerate(self.metas):
            if meta.samples != self.samples(folder):
                raise UserError(
                    f"{self.folders[folder].local}: meta.json counts {meta.samples} samples, index.json "
                    f"{self.samples(folder)}. The folder mixes two versions; make its shards anew."
                )

    def _is_present(self, folder: int, shard: JointReader) -> bool:
        files = [info.basename for info in (shard.raw_data, shard.zip_data) if info]
        return any((self.folders[folder].local / name).is_file() for name in files)

    def _map(self, shard: int) -> MappedShard:
        """Map a shard into memory, downloading or decompressing it where needed."""
        number = int(self._dataset.stream_per_shard[shard])
        folder = self.folders[number]
        reader = cast("JointReader", self._dataset.shards[shard])
        file = folder.local / reader.raw_data.basename
        for _ in range(_EVICTION_RETRIES):
            if not file.is_file() or self._cache_limit:
                self._prepare(shard)
            try:
                mask_bytes = self.seq_len if self._masked[number] else 0
                mapped = map_shard(file, self.seq_len * self.row_dtype.itemsize, reader.samples, mask_bytes)
                break
            except FileNotFoundError:  # evicted by another process since; download it again
                continue
        else:
            raise UserError(f"{file}: evicted again and again before it could be read. Raise data.cache_limit.")
        self._maps[shard] = mapped
        if len(self._maps) > self._keep_maps:
            self._maps.popitem(last=False)
        return mapped

    def _prepare(self, shard: int, blocking: bool = True) -> None:
        """Have a shard downloaded or unpacked.

        Streaming leaves one that failed marked as under way, and whoever needs it next would wait without end.

        Raises:
            UserError: that is not possible.
        """
        dataset = self._dataset
        try:
            dataset.prepare_shard(shard, blocking)
        except Exception as error:
            lock = dataset._cache_filelock
            lock.release(force=True)  # held where the error came while it evicted
            with lock:
                if dataset._shard_states[shard] == _PREPARING:
                    dataset._shard_states[shard] = _REMOTE
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"data.cache_limit: no room for a shard of '{self._name_of(shard)}' ({error}). Raise it."
            ) from error

    def _name_of(self, shard: int) -> str:
        return self.folders[int(self._dataset.stream_per_shard[shard])].name

    def _touch(self, shards: NDArray[np.int64]) -> None:
        """Tell the eviction which shards are in use, and let go of those it has removed: a map keeps the disk space."""
        now = time.time_ns()
        for shard in np.unique(shards).tolist():
            self._dataset._shard_access_times[shard] = now
        states = self._dataset._shard_states.numpy()
        for shard in [shard for shard in self._maps if states[shard] == _REMOTE]:
            del self._maps[shard]


class MappedShard(NamedTuple):
    """One MDS shard in memory.

    Attributes:
        data: the bytes of the file.
        token_starts: byte at which the tokens of each row begin.
        lengths: uint32, the document lengths of all rows.
        piece_starts: the first of each row's lengths in ``lengths``, and the end.
    """

    data: memoryview
    token_starts: memoryview
    lengths: memoryview
    piece_starts: memoryview


def map_shard(file: Path, row_bytes: int, samples: int, mask_bytes: int = 0) -> MappedShard:
    """Map a shard and find its rows of ``row_bytes`` bytes of tokens, perhaps with ``mask_bytes`` of loss mask.

    MDS file: uint32 count ``n``, uint32 ``n + 1`` offsets, a header, then the samples. A sample of ours: uint32 size of
    the ``doc_lengths`` field, that field (one byte of rank and shape type, the shape, the values), the loss mask of
    conversations, then the tokens.

    Raises:
        UserError: the file ends early, or its samples are something else.
    """
    with file.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    raw = np.frombuffer(mapped, np.uint8)
    offsets = np.frombuffer(mapped, "<u4", samples + 1, 4).astype(np.int64)
    if offsets[-1] != len(raw):
        raise UserError(
            f"{file}: truncated: its last sample ends at byte {offsets[-1]}, the file at {len(raw)}. "
            "Make or copy it again."
        )
    token_starts = offsets[1:] - row_bytes
    kind = offsets[:-1] + 4  # the byte of rank and shape type, behind the field's size
    values = kind + 1 + (1 << (raw[kind] & 3).astype(np.int64))
    counts = (token_starts - mask_bytes - values) // 4
    if (raw[kind] >> 2 != 1).any() or (counts < 1).any():
        raise UserError(
            f"{file}: its samples are not rows of {row_bytes} bytes with doc_lengths. Make the shards anew."
        )
    piece_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    index = np.repeat(values - 4 * piece_starts[:-1], 4 * counts) + np.arange(4 * piece_starts[-1])
    lengths = raw[index].view("<u4")
    return MappedShard(memoryview(mapped), token_starts.data, lengths.data, piece_starts.data)


def _barrier() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
