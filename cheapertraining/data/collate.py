"""Rows of shards to the batch that a model is trained on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from cheapertraining.data.rows import SampledRows, TokenRows

__all__ = ["IGNORED", "Batch", "collate"]

IGNORED = -100
"""Label of a token that is not predicted; the default ``ignore_index`` of torch's cross-entropy."""

Batch = dict[str, torch.Tensor]


def collate(sampled: SampledRows) -> Batch:
    """Make a batch of ``B`` rows of ``S`` tokens.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` int64 ``[B, S]`` and ``source``, ``sample_id`` int64 ``[B]``. Labels
        are not shifted; they are -100 at the first token of each document (nothing before it predicts it), on padding,
        and where a loss mask is 0. Positions restart at each document; padding is a document of its own, so that models
        which take document bounds from the positions keep it apart. ``attention_mask`` int64 ``[B, S]`` only where
        there is padding. Each sidecar as uint8 ``[B, L]`` under its name.
    """
    count, seq_len = sampled.rows.tokens.shape
    input_ids = sampled.rows.tokens.astype(np.int64)
    lengths, padding_from = _with_padding(sampled.rows, seq_len)
    starts = np.cumsum(lengths) - lengths
    labels = sampled.rows.tokens.astype(np.int64)  # from the narrow tokens again: less memory to read than a copy
    labels.reshape(-1)[starts] = IGNORED
    if sampled.rows.loss_mask is not None:
        labels[sampled.rows.loss_mask == 0] = IGNORED
    # Joining pieces of a ready index copies them whole; np.repeat would go through them a number at a time.
    index = _row_index(seq_len)
    pieces = bytearray().join([index[:size] for size in (lengths * 8).tolist()])
    positions = np.frombuffer(pieces, np.int64).reshape(count, seq_len)
    batch = {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "source": torch.from_numpy(sampled.source),
        "sample_id": torch.from_numpy(sampled.sample),
    }
    batch |= {name: torch.from_numpy(records) for name, records in sampled.rows.sidecars.items()}
    if padding_from is not None:
        real = np.arange(seq_len)[None, :] < padding_from[:, None]
        labels[~real] = IGNORED
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch


@lru_cache(maxsize=4)
def _row_index(seq_len: int) -> memoryview:
    """The bytes of 0 to ``seq_len - 1`` in int64, made once: rows have the same length throughout a run."""
    return np.arange(seq_len, dtype=np.int64).data.cast("B")


def _with_padding(rows: TokenRows, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Lengths of all pieces with padding as a piece of its own, and where each row's padding begins (None: nowhere)."""
    lengths = rows.doc_lengths.astype(np.int64)
    if int(lengths.sum()) == rows.tokens.size:
        return lengths, None
    row_ends = np.cumsum(rows.pieces)
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    filled = total[row_ends] - total[row_ends - rows.pieces]
    padded = np.flatnonzero(filled < seq_len)
    return np.insert(lengths, row_ends[padded], seq_len - filled[padded]), filled
