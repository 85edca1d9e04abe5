"""Rows of tokens: what packing makes, shards hold and a batch is collated from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.documents import EncodedDocument
from cheapertraining.data.packing import Rows

__all__ = ["SampledRows", "TokenRows", "cut_rows", "fill_rows", "slice_rows"]


@dataclass(frozen=True)
class TokenRows:
    """Rows as they lie in the shards.

    Attributes:
        tokens: uint16 or uint32 ``[N, S]``.
        doc_lengths: uint32, the pieces of all rows one after the other; the pieces of a row sum to ``S`` less padding.
        pieces: int64 ``[N]``, how many pieces each row has.
        loss_mask: uint8 ``[N, S]``, 1 where a token is to be predicted; None: all tokens are.
        sidecars: by name, uint8 ``[N, L]``: a record of each row, filled up with zeros; see
            :mod:`cheapertraining.data.sidecar`.
    """

    tokens: NDArray[Any]
    doc_lengths: NDArray[np.uint32]
    pieces: NDArray[np.int64]
    loss_mask: NDArray[np.uint8] | None = None
    sidecars: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class SampledRows:
    """Rows together with where they come from: ``source`` and ``sample`` are int64 ``[N]``."""

    rows: TokenRows
    source: NDArray[np.int64]
    sample: NDArray[np.int64]


def fill_rows(
    plan: Rows, documents: Sequence[EncodedDocument], *, pad_id: int, order: NDArray[np.int64] | None = None
) -> TokenRows:
    """Put the tokens of documents where ``plan`` says.

    Args:
        plan: of :func:`~cheapertraining.data.packing.pack` for the lengths of ``documents``.
        documents: all with a loss mask, or all without.
        pad_id: fills the end of rows.
        order: int64 ``[N]``, the planned row that becomes each row; None: as planned.
    """
    order = np.arange(len(plan)) if order is None else order
    tokens = np.full((len(plan), plan.seq_len), pad_id, documents[0].ids.dtype)
    masked = documents[0].loss_mask is not None
    loss_mask = np.zeros((len(plan), plan.seq_len), np.uint8) if masked else None
    starts = plan.row_start[order]
    pieces = plan.row_start[order + 1] - starts
    piece = np.repeat(starts - np.cumsum(pieces) + pieces, pieces) + np.arange(int(pieces.sum()))
    lengths = plan.length[piece]
    placed = np.cumsum(lengths) - lengths
    column = placed - np.repeat(placed[np.cumsum(pieces) - pieces], pieces)
    row = np.repeat(np.arange(len(plan)), pieces)
    numbers = (row, column, plan.document[piece], plan.offset[piece], lengths)
    for r, c, d, first, n in zip(*(part.tolist() for part in numbers), strict=True):
        document = documents[d]
        tokens[r, c : c + n] = document.ids[first : first + n]
        if loss_mask is not None and document.loss_mask is not None:
            loss_mask[r, c : c + n] = document.loss_mask[first : first + n]
    return TokenRows(tokens, lengths.astype(np.uint32), pieces, loss_mask)


def cut_rows(rows: TokenRows, count: int) -> Iterator[TokenRows]:
    """``rows`` in runs of ``count``, the last one shorter."""
    starts = _piece_starts(rows)
    for first in range(0, len(rows), count):
        yield _slice(rows, starts, first, min(first + count, len(rows)))


def slice_rows(rows: TokenRows, first: int, last: int) -> TokenRows:
    """Rows ``first`` to ``last - 1``."""
    return _slice(rows, _piece_starts(rows), first, last)


def _piece_starts(rows: TokenRows) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.pieces)])


def _slice(rows: TokenRows, starts: NDArray[np.int64], first: int, last: int) -> TokenRows:
    mask = None if rows.loss_mask is None else rows.loss_mask[first:last]
    lengths = rows.doc_lengths[starts[first] : starts[last]]
    return TokenRows(rows.tokens[first:last], lengths, rows.pieces[first:last], mask)
