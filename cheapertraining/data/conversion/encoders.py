"""How the records of a conversion become documents: described in plain values, made anew in each process."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from cheapertraining.data.datasets.pretrain import PretrainDataset
from cheapertraining.data.documents import EncodedDocument, Problems, Record
from cheapertraining.data.tokenization import TokenizerWrapper

__all__ = ["DocumentSource", "Encoder", "TextEncoder", "load_tokenizer"]


class DocumentSource(Protocol):
    """Documents in the order of their records, and a count of the records that gave none."""

    problems: Problems
    empty: int
    dropped: int

    def __iter__(self) -> Iterator[EncodedDocument]: ...


class Encoder(Protocol):
    """A frozen dataclass of plain values, so that a conversion can tell whether it goes on with the same one."""

    @property
    def tokenizer(self) -> TokenizerWrapper: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are needed of the input; empty: all."""

    @property
    def masked(self) -> bool:
        """Whether documents have a loss mask."""

    def documents(self, records: Iterable[Record], skip: int = 0, drop: Container[int] = ()) -> DocumentSource:
        """The documents of records without the first ``skip`` and without those numbered in ``drop``."""

    def texts(self, records: Iterable[Record]) -> Iterator[str]:
        """What is hashed to find duplicates: one text for each document, in order."""


@dataclass(frozen=True)
class TextEncoder:
    """Plain documents from the texts of a column.

    Attributes:
        tokenizer_path: see :class:`~cheapertraining.data.tokenization.TokenizerWrapper`.
        text_column: column of the text, in inputs that have columns.
        on_error: ``fail`` at the first bad record, or ``skip`` such records.
    """

    tokenizer_path: str
    text_column: str = "text"
    on_error: str = "fail"
    masked = False

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer, loaded once in each process."""
        return load_tokenizer(self.tokenizer_path)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's column alone."""
        return (self.text_column,)

    def documents(self, records: Iterable[Record], skip: int = 0, drop: Container[int] = ()) -> PretrainDataset:
        """The documents of records, see :class:`Encoder`."""
        return PretrainDataset(records, self.tokenizer, self.text_column, on_error=self.on_error, skip=skip, drop=drop)

    def texts(self, records: Iterable[Record]) -> Iterator[str]:
        """The texts of records, see :class:`Encoder`."""
        return self.documents(records).texts()


@lru_cache(maxsize=2)
def load_tokenizer(path: str) -> TokenizerWrapper:
    """The tokenizer of a path, loaded once in each process."""
    return TokenizerWrapper(path)
