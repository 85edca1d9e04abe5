"""What a conversion is to do, and the folder in which it keeps what is done."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.conversion.encoders import Encoder
from cheapertraining.data.packed import WINDOW_TOKENS
from cheapertraining.data.packing import PACKINGS
from cheapertraining.data.pieces import Piece
from cheapertraining.data.shards import DEFAULT_HASHES, DEFAULT_SHARD_BYTES, INDEX_FILE
from cheapertraining.errors import UserError, nearest

__all__ = ["DONE_FILE", "WORK_FOLDER", "Job", "Settings", "open_job", "write_json"]

WORK_FOLDER = ".conversion"
JOB_FILE = "job.json"
DONE_FILE = "conversion.json"
TOKEN_DTYPES = ("auto", "uint16", "uint32")
_ORPHANS_SECONDS = 60


@dataclass(frozen=True)
class Settings:
    """All that decides the bytes of the shards, besides inputs and encoder.

    Attributes:
        source: name of the source, for ``meta.json``.
        seq_len: tokens in a row.
        splits: share of the documents by split, decided by each document's hash; must sum to 1.
        packing: see :func:`~cheapertraining.data.packing.pack`.
        token_dtype: ``auto`` takes the smaller that holds the vocabulary.
        shard_bytes: size of a shard before compression.
        window_tokens: tokens packed together, at least; each process holds them in memory.
        compression: as Streaming names it, such as ``zstd:3``; None for none.
        hashes: algorithms whose digests of each shard go into ``index.json``.
        seed: decides the order of rows within a window.
        part: this is part ``part[0]`` (from 1) of ``part[1]`` that several machines make.
        deduplicate: keep only the first of documents with the same text (by 64-bit hash).
        license, origin: for ``meta.json``.
    """

    source: str
    seq_len: int
    splits: tuple[tuple[str, float], ...] = (("train", 1.0),)
    packing: str = "best_fit"
    token_dtype: str = "auto"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    window_tokens: int = WINDOW_TOKENS
    compression: str | None = None
    hashes: tuple[str, ...] = DEFAULT_HASHES
    seed: int = 0
    part: tuple[int, int] = (1, 1)
    deduplicate: bool = False
    license: str = "unknown"
    origin: str = "unknown"

    def __post_init__(self) -> None:
        for key, value, options in (
            ("packing", self.packing, PACKINGS),
            ("token dtype", self.token_dtype, TOKEN_DTYPES),
        ):
            if value not in options:
                raise UserError(
                    f"{key}: expected one of {', '.join(options)}, found '{value}'.{nearest(value, options)}"
                )
        shares = [share for _, share in self.splits]
        if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            found = ",".join(f"{name}:{share:g}" for name, share in self.splits)
            raise UserError(f"split shares: expected positive numbers that sum to 1, found {found}.")
        if self.seq_len < 2:
            raise UserError(f"seq_len: expected at least 2 tokens, found {self.seq_len}.")
        if not 1 <= self.part[0] <= self.part[1]:
            raise UserError(f"part: expected i/n with 1 <= i <= n, found {self.part[0]}/{self.part[1]}.")
        _check_algorithms(self.compression, self.hashes)

    def split_of(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Index of the split of each document hash."""
        shares = np.cumsum([share for _, share in self.splits])[:-1]
        bounds = np.array([int(share * 2.0**64) for share in shares], np.uint64)
        return np.searchsorted(bounds, hashes, side="right")


def _check_algorithms(compression: str | None, hashes: Sequence[str]) -> None:
    from streaming.base.compression import get_compressions, is_compression
    from streaming.base.hashing import get_hashes, is_hash

    if compression is not None and not is_compression(compression):
        known = sorted(get_compressions())
        raise UserError(f"compression: expected one of {', '.join(known)}, found '{compression}'.")
    for name in hashes:
        if not is_hash(name):
            raise UserError(f"hash: expected one of {', '.join(sorted(get_hashes()))}, found '{name}'.")


@dataclass(frozen=True)
class Job:
    """A conversion with its folder; picklable, so that any process that reaches the folder can work on it.

    Attributes:
        settings: what decides the bytes.
        encoder: records to documents.
        pieces: all pieces of the input, of all parts.
        destination: where shards go.
        work: local folder of what is done so far; removed at the end.
    """

    settings: Settings
    encoder: Encoder
    pieces: tuple[Piece, ...]
    destination: Destination
    work: Path

    @property
    def my_pieces(self) -> range:
        """Numbers of the pieces of this part."""
        number, count = self.settings.part
        return range((number - 1) * len(self.pieces) // count, number * len(self.pieces) // count)

    @property
    def part_name(self) -> str:
        """Folder of this part's share of the index, until parts are merged."""
        number, count = self.settings.part
        return f".parts/{number:04}-of-{count:04}"

    @property
    def token_dtype(self) -> str:
        """Of the rows.

        Raises:
            UserError: uint16 is asked for and does not hold the vocabulary.
        """
        smallest = self.encoder.tokenizer.token_dtype
        asked = self.settings.token_dtype
        if asked == "uint16" and smallest == "uint32":
            raise UserError(
                f"token dtype: uint16 holds ids below 65,536, the tokenizer '{self.encoder.tokenizer.path}' has "
                f"{self.encoder.tokenizer.vocab_size:,} tokens. Use auto or uint32."
            )
        return smallest if asked == "auto" else asked

    def describe(self) -> dict[str, Any]:
        """All that must be the same for a conversion to go on, JSON-able; nothing of it depends on the machine."""
        inputs = hashlib.sha256()
        for piece in self.pieces:
            for part in piece.slices:
                stamp = [part.path, part.kind, part.first, part.last, part.bytes]
                inputs.update(json.dumps(stamp).encode())
        return {
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "encoder": asdict(cast(Any, self.encoder)),
            "tokenizer": self.encoder.tokenizer.fingerprint,
            "inputs": inputs.hexdigest(),
        }


@contextmanager
def open_job(job: Job, resume: bool) -> Iterator[bool]:
    """Hold the job's folder for as long as the context lasts; yields False where all is done already.

    Raises:
        UserError: the destination or work folder holds something else, an unfinished conversion without ``resume``, or
            one with other settings; or another process is at work in it.
    """
    if _is_done(job, resume):
        yield False
        return
    _check_may_begin(job, resume)
    try:
        job.work.mkdir(parents=True, exist_ok=True)
        lock = open(job.work / "lock", "a+")  # noqa: SIM115 (held by the context)
    except OSError as error:
        raise UserError(f"{job.work}: cannot be written ({error.strerror}). Choose another folder.") from error
    with lock:
        _take_lock(job.work, lock)
        write_json(job.work / JOB_FILE, job.describe())
        for leftover in job.work.glob("windows/.*"):
            shutil.rmtree(leftover)
        yield True


def _is_done(job: Job, resume: bool) -> bool:
    """Whether this very conversion is finished; refuses the folder of another one."""
    for name in (DONE_FILE, f"{job.part_name}/{DONE_FILE}"):
        content = job.destination.get(name)
        if content is None or (name != DONE_FILE and job.settings.part[1] == 1):
            continue  # where there is one part only, it is finished when it is merged
        if resume and _without_part(json.loads(content)["job"]) == _without_part(job.describe()):
            shutil.rmtree(job.work, ignore_errors=True)
            return True
        other = " with other inputs or settings" if resume else ""
        raise UserError(
            f"{job.destination.root}: holds a finished conversion ({name}){other}. Choose another --out, or remove it."
        )
    return False


def _without_part(description: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in description["settings"].items() if key != "part"}
    return {**description, "settings": settings}


def _check_may_begin(job: Job, resume: bool) -> None:
    begun = job.work / JOB_FILE
    if not begun.is_file():
        _check_empty(job)
    elif not resume:
        raise UserError(
            f"{job.work}: holds an unfinished conversion. Run the same command with --resume to go on with it, or "
            "remove the folder to start anew."
        )
    else:
        _check_same(job, json.loads(begun.read_text(encoding="utf-8")))


def _check_empty(job: Job) -> None:
    for split, _ in job.settings.splits:
        if job.destination.get(f"{split}/{INDEX_FILE}") is not None:
            raise UserError(
                f"{job.destination.root}/{split}: holds shards already. Choose another --out, or remove them."
            )
    root = Path(job.destination.root)
    if job.settings.part[1] == 1 and not job.destination.is_remote and root.is_dir():
        others = sorted(entry.name for entry in root.iterdir() if entry.name != WORK_FOLDER)
        if others:
            raise UserError(f"{root}: expected an empty folder, found {', '.join(others[:3])}. Choose another --out.")


def _check_same(job: Job, before: dict[str, Any]) -> None:
    now = job.describe()
    old = {**before, **before["settings"], **before["encoder"]}
    for key, value in {**now, **now["settings"], **now["encoder"]}.items():
        # What was begun with on_error=fail holds no bad record, so it may go on with skip.
        if value != old.get(key) and key not in ("settings", "encoder", "on_error"):
            found = f"{old.get(key)} then, {value} now" if key != "inputs" else "other files, sizes or names"
            raise UserError(
                f"{job.work}: the unfinished conversion has another {key} ({found}). Go on with the old one, or "
                "remove the folder to start anew."
            )


def _take_lock(work: Path, lock: IO[str]) -> None:
    """Keep other conversions out, and wait for workers whose main process was killed to notice it and end."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{work}: another process is converting here. Wait for it, or stop it.") from error
    with open(work / "workers.lock", "a+") as workers:
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while True:
            try:
                fcntl.flock(workers, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{work}: processes of an earlier conversion are still at work. Stop them."
                    ) from error
                time.sleep(0.1)


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("w", encoding="utf-8") as handle:
        json.dump(content, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, file)
