"""What every source of the sample delivers: documents with their parents, of sensible length and clean text."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Document", "Source", "clean_text", "cut", "hash_order", "stable_hash", "take", "text_bytes"]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]")
_TRAILING_SPACE = re.compile(r"[ \t]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Document:
    """One text and the larger whole it was cut from (article, module, template ...); splits go by parent."""

    parent: str
    text: str


@dataclass(frozen=True)
class Source:
    """A training domain before it is split.

    Attributes:
        name: name of its folder.
        license: SPDX expression or plain words; goes into every ``meta.json``.
        origin: package and version the text comes from; goes into every ``meta.json``.
        credit: the attribution its licence asks for; goes into SOURCES.md.
        documents: in a fixed order.
        templated: documents made from templates repeat phrases by design: only exact duplicates are dropped.
    """

    name: str
    license: str
    origin: str
    credit: str
    documents: list[Document] = field(repr=False)
    templated: bool = False


def clean_text(text: str) -> str:
    """NFC text with ``\\n`` line ends, no control or invisible characters, no trailing or excess blank space."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _CONTROL.sub("", text.replace("\xa0", " "))
    return _BLANK_LINES.sub("\n\n", _TRAILING_SPACE.sub("\n", text + "\n")).strip()


def cut(blocks: Iterable[str], joiner: str, target: int) -> list[str]:
    """Join neighbouring blocks to pieces of at most ``target`` characters; a longer block stays whole."""
    pieces: list[str] = []
    current: list[str] = []
    length = 0
    for block in blocks:
        if current and length + len(joiner) + len(block) > target:
            pieces.append(joiner.join(current))
            current, length = [], 0
        length += len(block) + (len(joiner) if current else 0)
        current.append(block)
    if current:
        pieces.append(joiner.join(current))
    return pieces


def stable_hash(key: str) -> bytes:
    """BLAKE2b of a string: the same in every process, unlike ``hash``."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()


def hash_order(keys: Iterable[str]) -> list[str]:
    """The distinct keys in the order of their hashes: a fixed shuffle that no seed decides."""
    return sorted(set(keys), key=lambda key: (stable_hash(key), key))


def text_bytes(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of the texts."""
    return sum(len(document.text.encode("utf-8")) for document in documents)


def take(documents: list[Document], budget: int) -> list[Document]:
    """Whole parents in hash order until ``budget`` bytes are reached; their documents keep their order."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.parent] = sizes.get(document.parent, 0) + len(document.text.encode("utf-8"))
    taken: set[str] = set()
    total = 0
    for parent in hash_order(sizes):
        if total >= budget:
            break
        taken.add(parent)
        total += sizes[parent]
    return [document for document in documents if document.parent in taken]
