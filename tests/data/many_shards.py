"""Shard folders of several small shards, which ``write_documents`` makes only of much text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cheapertraining.data import EncodedDocument, PackedDataset, PretrainDataset, ShardMeta, TokenizerWrapper
from cheapertraining.data.rows import TokenRows, cut_rows
from cheapertraining.data.shards import INDEX_FILE, hash_of_hashes, index_json, write_shard, write_sidecars

SEQ_LEN = 32


def masked(document: EncodedDocument) -> EncodedDocument:
    """The document with every second half predicted."""
    mask = (np.arange(len(document.ids)) >= len(document.ids) // 2).astype(np.uint8)
    return EncodedDocument(document.ids, document.hash, mask)


def write_many(
    folder: Path,
    texts: Sequence[str],
    tokenizer: TokenizerWrapper,
    *,
    rows_in_shard: int = 50,
    loss_mask: bool = False,
    compression: str | None = None,
    hashes: Sequence[str] = ("sha1", "xxh64"),
) -> ShardMeta:
    """Write the texts as shards of ``rows_in_shard`` rows of 32 tokens."""
    documents = [masked(document) if loss_mask else document for document in PretrainDataset(texts, tokenizer)]
    (rows,) = PackedDataset(documents, SEQ_LEN, tokenizer.pad_id)
    digests = np.array([document.hash for document in documents], "<u8")
    tokens = sum(len(document.ids) for document in documents)
    meta = ShardMeta(
        format_version=1,
        source="s",
        split="train",
        seq_len=SEQ_LEN,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        token_dtype="uint16",
        packing="best_fit",
        samples=len(rows),
        documents=len(documents),
        tokens=tokens,
        padding=rows.tokens.size - tokens,
        cut_documents=sum(len(document.ids) > SEQ_LEN for document in documents),
        input_hash=hash_of_hashes(digests),
        license="PSF-2.0",
        origin="test",
        loss_tokens=None if rows.loss_mask is None else int(rows.loss_mask.sum()),
    )
    folder.mkdir(parents=True)
    write_rows(folder, list(cut_rows(rows, rows_in_shard)), meta, compression=compression, hashes=hashes)
    write_sidecars(folder, meta, digests)
    return meta


def write_rows(
    folder: Path,
    shards: Sequence[TokenRows],
    meta: ShardMeta,
    *,
    compression: str | None = None,
    hashes: Sequence[str] = ("xxh64",),
) -> None:
    """Write each of ``shards`` with its right hashes, whatever its rows are, and an index of them."""
    entries = [
        write_shard(folder, number, [rows], meta.columns, compression=compression, hashes=hashes)
        for number, rows in enumerate(shards)
    ]
    (folder / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")
