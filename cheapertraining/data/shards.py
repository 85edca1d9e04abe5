"""Token shards on disk: one MDS folder per source and split, with what was put in written beside it.

Columns: ``tokens`` (``ndarray:uint16:S``, or uint32 where the vocabulary is larger than 65,536) and
``doc_lengths`` (``ndarray:uint32``, the lengths of the pieces of documents in the row; they sum to ``S`` less the
padding at its end). Beside ``index.json`` lie ``meta.json`` (:class:`ShardMeta`) and ``documents.u64``
(a 64-bit hash of each document, little-endian, so that overlapping splits can be found).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.packing import Rows, pack
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError

__all__ = [
    "DOCUMENTS_FILE",
    "META_FILE",
    "ShardMeta",
    "check_compatible",
    "read_document_hashes",
    "read_meta",
    "write_split",
]

FORMAT_VERSION = 1
META_FILE = "meta.json"
DOCUMENTS_FILE = "documents.u64"
_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class ShardMeta:
    """What a shard folder holds; the content of its ``meta.json``.

    ``tokens`` counts the tokens of documents, end-of-text tokens included; ``padding`` what fills up the rows;
    ``cut_documents`` the documents that lie in more than one row; ``input_hash`` is the SHA-256 over the texts.
    """

    format_version: int
    source: str
    split: str
    seq_len: int
    vocab_size: int
    tokenizer_fingerprint: str
    token_dtype: str
    packing: str
    samples: int
    documents: int
    tokens: int
    padding: int
    cut_documents: int
    input_hash: str
    license: str
    origin: str


def write_split(
    folder: Path,
    documents: Iterable[str],
    tokenizer: TokenizerWrapper,
    *,
    seq_len: int,
    source: str,
    split: str,
    license: str,
    origin: str,
    packing: str = "best_fit",
    seed: int = 0,
) -> ShardMeta:
    """Tokenize, pack and write the documents of one source and split; replaces ``folder``.

    Each document is followed by one end-of-text token. Rows are shuffled (packing sorts them by length).
    The folder appears whole or not at all: it is written under another name and then renamed.

    Raises:
        UserError: no document with text.
    """
    texts = [text for text in documents if text]
    if not texts:
        raise UserError(
            f"source '{source}', split '{split}': no documents with text. An empty source cannot be sampled."
        )
    tokens = [np.asarray(ids, tokenizer.token_dtype) for ids in _tokenize(texts, tokenizer)]
    rows = pack(np.array([len(ids) for ids in tokens], np.int64), seq_len, packing)
    meta = ShardMeta(
        format_version=FORMAT_VERSION,
        source=source,
        split=split,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        token_dtype=tokenizer.token_dtype,
        packing=packing,
        samples=len(rows),
        documents=len(texts),
        tokens=rows.tokens,
        padding=rows.padding,
        cut_documents=rows.cut_documents,
        input_hash=_hash_texts(texts),
        license=license,
        origin=origin,
    )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _write_rows(unfinished, rows, tokens, tokenizer, seed)
    hashes = np.array([document_hash(text) for text in texts], "<u8")
    (unfinished / DOCUMENTS_FILE).write_bytes(hashes.tobytes())
    (unfinished / META_FILE).write_text(json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(folder)
    return meta


def read_meta(folder: Path) -> ShardMeta:
    """The :class:`ShardMeta` of a shard folder.

    Raises:
        UserError: ``meta.json`` is missing, unreadable, or of another format version.
    """
    file = folder / META_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{file}: expected format version {FORMAT_VERSION}, found {version}. Make the shards anew.")
        return ShardMeta(**{field.name: content[field.name] for field in fields(ShardMeta)})
    except FileNotFoundError as error:
        raise UserError(
            f"{file}: not found, though every shard folder has one. Make the shards of this folder anew."
        ) from error
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: unreadable ({error!r}). Make the shards of this folder anew.") from error


def check_compatible(folder: Path, meta: ShardMeta, *, seq_len: int, tokenizer: TokenizerWrapper | None) -> None:
    """Refuse shards that were made for another sequence length or with another tokenizer.

    Raises:
        UserError: naming the folder, what the run expects, and what the shards have.
    """
    if meta.seq_len != seq_len:
        raise UserError(
            f"{folder}: the run expects seq_len {seq_len}, the shards have {meta.seq_len}. "
            "Set data.seq_len to that of the shards or make the shards anew."
        )
    if tokenizer is not None and meta.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: the shards were made with another tokenizer (fingerprint {meta.tokenizer_fingerprint}) than "
            f"the run's '{tokenizer.path}' ({tokenizer.fingerprint}). Name the tokenizer that made "
            "the shards, or make them anew."
        )


def read_document_hashes(folder: Path) -> NDArray[np.uint64]:
    """uint64 ``[documents]`` hashes of the documents of a shard folder; empty where none were stored."""
    file = folder / DOCUMENTS_FILE
    return np.fromfile(file, "<u8") if file.is_file() else np.zeros(0, np.uint64)


def document_hash(text: str) -> int:
    """A 64-bit hash of a document's text (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _tokenize(texts: list[str], tokenizer: TokenizerWrapper) -> Iterable[list[int]]:
    remaining = iter(texts)
    while chunk := list(islice(remaining, _DOCUMENTS_PER_CALL)):
        for ids in tokenizer.encode_batch(chunk):
            yield [*ids, tokenizer.eos_id]


def _write_rows(
    folder: Path, rows: Rows, tokens: list[NDArray[np.generic]], tokenizer: TokenizerWrapper, seed: int
) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:{tokenizer.token_dtype}:{rows.seq_len}", "doc_lengths": "ndarray:uint32"}
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"]) as writer:
        for row in order.tolist():
            pieces = range(rows.row_start[row], rows.row_start[row + 1])
            parts = [tokens[rows.document[p]][rows.offset[p] : rows.offset[p] + rows.length[p]] for p in pieces]
            padding = rows.seq_len - sum(len(part) for part in parts)
            parts.append(np.full(padding, tokenizer.pad_id, tokenizer.token_dtype))
            writer.write({"tokens": np.concatenate(parts), "doc_lengths": rows.length[pieces].astype(np.uint32)})


def _hash_texts(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's files, so that a rename after it never names a folder of empty files."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
