"""Shard folders, cut into the parts that are scored one by one.

Parts and the batches in them depend on the shards and the batch size alone, never on how many processes share the
work: the same sample is always computed beside the same neighbours, so its score is the same to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from cheapertraining.data.collate import Batch, collate
from cheapertraining.data.inspection import open_shard
from cheapertraining.data.rows import SampledRows, TokenRows
from cheapertraining.data.shard_files import ShardRows, find_shard_folders, read_index
from cheapertraining.data.shards import INDEX_FILE, ShardMeta, read_meta
from cheapertraining.errors import UserError

__all__ = ["Part", "ShardSet", "SplitRows", "check_alike", "open_sets", "part_batches", "plan_parts", "read_rows_of"]

_BATCHES_IN_PART = 16


@dataclass(frozen=True)
class ShardSet:
    """One shard folder.

    Attributes:
        name: of its source, with the split where two folders are of the same source.
        folder: where it is.
        meta: its ``meta.json``.
        shards: samples in each shard.
        digest: SHA-256 of its ``index.json``, which names size and hash of each shard.
    """

    name: str
    folder: Path
    meta: ShardMeta
    shards: tuple[int, ...]
    digest: str

    @property
    def samples(self) -> int:
        """Rows in all shards."""
        return sum(self.shards)


class Part(NamedTuple):
    """Rows ``first`` to ``last - 1`` of one shard of shard set number ``source``; ``sample_id`` is the first row's."""

    source: int
    shard: int
    first: int
    last: int
    sample_id: int


def open_sets(folders: Sequence[Path], what: str = "shards") -> tuple[ShardSet, ...]:
    """The shard folders that ``folders`` are, or that lie below them, in order.

    Raises:
        UserError: none, an empty one, two of the same source and split, or unreadable ones.
    """
    found = list(dict.fromkeys(folder for given in folders for folder in find_shard_folders(given)))
    if not found:
        raise UserError(f"{what}: expected at least one shard folder, found none. Name it.")
    metas = [read_meta(folder) for folder in found]
    sources = [meta.source for meta in metas]
    names = [meta.source if sources.count(meta.source) == 1 else f"{meta.source}/{meta.split}" for meta in metas]
    sets = []
    for name, folder, meta in zip(names, found, metas, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{what}: expected each source and split once, found '{name}' twice ({folder}). Leave one.")
        shards = tuple(entry.samples for entry in read_index(folder))
        if sum(shards) == 0:
            raise UserError(f"{folder}: expected at least one sample, found an empty folder. Leave it out.")
        digest = hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()
        sets.append(ShardSet(name, folder, meta, shards, digest))
    return tuple(sets)


def check_alike(sets: Sequence[ShardSet]) -> None:
    """Refuse shards that one model cannot have been trained on together.

    Raises:
        UserError: two of the folders differ in ``seq_len`` or tokenizer, or in one of them nothing is predicted.
    """
    first = sets[0]
    for other in sets:
        for key, text in (("seq_len", "seq_len"), ("tokenizer_fingerprint", "tokenizer (fingerprint)")):
            mine, theirs = getattr(first.meta, key), getattr(other.meta, key)
            if mine != theirs:
                raise UserError(
                    f"{other.folder}: expected the {text} of {first.folder}, {mine}, found {theirs}. Shards and probes "
                    "must be made with the same tokenizer and row length."
                )
        if other.meta.loss_tokens == 0:
            raise UserError(
                f"{other.folder}: expected tokens that are predicted, found a loss mask of zeros only. Leave it out."
            )


def plan_parts(sets: Sequence[ShardSet], batch_size: int) -> list[Part]:
    """All rows in order, in parts of at most 16 batches of one shard."""
    step = batch_size * _BATCHES_IN_PART
    parts = []
    for source, shard_set in enumerate(sets):
        begin = 0
        for shard, samples in enumerate(shard_set.shards):
            parts += [
                Part(source, shard, first, min(first + step, samples), begin + first)
                for first in range(0, samples, step)
            ]
            begin += samples
    return parts


def part_batches(sets: Sequence[ShardSet], part: Part, batch_size: int) -> Iterator[Batch]:
    """The batches of a part, ``source`` and ``sample_id`` set as in :class:`Part`."""
    rows = _shard(sets[part.source], part.shard)
    for first in range(part.first, part.last, batch_size):
        last = min(first + batch_size, part.last)
        index = np.arange(part.sample_id - part.first + first, part.sample_id - part.first + last)
        yield collate(SampledRows(_rows(rows, first, last), np.full(last - first, part.source), index))


def read_rows_of(shard_set: ShardSet, shard: int, rows: np.ndarray[Any, np.dtype[np.int64]]) -> TokenRows:
    """Rows of one shard by index within it, in the order given."""
    opened = _shard(shard_set, shard)
    lengths = [opened.lengths_of(row, row + 1) for row in rows.tolist()]
    chunk = opened.take(rows)
    pieces = np.array([len(part) for part in lengths], np.int64)
    return TokenRows(chunk.tokens, np.concatenate(lengths), pieces, chunk.loss_mask)


class SplitRows(Dataset[SampledRows]):
    """The rows of a shard set by index, such as those of a probe: a dataset for a DataLoader with ``collate``.

    Args:
        shard_set: whose rows.
        every: only every so many-th row, from the first.
    """

    def __init__(self, shard_set: ShardSet, every: int = 1) -> None:
        self.shard_set = shard_set
        self._ends = np.cumsum(shard_set.shards)
        self._rows = np.arange(0, shard_set.samples, every)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, samples: Sequence[int]) -> SampledRows:
        wanted = self._rows[np.asarray(samples, np.int64)]
        shards = np.searchsorted(self._ends, wanted, side="right")
        one = [
            read_rows_of(self.shard_set, shard, np.array([row - self._ends[shard] + self.shard_set.shards[shard]]))
            for shard, row in zip(shards.tolist(), wanted.tolist(), strict=True)
        ]
        masks = [rows.loss_mask for rows in one if rows.loss_mask is not None]
        joined = TokenRows(
            np.concatenate([rows.tokens for rows in one]),
            np.concatenate([rows.doc_lengths for rows in one]),
            np.concatenate([rows.pieces for rows in one]),
            np.concatenate(masks) if masks else None,
        )
        return SampledRows(joined, np.full(len(wanted), -1), wanted)

    def __getitem__(self, sample: int) -> SampledRows:
        return self.__getitems__([sample])


@lru_cache(maxsize=2)
def _shard(shard_set: ShardSet, number: int) -> ShardRows:
    """A shard; neighbouring parts are of the same one, so it is kept."""
    return open_shard(read_index(shard_set.folder)[number], shard_set.meta)


def _rows(rows: ShardRows, first: int, last: int) -> TokenRows:
    chunk = rows.take(np.arange(first, last))
    return TokenRows(chunk.tokens, rows.lengths_of(first, last), rows.pieces[first:last], chunk.loss_mask)
