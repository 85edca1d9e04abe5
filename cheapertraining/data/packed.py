"""Documents to packed rows, window by window, so that memory is bounded whatever the number of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cheapertraining.data.collate import Batch, collate
from cheapertraining.data.documents import EncodedDocument
from cheapertraining.data.packing import pack
from cheapertraining.data.rows import SampledRows, TokenRows, cut_rows, fill_rows
from cheapertraining.errors import UserError

__all__ = ["WINDOW_TOKENS", "PackedDataset", "PackedWindow", "pack_window", "windows"]

WINDOW_TOKENS = 1 << 24
"""Tokens that are packed together, at least: 32 MB of uint16."""


@dataclass(frozen=True)
class PackedWindow:
    """The rows of one window in shuffled order, and how many of its documents lie in more than one row."""

    rows: TokenRows
    cut_documents: int


class PackedDataset:
    """Rows and batches made from documents on the fly: for tests and small data, without files.

    The rows are those that conversion writes for the same documents in one input file and one split.

    Args:
        documents: for instance a :class:`~cheapertraining.data.datasets.pretrain.PretrainDataset` or an
            :class:`~cheapertraining.data.datasets.sft.SFTDataset`. Iterated anew by each iteration.
        seq_len: tokens in a row.
        pad_id: token that fills the end of rows.
        packing: ``best_fit``, ``concat`` or ``pad``; see :func:`~cheapertraining.data.packing.pack`.
        window_tokens: documents are packed together until they have so many tokens.
        seed: decides the order of rows within a window.

    Called with ``dataset=``, it is a :class:`~cheapertraining.data.packed_texts.PackedTexts`, which takes what other
    packages give it: ``PackedDataset(dataset=texts, tokenizer=tokenizer, max_length=2048)``.
    """

    def __new__(cls, *values: Any, **named: Any) -> PackedDataset:
        if cls is PackedDataset and "dataset" in named:
            from cheapertraining.data.packed_texts import PackedTexts

            return object.__new__(PackedTexts)
        return object.__new__(cls)

    def __init__(
        self,
        documents: Iterable[EncodedDocument],
        seq_len: int,
        pad_id: int,
        packing: str = "best_fit",
        *,
        window_tokens: int = WINDOW_TOKENS,
        seed: int = 0,
    ) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.packing = packing
        self.window_tokens = window_tokens
        self.seed = seed

    def __iter__(self) -> Iterator[TokenRows]:
        """The rows of each window."""
        for number, window in enumerate(windows(self.documents, self.window_tokens)):
            yield pack_window(window, self.seq_len, self.packing, self.pad_id, key=(self.seed, 0, number, 0)).rows

    def batches(self, batch_size: int, source: int = 0) -> Iterator[Batch]:
        """Batches of ``batch_size`` rows, as :func:`~cheapertraining.data.collate.collate` makes them.

        The last batch of a window may be smaller. ``sample_id`` counts the rows, ``source`` is as given.

        Raises:
            UserError: there is no document.
        """
        first = 0
        for window in self:
            for rows in cut_rows(window, batch_size):
                sample = np.arange(first, first + len(rows))
                yield collate(SampledRows(rows, np.full(len(rows), source), sample))
                first += len(rows)
        if not first:
            raise UserError("packed data set: no documents with text, so there is no batch.")


def windows(documents: Iterable[EncodedDocument], window_tokens: int) -> Iterator[list[EncodedDocument]]:
    """Runs of documents, each ending with the document that brings it to ``window_tokens`` tokens."""
    window: list[EncodedDocument] = []
    tokens = 0
    for document in documents:
        window.append(document)
        tokens += len(document.ids)
        if tokens >= window_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def pack_window(
    documents: Sequence[EncodedDocument], seq_len: int, packing: str, pad_id: int, key: tuple[int, ...]
) -> PackedWindow:
    """Pack documents and shuffle the rows (best fit sorts them by length); the same ``key`` shuffles alike."""
    plan = pack(np.array([len(document.ids) for document in documents], np.int64), seq_len, packing)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    order = generator.permutation(len(plan))
    return PackedWindow(fill_rows(plan, documents, pad_id=pad_id, order=order), plan.cut_documents)
