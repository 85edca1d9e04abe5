"""Per-unit numbers on disk, written in parts by several processes: scores, and low-rank gradients (LoGra).

A folder with ``meta.json``, which says what the numbers are of, and one plain NumPy file a part, which is read through
a memory map. A part appears whole or not at all (it is written under another name and renamed), so a run that was
killed goes on with the parts that are missing. No file holds a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.parameters import canonical_name

__all__ = [
    "STORE_MODES",
    "GradientStore",
    "Parts",
    "StoreMode",
    "check_same",
    "model_fingerprint",
    "part_dtype",
    "read_json",
    "write_whole",
]

Float64 = NDArray[np.float64]
Records = NDArray[Any]
"""A structured array of :func:`part_dtype`."""

StoreMode = Literal["influence", "dot", "cosine", "self"]
STORE_MODES = ("influence", "dot", "cosine", "self")

META_FILE = "meta.json"
FORMAT_VERSION = 1
_BLOCK_BYTES = 1 << 26  # of gradients in memory at a time, while they are read
_HASH_BYTES = 1 << 26


def part_dtype(width: int, kind: str = "float64") -> np.dtype[Any]:
    """What a record holds.

    ``source`` is the number of its shard folder and ``sample_id`` the index of its row therein, ``document`` the
    number of a document within the row (0 for whole rows), ``tokens`` those that count in the loss, ``loss`` their sum
    of losses in nats, ``values`` its ``width`` numbers.
    """
    units = [("source", "<i8"), ("sample_id", "<i8"), ("document", "<i8"), ("tokens", "<i8"), ("loss", "<f8")]
    return np.dtype([*units, ("values", np.dtype(kind).newbyteorder("<"), (width,))])


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters; a tied one counts once, wrappers do not."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{canonical_name(name)} {list(parameter.shape)} {parameter.dtype}\n".encode())
        raw = parameter.detach().reshape(-1).view(torch.uint8)
        for piece in torch.split(raw, _HASH_BYTES):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def check_same(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any], remedy: str) -> None:
    """Refuse what was made otherwise than it would be now.

    Raises:
        UserError: naming the first entry that differs, what this run has, what was found, and ``remedy``.
    """
    for key in dict.fromkeys([*expected, *found]):
        mine, theirs = expected.get(key), found.get(key)
        if mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            inner = next(k for k in dict.fromkeys([*mine, *theirs]) if mine.get(k) != theirs.get(k))
            key, mine, theirs = f"{key}.{inner}", mine.get(inner), theirs.get(inner)
        raise UserError(f"{where}: made with another {key}: expected {_short(mine)}, found {_short(theirs)}. {remedy}")


class Parts:
    """Parts ``0`` to ``count - 1`` of an array of records, in a folder.

    Args:
        folder: made where it is not there yet.
        count: number of parts when all is done.
        dtype: of :func:`part_dtype`.
        identity: JSON-able; what the numbers are of. A folder that was made with another is refused.

    Raises:
        UserError: the folder was made with another identity, or its ``meta.json`` is unreadable.
    """

    def __init__(self, folder: Path, count: int, dtype: np.dtype[Any], identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.count = count
        self.dtype = dtype
        kind, (width,) = dtype["values"].subdtype or (None, (0,))
        expected = {"format_version": FORMAT_VERSION, "dtype": str(kind), "width": width, "parts": count, **identity}
        expected = json.loads(json.dumps(expected))  # as it will be read: tuples are lists
        meta = folder / META_FILE
        if meta.is_file():
            remedy = f"Give what it was made with, or remove {folder} to begin anew."
            check_same(folder, read_json(meta), expected, remedy)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(meta, (json.dumps(expected, indent=2) + "\n").encode())

    def path(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{number:06}.npy"

    def missing(self) -> list[int]:
        """Parts that are not there yet, in order."""
        return [number for number in range(self.count) if not self.path(number).is_file()]

    def write(self, number: int, records: Records) -> None:
        """Commit a part: once this returns it survives a kill and a power cut.

        Raises:
            UserError: a number in it is not finite, or the disk is full.
        """
        if not np.isfinite(records["values"]).all():
            row = int(np.flatnonzero(~np.isfinite(records["values"]).all(axis=1))[0])
            raise UserError(
                f"{self.path(number)}: expected finite numbers, found NaN or infinity for sample "
                f"{records['sample_id'][row]}. Check the model (has its training diverged?), or use float32."
            )
        unfinished = self._unfinished(number)
        try:
            with unfinished.open("wb") as handle:
                np.save(handle, np.ascontiguousarray(records), allow_pickle=False)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(unfinished, self.path(number))
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free / 2**20
            raise UserError(
                f"{self.path(number)}: cannot be written ({error.strerror or error}; {free:.0f} MiB free). Make room "
                "and resume: the parts before it are kept."
            ) from error

    def read(self, number: int) -> Records:
        """The records of a part, a read-only memory map.

        Raises:
            UserError: the part is missing or is something else.
        """
        try:
            records: Records = np.load(self.path(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path(number)}: unreadable ({error}). Remove it and resume.") from error
        if records.dtype != self.dtype or records.ndim != 1:
            raise UserError(
                f"{self.path(number)}: expected records of {self.dtype}, found {records.dtype}. Remove it and resume."
            )
        return records

    def _unfinished(self, number: int) -> Path:
        return self.folder / f".part-{number:06}.{os.getpid()}.unfinished"


class GradientStore:
    """Low-rank gradients of units, ``P g_i``, block by block: one block a parameter (LoGra, arXiv 2405.13954).

    Args:
        folder: of the store; made where it is not there yet.
        widths: columns of each parameter's block, in order; they sum to ``D``.
        parts: number of parts when it is complete.
        identity: JSON-able; at least the model's fingerprint, the projection's seed and rank, and the shards.
        dtype: ``float32``, or ``float16`` for half the space.

    Raises:
        UserError: the folder holds gradients of another model, seed, rank, other layers or shards.
    """

    def __init__(
        self,
        folder: Path,
        widths: Mapping[str, int],
        parts: int,
        identity: Mapping[str, Any],
        *,
        dtype: str = "float32",
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise UserError(f"gradient store: expected dtype float16 or float32, found '{dtype}'.")
        self.widths = dict(widths)
        self.columns = sum(widths.values())
        self.parts = Parts(folder, parts, part_dtype(self.columns, dtype), {**identity, "layers": dict(widths)})

    def write(self, number: int, units: Records, gradients: torch.Tensor) -> None:
        """Commit part ``number``.

        Args:
            units: records whose ``values`` are ignored, ``[n]``.
            gradients: ``[n, D]``.
        """
        records = np.zeros(len(units), self.parts.dtype)
        for name in ("source", "sample_id", "document", "tokens", "loss"):
            records[name] = units[name]
        with np.errstate(over="ignore"):  # said by Parts.write, with the sample
            records["values"] = gradients.detach().cpu().numpy().astype(self.parts.dtype["values"].base)
        self.parts.write(number, records)

    def check_complete(self) -> None:
        """Raises: UserError: parts are missing."""
        if missing := self.parts.missing():
            raise UserError(
                f"{self.parts.folder}: expected {self.parts.count} parts of gradients, found "
                f"{self.parts.count - len(missing)}. Fill the store first: the run that makes it goes on with --resume."
            )

    def covariances(self) -> dict[str, torch.Tensor]:
        """``P F P^T`` of each parameter: float64 ``[d, d]``, the mean over all units of ``(P g_i)(P g_i)^T``.

        Streams over the store. Units without a counting token are left out.
        """
        self.check_complete()
        sums = {name: torch.zeros(d, d, dtype=torch.float64) for name, d in self.widths.items()}
        units = 0
        for number in range(self.parts.count):
            for records, gradients in self._blocks(number):
                units += int((records["tokens"] > 0).sum())
                for name, block in self._split(gradients).items():
                    sums[name].addmm_(block.T, block)
        return {name: total / max(units, 1) for name, total in sums.items()}

    def solve(self, probes: torch.Tensor, damping: float = 0.1) -> torch.Tensor:
        """``(P F P^T + delta I)^-1 (P v)`` of each probe, block by block, ``[K, D]`` float64.

        Args:
            probes: ``[K, D]``, projected gradients of the probes' losses.
            damping: ``delta`` of a block is this share of its mean eigenvalue; a block of zeros is left alone.
        """
        factors = self._factors(damping)
        parts = self._split(probes.double()).items()
        return torch.cat([torch.cholesky_solve(block.T, factors[name]).T for name, block in parts], dim=1)

    def scores(
        self, probes: torch.Tensor | None, mode: StoreMode = "influence", *, damping: float = 0.1
    ) -> Iterator[tuple[int, Records, Float64]]:
        """Scores of all units, streamed: ``(part, records [n], scores [n, K])``, several for a part that is large.

        Args:
            probes: ``[K, D]``; not used by ``self``.
            mode: ``influence`` is ``(P v)^T (P F P^T + delta I)^-1 (P g_i)``; ``dot`` and ``cosine`` are between the
                projected gradients; ``self`` is ``influence`` of a unit on itself, ``K = 1``.
            damping: see :meth:`solve`.

        Raises:
            UserError: an unknown mode, parts are missing, or a probe of another width.
        """
        if mode not in STORE_MODES:
            expected = ", ".join(STORE_MODES)
            raise UserError(f"store mode: expected one of {expected}, found '{mode}'.{nearest(mode, STORE_MODES)}")
        self.check_complete()
        factors = self._factors(damping) if mode == "self" else {}
        wanted = torch.zeros(1, self.columns) if probes is None else probes
        if wanted.shape[1] != self.columns:
            raise UserError(f"store: expected probes of {self.columns} columns, found {wanted.shape[1]}.")
        directions = self.solve(wanted, damping) if mode == "influence" else wanted.double()
        if mode == "cosine":
            directions = nn.functional.normalize(directions, dim=1)
        for number in range(self.parts.count):
            for records, gradients in self._blocks(number):
                if mode == "self":
                    values = self._self_influence(gradients, factors)
                else:
                    units = nn.functional.normalize(gradients, dim=1) if mode == "cosine" else gradients
                    values = units @ directions.T
                yield number, records, values.numpy()

    def _self_influence(self, gradients: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(len(gradients), 1, dtype=torch.float64)
        for name, block in self._split(gradients).items():
            whitened = torch.linalg.solve_triangular(factors[name], block.T, upper=False)
            total += whitened.square().sum(dim=0)[:, None]
        return total

    def _factors(self, damping: float) -> dict[str, torch.Tensor]:
        """Cholesky factors of the damped covariances."""
        if damping <= 0:
            raise UserError(f"damping: expected a share above 0 of the mean eigenvalue, found {damping}.")
        factors = {}
        for name, covariance in self.covariances().items():
            mean = float(covariance.diagonal().mean())
            eye = torch.eye(len(covariance), dtype=torch.float64)
            factors[name] = torch.linalg.cholesky(covariance + (damping * mean if mean > 0 else 1.0) * eye)
        return factors

    def _blocks(self, number: int) -> Iterator[tuple[Records, torch.Tensor]]:
        """Records of a part and their gradients in float64 ``[n, D]``, some at a time."""
        records = self.parts.read(number)
        step = max(1, _BLOCK_BYTES // (8 * max(self.columns, 1)))
        for first in range(0, len(records), step):
            chunk = records[first : first + step]
            yield chunk, torch.from_numpy(chunk["values"].astype(np.float64))

    def _split(self, gradients: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.widths, torch.split(gradients, list(self.widths.values()), dim=1), strict=True))


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: it is unreadable.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no mapping at its top")
        return content
    except ValueError as error:
        raise UserError(f"{file}: unreadable ({error}). Remove {file.parent} to begin anew.") from error


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; written by several processes, the last one's stays."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    with unfinished.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, file)


def _short(value: Any) -> str:
    """A value for a message: long hashes and lists are cut."""
    text = json.dumps(value) if isinstance(value, Sequence | Mapping) and not isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-12:]}"
