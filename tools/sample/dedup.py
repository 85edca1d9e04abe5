"""Drop documents that are, mostly, copies of earlier ones: same source or another, whatever the split."""

from __future__ import annotations

import re

import numpy as np

from tools.sample.documents import Document, stable_hash

__all__ = ["NearDuplicates"]

_WORD = re.compile(r"\w+")
_WORDS_PER_SHINGLE = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses nothing


class NearDuplicates:
    """Remembers the 8-word shingles of all documents kept so far and refuses those that share too many.

    Args:
        threshold: a document is dropped when more than this share of its distinct shingles was seen before.
    """

    def __init__(self, threshold: float = 0.35) -> None:
        self._threshold = threshold
        self._word_ids: dict[str, int] = {}
        self._shingles: set[int] = set()
        self._exact: set[bytes] = set()

    def keep(self, documents: list[Document], exact_only: bool = False) -> list[Document]:
        """The documents that are new. With ``exact_only`` (templated text) only identical texts are dropped."""
        return [document for document in documents if self._is_new(document.text, exact_only)]

    def _is_new(self, text: str, exact_only: bool) -> bool:
        key = stable_hash(text)
        if key in self._exact:
            return False
        shingles = set() if exact_only else self._hashes(text)
        if shingles and len(shingles & self._shingles) > self._threshold * len(shingles):
            return False
        self._exact.add(key)
        self._shingles |= shingles
        return True

    def _hashes(self, text: str) -> set[int]:
        """64-bit polynomial hashes of the shingles; empty for a text of fewer than eight words."""
        ids = self._word_ids
        numbers = [ids.setdefault(word, len(ids) + 1) for word in _WORD.findall(text.casefold())]
        count = len(numbers) - _WORDS_PER_SHINGLE + 1
        if count <= 0:
            return set()
        words = np.array(numbers, np.uint64)
        hashes = np.zeros(count, np.uint64)
        for position in range(_WORDS_PER_SHINGLE):
            hashes = hashes * _MULTIPLIER + words[position : position + count]
        return set(hashes.tolist())
