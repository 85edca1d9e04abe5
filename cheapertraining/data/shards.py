"""Token shards on disk: one MDS folder per source and split, with what was put in written beside it.

Columns: ``tokens`` (``ndarray:uint16:S``, or uint32 where the vocabulary is larger than 65,536), ``doc_lengths``
(``ndarray:uint32``, the lengths of the pieces of documents in the row; they sum to ``S`` less the padding at its end)
and, for conversations, ``loss_mask`` (``ndarray:uint8:S``). Beside ``index.json`` lie ``meta.json``
(:class:`ShardMeta`) and ``documents.u64`` (a 64-bit hash of each document, little-endian, so that overlapping splits
can be found).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.documents import EncodedDocument
from cheapertraining.data.packed import pack_window
from cheapertraining.data.rows import TokenRows, cut_rows
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError

__all__ = [
    "DOCUMENTS_FILE",
    "INDEX_FILE",
    "META_FILE",
    "ShardMeta",
    "check_compatible",
    "index_json",
    "meta_json",
    "read_document_hashes",
    "read_meta",
    "sync_folder",
    "write_documents",
    "write_samples",
    "write_shard",
    "write_sidecars",
    "write_split",
]

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
META_FILE = "meta.json"
DOCUMENTS_FILE = "documents.u64"
DEFAULT_SHARD_BYTES = 64_000_000
DEFAULT_HASHES = ("xxh64",)


@dataclass(frozen=True)
class ShardMeta:
    """What a shard folder holds; the content of its ``meta.json``.

    ``tokens`` counts the tokens of documents, end-of-text tokens included; ``padding`` what fills up the rows;
    ``cut_documents`` the documents that lie in more than one row; ``input_hash`` is a SHA-256 over the documents in
    order. ``loss_tokens`` counts the tokens that are predicted; None: all are, and there is no ``loss_mask`` column.
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
    loss_tokens: int | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The MDS columns of the shards, with their encodings."""
        columns = {"doc_lengths": "ndarray:uint32", "tokens": f"ndarray:{self.token_dtype}:{self.seq_len}"}
        if self.loss_tokens is not None:
            columns["loss_mask"] = f"ndarray:uint8:{self.seq_len}"
        return columns


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
    """Tokenize, pack and write the texts of one source and split, all in memory; replaces ``folder``.

    As :func:`write_documents`; each text is followed by one end-of-text token.

    Raises:
        UserError: no document with text.
    """
    from cheapertraining.data.datasets.pretrain import PretrainDataset

    return write_documents(
        folder,
        PretrainDataset(documents, tokenizer),
        tokenizer,
        seq_len=seq_len,
        source=source,
        split=split,
        license=license,
        origin=origin,
        packing=packing,
        seed=seed,
    )


def write_documents(
    folder: Path,
    documents: Iterable[EncodedDocument],
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
    """Pack and write the documents of one source and split, all in memory; replaces ``folder``.

    For what does not fit into memory or should survive a crash, see :mod:`cheapertraining.data.conversion`. Rows are
    shuffled (packing sorts them by length). The folder appears whole or not at all: it is written under another name
    and then renamed.

    Args:
        documents: for instance a :class:`~cheapertraining.data.datasets.pretrain.PretrainDataset` or an
            :class:`~cheapertraining.data.datasets.sft.SFTDataset`; all with a loss mask, or all without.

    Raises:
        UserError: no document, or only some have a loss mask.
    """
    encoded = list(documents)
    if not encoded:
        raise UserError(
            f"source '{source}', split '{split}': no documents with text. An empty source cannot be sampled."
        )
    if len({document.loss_mask is None for document in encoded}) > 1:
        raise UserError(
            f"source '{source}', split '{split}': some documents have a loss mask, others not. Give them a folder each."
        )
    window = pack_window(encoded, seq_len, packing, tokenizer.pad_id, key=(seed, 0, 0, 0))
    rows, tokens = window.rows, sum(len(document.ids) for document in encoded)
    hashes = np.array([document.hash for document in encoded], "<u8")
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
        documents=len(encoded),
        tokens=tokens,
        padding=rows.tokens.size - tokens,
        cut_documents=window.cut_documents,
        input_hash=hash_of_hashes(hashes),
        license=license,
        origin=origin,
        loss_tokens=None if rows.loss_mask is None else int(rows.loss_mask.sum()),
    )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    per_shard = rows_in_shard(meta, DEFAULT_SHARD_BYTES)
    entries = [
        write_shard(unfinished, number, [part], meta.columns) for number, part in enumerate(cut_rows(rows, per_shard))
    ]
    write_sidecars(unfinished, meta, hashes)
    (unfinished / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")
    sync_folder(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return meta


def rows_in_shard(meta: ShardMeta, shard_bytes: int) -> int:
    """How many rows a shard of about ``shard_bytes`` holds."""
    row_bytes = meta.seq_len * (np.dtype(meta.token_dtype).itemsize + (meta.loss_tokens is not None))
    return max(1, shard_bytes // row_bytes)


def write_shard(
    folder: Path,
    number: int,
    parts: Iterable[TokenRows],
    columns: dict[str, str],
    *,
    prefix: str = "shard",
    compression: str | None = None,
    hashes: Sequence[str] = DEFAULT_HASHES,
) -> dict[str, Any]:
    """Write rows as one MDS shard, see :func:`write_samples`."""
    samples = (sample for rows in parts for sample in _samples_of(rows))
    return write_samples(folder, number, samples, columns, prefix=prefix, compression=compression, hashes=hashes)


def _samples_of(rows: TokenRows) -> Iterator[dict[str, Any]]:
    ends = np.cumsum(rows.pieces)
    for row, (end, pieces) in enumerate(zip(ends.tolist(), rows.pieces.tolist(), strict=True)):
        sample = {"tokens": rows.tokens[row], "doc_lengths": rows.doc_lengths[end - pieces : end]}
        if rows.loss_mask is not None:
            sample["loss_mask"] = rows.loss_mask[row]
        yield sample


def write_samples(
    folder: Path,
    number: int,
    samples: Iterable[dict[str, Any]],
    columns: dict[str, str],
    *,
    prefix: str = "shard",
    compression: str | None = None,
    hashes: Sequence[str] = DEFAULT_HASHES,
) -> dict[str, Any]:
    """Write samples as the one MDS shard ``<prefix>.<number>.mds`` of ``folder`` and return its entry of the index.

    The file appears whole or not at all.
    """
    from streaming import MDSWriter

    unfinished = folder / f".{prefix}.{number:05}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    writer = MDSWriter(
        out=str(unfinished), columns=columns, compression=compression, hashes=list(hashes), size_limit=None
    )
    for sample in samples:
        writer.write(sample)
    writer.finish()  # not `with`: an error must not leave an index that looks complete
    sync_folder(unfinished)
    entry: dict[str, Any] = json.loads((unfinished / INDEX_FILE).read_text(encoding="utf-8"))["shards"][0]
    for part in ("raw_data", "zip_data"):
        if entry.get(part) and (file := unfinished / entry[part]["basename"]).is_file():
            file.replace(folder / file.name.replace("shard.00000", f"{prefix}.{number:05}"))
        if entry.get(part):
            entry[part]["basename"] = entry[part]["basename"].replace("shard.00000", f"{prefix}.{number:05}")
    shutil.rmtree(unfinished)
    return entry


def write_sidecars(folder: Path, meta: ShardMeta, document_hashes: NDArray[np.uint64]) -> None:
    """Write ``meta.json`` and ``documents.u64``."""
    (folder / DOCUMENTS_FILE).write_bytes(document_hashes.astype("<u8").tobytes())
    (folder / META_FILE).write_text(meta_json(meta), encoding="utf-8")


def meta_json(meta: ShardMeta) -> str:
    """The content of ``meta.json``."""
    return json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n"


def index_json(entries: Sequence[dict[str, Any]]) -> str:
    """The content of ``index.json``: a folder is a shard folder once it has one, so it is written last."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True)


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
        names = [field.name for field in fields(ShardMeta) if field.default is MISSING or field.name in content]
        return ShardMeta(**{name: content[name] for name in names})
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


def hash_of_hashes(document_hashes: NDArray[np.uint64]) -> str:
    """SHA-256 over document hashes in order: the same documents in the same order have the same one."""
    return hashlib.sha256(document_hashes.astype("<u8").tobytes()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's files, so that a rename after it never names a folder of empty files."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
