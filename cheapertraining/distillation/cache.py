"""A teacher's targets on disk: what a folder of them holds, and whether it is the right one.

``<cache>/<source>/<split>`` belongs to the shard folder of that source and split; each teacher has a ``<cache>`` of its
own. It is an MDS folder of :mod:`cheapertraining.data.sidecar` with records as in
:mod:`cheapertraining.distillation.packing`, and ``meta.json`` (:class:`CacheMeta`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cheapertraining.data.shards import INDEX_FILE, META_FILE, ShardMeta
from cheapertraining.data.sidecar import SidecarFolder
from cheapertraining.distillation.drawing import Drawing
from cheapertraining.distillation.packing import Kind, Layout
from cheapertraining.errors import UserError
from cheapertraining.influence.store import check_same, read_json

__all__ = ["CACHE_VERSION", "CacheMeta", "cache_folder", "index_digest", "open_cache", "read_cache_meta"]

CACHE_VERSION = 1
_REMEDY = "Write the cache anew (tools/cache_teacher.py), or name the one that belongs to these shards."


@dataclass(frozen=True)
class CacheMeta:
    """What a folder of targets was made of and with.

    Attributes:
        format_version: of this layout.
        source: of the shards; likewise ``split``, ``seq_len``, ``samples``, ``tokenizer_fingerprint``.
        shards: SHA-256 of the ``index.json`` of the shards.
        teacher: SHA-256 over the teacher's weights.
        dtype: that the teacher computed in.
        batch_size: rows in a pass of the teacher; part of the last digits of its logits.
        kind: ``sampled`` or ``top_k``.
        size: draws a position, or ``k``.
        temperature: of the distribution that was stored.
        drawing: how tokens were drawn; None for ``top_k``.
        seed: of the draws.
        vocab_size: of the teacher.
        positions: that hold targets.
        entries: ids that they hold together.
        record_bytes: of all records.
    """

    format_version: int
    source: str
    split: str
    seq_len: int
    samples: int
    tokenizer_fingerprint: str
    shards: str
    teacher: str
    dtype: str
    batch_size: int
    kind: Kind
    size: int
    temperature: float
    drawing: Drawing | None
    seed: int
    vocab_size: int
    positions: int = 0
    entries: int = 0
    record_bytes: int = 0

    @property
    def layout(self) -> Layout:
        """How its records are laid out."""
        return Layout(self.kind, self.size, self.vocab_size, self.seq_len)

    def identity(self) -> dict[str, Any]:
        """All but what was counted."""
        counted = ("positions", "entries", "record_bytes")
        return {name: value for name, value in asdict(self).items() if name not in counted}


def cache_folder(cache: Path, meta: ShardMeta) -> Path:
    """Where the targets of a shard folder lie within a cache."""
    return cache / meta.source / meta.split


def index_digest(shards: Path) -> str:
    """SHA-256 of the ``index.json`` of a shard folder, which names size and hash of each shard."""
    return hashlib.sha256((shards / INDEX_FILE).read_bytes()).hexdigest()


def read_cache_meta(folder: Path) -> CacheMeta:
    """The :class:`CacheMeta` of a folder.

    Raises:
        UserError: there is none, it is unreadable, or of another format version.
    """
    file = folder / META_FILE
    if not file.is_file():
        raise UserError(f"{file}: expected a teacher's targets, found none. {_REMEDY}")
    content = read_json(file)
    if content.get("format_version") != CACHE_VERSION:
        found = content.get("format_version")
        raise UserError(f"{file}: expected format version {CACHE_VERSION} of targets, found {found}. {_REMEDY}")
    names = [each.name for each in fields(CacheMeta)]
    missing = [each.name for each in fields(CacheMeta) if each.default is MISSING and each.name not in content]
    if missing:
        raise UserError(f"{file}: expected '{missing[0]}' in it, found {', '.join(content)}. {_REMEDY}")
    return CacheMeta(**{name: content[name] for name in names if name in content})


def open_cache(
    cache: Path, shards: Path, meta: ShardMeta, expected: Mapping[str, Any]
) -> tuple[CacheMeta, SidecarFolder]:
    """The targets of one shard folder.

    Args:
        cache: of the teacher.
        shards: the folder.
        meta: its meta.json.
        expected: entries of :class:`CacheMeta` that must be so, such as ``teacher``.

    Raises:
        UserError: missing, truncated or of other shards, another tokenizer or teacher; the message says which.
    """
    folder = cache_folder(cache, meta)
    found = read_cache_meta(folder)
    own = {
        "source": meta.source,
        "split": meta.split,
        "seq_len": meta.seq_len,
        "tokenizer_fingerprint": meta.tokenizer_fingerprint,
        "samples": meta.samples,
        "shards": index_digest(shards),
        **expected,
    }
    entries = asdict(found)
    check_same(folder, {key: entries[key] for key in own}, own, _REMEDY)
    return found, SidecarFolder(folder, meta.samples, _REMEDY)
