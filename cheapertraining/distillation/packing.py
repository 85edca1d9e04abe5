"""What a teacher says about one row, as bytes: sampled ids with counts, or the top k with log-probabilities.

Position ``n`` of a row holds what the teacher says about token ``n + 1``. Positions after which nothing is predicted
(the last of a document, padding, masked tokens) hold nothing. Integers are little-endian.

Sampled, of ``S`` positions: uint8 ``[S]``, the number of distinct ids of each; then all entries in order, each an id in
its low bits and a count of 1 to 63 in its highest six. An entry has 3 bytes for vocabularies up to 262,144, else 4: 37
bytes a position with 12 ids.

Top-k: uint8 ``[S]``, 1 where there is something; then, for those positions in order, ``k`` ids (2, 3 or 4 bytes each),
``k`` log-probabilities (float16) and the log of what the other tokens have together (float16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cheapertraining.errors import UserError

__all__ = ["MAX_ROUNDS", "Kind", "Layout", "SampledEntries", "TopEntries", "pack_sampled", "pack_top"]

Kind = Literal["sampled", "top_k"]
MAX_ROUNDS = 63
"""Largest count that six bits hold."""
_COUNT_BITS = 6
_FLOOR = float(np.finfo(np.float16).min)  # stands for the log of 0, which float16 would have as -inf


@dataclass(frozen=True)
class SampledEntries:
    """Sampled ids on a device, filled up to the most that a position has.

    Attributes:
        ids: int64 ``[B, S, K]``; 0 where there is no entry.
        counts: float32 ``[B, S, K]``; 0 where there is no entry. They sum to the number of draws, or to 0.
    """

    ids: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class TopEntries:
    """The most probable ids on a device.

    Attributes:
        ids: int64 ``[B, S, k]``, distinct.
        log_probs: float32 ``[B, S, k]``.
        log_tail: float32 ``[B, S]``, log of the probability of all other ids.
        present: bool ``[B, S]``: where there is something; elsewhere the others are 0.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    present: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """What the bytes mean.

    Attributes:
        kind: ``sampled`` or ``top_k``.
        size: draws for each position, or ``k``.
        vocab_size: ids are below it.
        seq_len: positions in a row.

    Raises:
        UserError: too many draws, ``k`` above the vocabulary, or a vocabulary beyond 2**26.
    """

    kind: Kind
    size: int
    vocab_size: int
    seq_len: int

    def __post_init__(self) -> None:
        if self.kind == "sampled" and not 1 <= self.size <= MAX_ROUNDS:
            raise UserError(f"rounds: expected 1 to {MAX_ROUNDS} draws (a count has six bits), found {self.size}.")
        if self.kind == "top_k" and not 1 <= self.size <= self.vocab_size:
            raise UserError(f"top_k: expected 1 to the vocabulary of {self.vocab_size}, found {self.size}.")
        if self.vocab_size > 1 << (32 - _COUNT_BITS):
            raise UserError(f"vocabulary: expected at most {1 << 26} ids, found {self.vocab_size}.")

    @property
    def id_bytes(self) -> int:
        """Bytes of an id (top-k), or of an id with its count (sampled)."""
        if self.kind == "sampled":
            return 3 if self.vocab_size <= 1 << (24 - _COUNT_BITS) else 4
        return 2 if self.vocab_size <= 1 << 16 else 3 if self.vocab_size <= 1 << 24 else 4

    def unpack_sampled(self, records: torch.Tensor) -> SampledEntries:
        """Records of rows, uint8 ``[B, L]`` on any device."""
        counts = records[:, : self.seq_len].long()
        most = max(1, int(counts.max())) if counts.numel() else 1  # the one moment the device is waited for
        starts = counts.cumsum(1) - counts
        place = starts[:, :, None] + torch.arange(most, device=records.device)
        held = torch.arange(most, device=records.device) < counts[:, :, None]
        entries = _integers(records, self.seq_len + place * self.id_bytes, self.id_bytes)
        shift = 8 * self.id_bytes - _COUNT_BITS
        ids = torch.where(held, entries & ((1 << shift) - 1), 0)
        return SampledEntries(ids, torch.where(held, entries >> shift, 0).float())

    def unpack_top(self, records: torch.Tensor) -> TopEntries:
        """Records of rows, uint8 ``[B, L]`` on any device."""
        held, k, width = records[:, : self.seq_len] > 0, self.size, self.id_bytes
        stride = k * (width + 2) + 2
        base = self.seq_len + (held.long().cumsum(1) - 1).clamp(min=0) * stride
        column = torch.arange(k, device=records.device)
        ids = _integers(records, base[:, :, None] + column * width, width)
        places = base[:, :, None] + k * width + 2 * torch.arange(k + 1, device=records.device)
        bits = _integers(records, places, 2)
        logs = bits.to(torch.int32).to(torch.int16).view(torch.float16).float()  # the same 16 bits, read as a half
        logs = torch.where(held[:, :, None], logs, 0.0)
        return TopEntries(torch.where(held[:, :, None], ids, 0), logs[..., :k], logs[..., k], held)


def pack_sampled(layout: Layout, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> bytes:
    """The record of a row.

    Args:
        layout: of kind ``sampled``.
        ids: int64 ``[S, K]``.
        counts: int64 ``[S, K]``, draws of each id; entries with 0 are left out.
    """
    held = counts > 0
    shift = 8 * layout.id_bytes - _COUNT_BITS
    entries = (ids[held] | (counts[held] << shift)).astype("<u4")
    return bytes(held.sum(axis=1).astype(np.uint8)) + _low_bytes(entries, layout.id_bytes)


def pack_top(
    layout: Layout,
    ids: NDArray[np.int64],
    log_probs: NDArray[np.floating[Any]],
    log_tail: NDArray[np.floating[Any]],
    present: NDArray[np.bool_],
) -> bytes:
    """The record of a row.

    Args:
        layout: of kind ``top_k``.
        ids: int64 ``[S, k]``.
        log_probs: ``[S, k]``, nats.
        log_tail: ``[S]``, nats; ``-inf`` where the others have nothing.
        present: bool ``[S]``, positions that are kept.
    """
    rows = int(present.sum())
    packed = np.frombuffer(_low_bytes(ids[present].astype("<u4").reshape(-1), layout.id_bytes), np.uint8)
    logs = np.concatenate([log_probs[present], log_tail[present, None]], axis=1)
    halves = np.maximum(logs, _FLOOR).astype("<f2")
    body = np.concatenate([packed.reshape(rows, -1), halves.view(np.uint8).reshape(rows, -1)], axis=1)
    return bytes(present.astype(np.uint8)) + bytes(body.data)


def _low_bytes(values: NDArray[np.uint32], width: int) -> bytes:
    return bytes(np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4)[:, :width]).data)


def _integers(records: torch.Tensor, places: torch.Tensor, width: int) -> torch.Tensor:
    """Little-endian integers of ``width`` bytes that begin at ``places`` of each record, int64 of their shape.

    Places behind the end of a record are read from its end; whoever asks throws them away.
    """
    flat = places.reshape(len(records), -1)
    values = torch.zeros_like(flat)
    for byte in range(width):
        index = (flat + byte).clamp(max=records.shape[1] - 1)
        values |= records.gather(1, index).long() << (8 * byte)
    return values.view(places.shape)
