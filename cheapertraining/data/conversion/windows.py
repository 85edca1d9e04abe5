"""Phase 1: a piece of input to windows of packed rows, each committed by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.conversion.job import Job, write_json
from cheapertraining.data.documents import EncodedDocument, Record, document_hash
from cheapertraining.data.packed import pack_window, windows
from cheapertraining.data.records import read_piece
from cheapertraining.data.rows import TokenRows
from cheapertraining.data.shards import sync_folder
from cheapertraining.errors import UserError

__all__ = [
    "Progress",
    "Window",
    "committed_windows",
    "convert_piece",
    "disk_errors",
    "hash_piece",
    "mark_duplicates",
    "piece_report",
]


class Progress(Protocol):
    """Told how far a process is."""

    def add(self, bytes: int = 0, documents: int = 0, tokens: int = 0) -> None: ...


@dataclass(frozen=True)
class Window:
    """A committed window; ``splits`` has the counts of each split that has documents in it."""

    folder: Path
    splits: dict[str, dict[str, int]]

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(counts["documents"] for counts in self.splits.values())

    def rows(self, split: str) -> TokenRows:
        """The rows of a split, mapped from disk."""
        arrays = [self._array(split, name) for name in ("tokens", "lengths", "pieces")]
        mask = self._array(split, "loss_mask") if (self.folder / f"{split}.loss_mask.npy").exists() else None
        return TokenRows(arrays[0], arrays[1], arrays[2], mask)

    def document_hashes(self, split: str) -> NDArray[np.uint64]:
        """Hashes of the documents of a split, in order."""
        return self._array(split, "documents")

    def _array(self, split: str, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)
        return array


def convert_piece(job: Job, number: int, progress: Progress) -> None:
    """Make the windows of a piece that are not there yet, then its report; nothing where all is done.

    May be run again after a crash at any moment, but not by two processes at once.

    Raises:
        UserError: a bad record, where these are fatal, or the disk is full.
    """
    piece = job.pieces[number]
    if piece_report(job, number) is not None:
        progress.add(bytes=piece.bytes)
        return
    done = committed_windows(job, number)
    count = _Count()
    records = count.of(read_piece(piece, lambda n: progress.add(bytes=n), job.encoder.columns or None))
    documents = job.encoder.documents(records, sum(window.documents for window in done), _duplicates(job, number))
    made = len(done)
    for window in windows(documents, job.settings.window_tokens):
        _commit(job, number, made, window)
        made += 1
        progress.add(documents=len(window), tokens=sum(len(document.ids) for document in window))
    report = {
        "windows": made,
        "records": count.total,
        "problems": documents.problems.count,
        "messages": documents.problems.messages,
        "empty": documents.empty,
        "dropped": documents.dropped,
    }
    with disk_errors(job):
        write_json(job.work / "windows" / f"{number:06}.json", report)


def piece_report(job: Job, number: int) -> dict[str, Any] | None:
    """What the finished piece held; None where it is not finished."""
    file = job.work / "windows" / f"{number:06}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def committed_windows(job: Job, number: int) -> list[Window]:
    """The windows of a piece that are there, in order."""
    found: list[Window] = []
    while (folder := _window_folder(job, number, len(found))).is_dir():
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        found.append(Window(folder, counts))
    return found


def hash_piece(job: Job, number: int, progress: Progress) -> None:
    """Write the hashes of a piece's documents, for :func:`mark_duplicates`."""
    file = job.work / "hashes" / f"{number:06}.npy"
    piece = job.pieces[number]
    if not file.is_file():
        texts = job.encoder.texts(read_piece(piece, columns=job.encoder.columns or None))
        hashes = np.fromiter((document_hash(text) for text in texts), np.uint64)
        with disk_errors(job):
            _save(file, hashes)
    progress.add(bytes=piece.bytes)


def mark_duplicates(job: Job, most_in_memory: int = 50_000_000) -> None:
    """Write, for each piece of this part, which of its documents have come before in the input.

    A hash of 64 bits confounds two texts of a billion with probability 0.03; memory is bounded by taking the hashes
    in classes of at most about ``most_in_memory``.
    """
    folder = job.work / "duplicates"
    if (folder / "done").is_file():
        return
    hashes = [np.load(job.work / "hashes" / f"{n:06}.npy", mmap_mode="r") for n in range(len(job.pieces))]
    starts = np.cumsum([0, *(len(part) for part in hashes)])
    classes = np.uint64(1 + int(starts[-1]) // most_in_memory)
    repeated: list[list[NDArray[np.int64]]] = [[] for _ in hashes]
    for remainder in range(int(classes)):
        own = [np.flatnonzero(part % classes == remainder) for part in hashes]
        values = np.concatenate([part[index] for part, index in zip(hashes, own, strict=True)])
        pieces = np.repeat(np.arange(len(own)), [len(index) for index in own])
        numbers = np.concatenate(own)
        _, first = np.unique(values, return_index=True)
        again = np.ones(len(values), bool)
        again[first] = False
        for piece in np.unique(pieces[again]).tolist():
            repeated[piece].append(numbers[again & (pieces == piece)])
    with disk_errors(job):
        for piece in job.my_pieces:
            _save(folder / f"{piece:06}.npy", np.sort(np.concatenate([np.zeros(0, np.int64), *repeated[piece]])))
        (folder / "done").touch()


def _duplicates(job: Job, number: int) -> frozenset[int]:
    if not job.settings.deduplicate:
        return frozenset()
    return frozenset(np.load(job.work / "duplicates" / f"{number:06}.npy").tolist())


class _Count:
    """Counts what passes, independently of those who take it."""

    def __init__(self) -> None:
        self.total = 0

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            self.total += 1
            yield record


def _window_folder(job: Job, piece: int, window: int) -> Path:
    return job.work / "windows" / f"{piece:06}.{window:06}"


def _commit(job: Job, piece: int, number: int, documents: Sequence[EncodedDocument]) -> None:
    folder = _window_folder(job, piece, number)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    counts: dict[str, dict[str, int]] = {}
    split_of = job.settings.split_of(np.array([document.hash for document in documents], np.uint64))
    with disk_errors(job):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for index, (split, _) in enumerate(job.settings.splits):
            if chosen := [documents[i] for i in np.flatnonzero(split_of == index).tolist()]:
                counts[split] = _write_split(unfinished, job, split, chosen, (piece, number, index))
        (unfinished / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
        sync_folder(unfinished)
        unfinished.rename(folder)


def _write_split(
    folder: Path, job: Job, split: str, documents: Sequence[EncodedDocument], place: tuple[int, int, int]
) -> dict[str, int]:
    settings = job.settings
    tokenizer = job.encoder.tokenizer
    packed = pack_window(documents, settings.seq_len, settings.packing, tokenizer.pad_id, (settings.seed, *place))
    rows = packed.rows
    tokens = sum(len(document.ids) for document in documents)
    if int(rows.doc_lengths.sum()) != tokens:  # nothing may be lost, whatever the packing
        raise RuntimeError(f"packing made {int(rows.doc_lengths.sum())} tokens of {tokens}")
    arrays = {"tokens": rows.tokens.astype(job.token_dtype, copy=False), "lengths": rows.doc_lengths}
    arrays |= {"pieces": rows.pieces, "documents": np.array([document.hash for document in documents], np.uint64)}
    counts = {
        "documents": len(documents),
        "rows": len(rows),
        "tokens": tokens,
        "cut_documents": packed.cut_documents,
    }
    if rows.loss_mask is not None:
        arrays["loss_mask"] = rows.loss_mask
        counts["loss_tokens"] = int(rows.loss_mask.sum())
    for name, array in arrays.items():
        np.save(folder / f"{split}.{name}.npy", array, allow_pickle=False)
    return counts


def _save(file: Path, array: NDArray[Any]) -> None:
    """Save an array so that the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{os.getpid()}.{file.name}")
    np.save(unfinished, array, allow_pickle=False)
    os.replace(unfinished, file)


@contextmanager
def disk_errors(job: Job) -> Iterator[None]:
    """Turn what the operating system says while writing into one message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{job.work}: cannot be written ({error.strerror or error}). Make room or mend the permissions, then run "
            "the same command with --resume: what is finished is kept."
        ) from error
