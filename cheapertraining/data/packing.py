"""Documents to rows of one fixed length, with the bounds of the documents kept.

A *piece* is a run of tokens of one document; a *row* is a list of pieces whose lengths sum to at most
``seq_len`` (what is missing is padding). Every token of every document lands in exactly one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cheapertraining.errors import UserError, nearest

__all__ = ["PACKINGS", "Rows", "pack"]

PACKINGS = ("best_fit", "concat", "pad")


@dataclass(frozen=True)
class Rows:
    """Rows in compressed form: the pieces of row ``r`` are ``row_start[r]:row_start[r + 1]``.

    Attributes:
        row_start: int64 ``[rows + 1]``.
        document: int64 ``[pieces]``, the document of each piece.
        offset: int64 ``[pieces]``, its first token in that document.
        length: int64 ``[pieces]``, its number of tokens.
        seq_len: tokens in a row, padding included.
    """

    row_start: NDArray[np.int64]
    document: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    seq_len: int

    def __len__(self) -> int:
        return len(self.row_start) - 1

    @property
    def tokens(self) -> int:
        """Tokens of documents in all rows."""
        return int(self.length.sum())

    @property
    def padding(self) -> int:
        """Padding tokens in all rows."""
        return len(self) * self.seq_len - self.tokens

    @property
    def cut_documents(self) -> int:
        """Documents that lie in more than one piece."""
        pieces = np.bincount(self.document) if len(self.document) else np.zeros(0, np.int64)
        return int((pieces > 1).sum())


def pack(lengths: NDArray[np.int64], seq_len: int, packing: str = "best_fit") -> Rows:
    """Plan rows of ``seq_len`` tokens for documents of the given lengths.

    Args:
        lengths: int64 ``[documents]``, tokens in each document, all positive.
        seq_len: tokens in a row.
        packing: ``best_fit`` cuts only documents longer than a row, and pads least (best-fit decreasing,
            Ding et al. 2024, arXiv 2404.10830); ``concat`` joins all documents and cuts every ``seq_len``
            tokens, padding only the last row; ``pad`` gives each piece of a document its own row.

    Raises:
        UserError: an unknown packing, or a length or ``seq_len`` below one.
    """
    if packing not in PACKINGS:
        raise UserError(
            f"packing: expected one of {', '.join(PACKINGS)}, found '{packing}'.{nearest(packing, PACKINGS)}"
        )
    lengths = np.asarray(lengths, np.int64)
    if seq_len < 1 or (len(lengths) and lengths.min() < 1):
        raise UserError(f"packing: seq_len and all document lengths must be at least 1 (seq_len is {seq_len}).")
    if packing == "concat":
        return _concat(lengths, seq_len)
    document, offset, length = _split_long(lengths, seq_len)
    row = np.arange(len(length)) if packing == "pad" else _best_fit_rows(length, seq_len)
    order = np.argsort(row, kind="stable")
    row_start = np.zeros(int(row.max(initial=-1)) + 2, np.int64)
    np.cumsum(np.bincount(row, minlength=len(row_start) - 1), out=row_start[1:])
    return Rows(row_start, document[order], offset[order], length[order], seq_len)


def _split_long(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], ...]:
    """Document, offset and length of pieces of at most ``seq_len`` tokens, in document order."""
    pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = nth * seq_len
    return document, offset, np.minimum(lengths[document] - offset, seq_len)


def _concat(lengths: NDArray[np.int64], seq_len: int) -> Rows:
    """Cut the joined documents at every multiple of ``seq_len``; pieces end at rows' and documents' ends."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.union1d(ends, np.arange(seq_len, total, seq_len))
    starts = np.concatenate([np.zeros(min(1, len(borders)), np.int64), borders[:-1]]).astype(np.int64)
    document = np.searchsorted(ends, starts, side="right")
    offset = starts - (ends[document] - lengths[document])
    row_start = np.searchsorted(starts, np.arange(0, total + seq_len, seq_len))
    rows = -(-total // seq_len)
    return Rows(row_start[: rows + 1].astype(np.int64), document, offset, borders - starts, seq_len)


def _best_fit_rows(length: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The row of each piece: longest first, each into the fullest row that still holds it.

    Rows are kept by their free space and the occupied spaces as bits of one integer, so that finding the best
    fit is one shift and one bit scan whatever the number of open rows.
    """
    row_of = np.empty(len(length), np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0
    rows = 0
    for piece in np.argsort(-length, kind="stable").tolist():
        size = int(length[piece])
        fitting = spaces >> size
        if fitting:
            space = size + ((fitting & -fitting).bit_length() - 1)
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = seq_len, rows
            rows += 1
        row_of[piece] = row
        left = space - size
        if left:
            rows_by_space[left].append(row)
            spaces |= 1 << left
    return row_of
