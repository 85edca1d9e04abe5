"""Records with text to documents of tokens."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from cheapertraining.data.documents import EncodedDocument, Problems, Record, document_hash, with_places
from cheapertraining.data.tokenization import TokenizerWrapper

__all__ = ["PretrainDataset"]

_DOCUMENTS_PER_CALL = 256
_CHARACTERS_PER_CALL = 4_000_000


class PretrainDataset:
    """The documents of an iterable of records, each tokenized and closed by one end-of-text token.

    Pass it to :class:`~cheapertraining.data.packed.PackedDataset` for batches. Records without text are passed over.

    Args:
        records: texts, or mappings with the text in ``text_column``, or such as :class:`Record`. Iterated anew by each
            iteration.
        tokenizer: gives the ids; no special token is added but the end of text.
        text_column: key of the text in a mapping.
        on_error: ``fail`` raises at the first record without such a text; ``skip`` passes over it and keeps count in
            :attr:`problems`.
        skip: documents to leave out at the beginning, for a conversion that goes on.
        drop: numbers of documents to leave out (counted among those with text), such as duplicates.

    Raises:
        UserError: (while iterating) a bad record, with its place.
    """

    def __init__(
        self,
        records: Iterable[str | Mapping[str, Any] | Record],
        tokenizer: TokenizerWrapper,
        text_column: str = "text",
        *,
        on_error: str = "fail",
        skip: int = 0,
        drop: Container[int] = (),
    ) -> None:
        self.records = records
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.skip = skip
        self.drop = drop
        self.problems = Problems(on_error)
        self.empty = 0
        """Records without text that the current or last iteration passed over."""
        self.dropped = 0
        """Documents that it left out because of ``drop``."""

    def __iter__(self) -> Iterator[EncodedDocument]:
        self.problems = Problems(self.problems.on_error)
        self.empty = self.dropped = 0
        texts = islice(self._kept_texts(), self.skip, None)
        while chunk := _take(texts):
            for text, ids in zip(chunk, self.tokenizer.encode_batch(chunk), strict=True):
                ids.append(self.tokenizer.eos_id)
                yield EncodedDocument(np.array(ids, self.tokenizer.token_dtype), document_hash(text))

    def _kept_texts(self) -> Iterator[str]:
        for number, text in enumerate(self.texts()):
            if number in self.drop:
                self.dropped += 1
            else:
                yield text

    def texts(self) -> Iterator[str]:
        """The texts of the records that have one, before any is dropped."""
        for place, value, problem in with_places(self.records):
            text = value.get(self.text_column) if isinstance(value, Mapping) else value
            if problem is not None:
                self.problems.add(place, problem)
            elif isinstance(value, Mapping) and self.text_column not in value:
                found = ", ".join(map(repr, value)) or "none"
                self.problems.add(place, f"expected a column '{self.text_column}', found {found}.")
            elif text is not None and not isinstance(text, str):
                self.problems.add(place, f"expected text in column '{self.text_column}', found {type(text).__name__}.")
            elif not text:
                self.empty += 1
            elif (surrogate := _surrogate_in(text)) is not None:
                self.problems.add(place, f"no Unicode text: a lone surrogate at character {surrogate}.")
            else:
                yield text


def _surrogate_in(text: str) -> int | None:
    """Where a text cannot be encoded: JSON can spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _take(texts: Iterator[str]) -> list[str]:
    """The next texts that are tokenized together: many, but bounded in characters."""
    chunk: list[str] = []
    characters = 0
    for text in islice(texts, _DOCUMENTS_PER_CALL):
        chunk.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_PER_CALL:
            break
    return chunk
