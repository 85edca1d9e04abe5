"""Records and documents: what is read, what it becomes as tokens, and what is wrong where it cannot become any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from cheapertraining.errors import UserError, nearest

__all__ = ["ON_ERROR", "EncodedDocument", "Problems", "Record", "document_hash", "with_places"]

ON_ERROR = ("fail", "skip")


class Record(NamedTuple):
    """One record of an input.

    Attributes:
        place: where it stands; its string is for messages: ``wiki.jsonl:17``.
        value: a text, or a mapping of columns; None where it could not be read.
        problem: why it could not be read.
    """

    place: object
    value: str | Mapping[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True)
class EncodedDocument:
    """The tokens of one document.

    Attributes:
        ids: uint16 or uint32 ``[n]``, the token ids with the end-of-text token; at least one.
        hash: 64-bit hash of what the document was made from, see :func:`document_hash`; splits go by it.
        loss_mask: uint8 ``[n]``, 1 where the token is to be predicted; None: all of them.
    """

    ids: NDArray[Any]
    hash: int
    loss_mask: NDArray[np.uint8] | None = None


@dataclass
class Problems:
    """Records that could not be used.

    Args:
        on_error: ``fail`` raises at the first one; ``skip`` counts them and keeps the first messages.

    Raises:
        UserError: another ``on_error``.
    """

    on_error: str = "fail"
    count: int = 0
    messages: list[str] = field(default_factory=list)

    KEPT = 20

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise UserError(
                f"on_error: expected one of {', '.join(ON_ERROR)}, found '{self.on_error}'."
                f"{nearest(self.on_error, ON_ERROR)}"
            )

    def add(self, place: object, problem: str) -> None:
        """Note a record that cannot be used.

        Raises:
            UserError: ``on_error`` is ``fail``.
        """
        message = f"{place}: {problem}"
        if self.on_error == "fail":
            raise UserError(f"{message} Mend the record, or pass over such records with on_error=skip (--on-error).")
        self.count += 1
        if len(self.messages) < self.KEPT:
            self.messages.append(message)


def with_places(records: Iterable[str | Mapping[str, Any] | Record]) -> Iterator[Record]:
    """``records`` with a place each: those without one are numbered."""
    for number, record in enumerate(records):
        yield record if isinstance(record, Record) else Record(f"record {number}", record)


def document_hash(text: str) -> int:
    """A 64-bit hash of a document's text (XXH3)."""
    return int(xxhash.xxh3_64_intdigest(text.encode("utf-8")))
