"""Records with conversations to documents of tokens, of which only the assistant's turns are predicted."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from cheapertraining.data.chat import ChatError, ChatFormat, RenderedChat, read_conversation
from cheapertraining.data.documents import EncodedDocument, Problems, Record, document_hash, with_places
from cheapertraining.data.tokenization import TokenizerWrapper

__all__ = ["SFTDataset"]

_CHATS_PER_CALL = 256


class SFTDataset:
    """The conversations of an iterable of records, each a document with a loss mask, closed by the end of text.

    Pass it to :class:`~cheapertraining.data.packed.PackedDataset` for batches. How records are read and what is
    predicted: :mod:`cheapertraining.data.chat`.

    Args:
        records: mappings with a conversation, or such as :class:`Record`. Iterated anew by each iteration.
        tokenizer: gives the ids.
        max_length: most tokens of a conversation, the end of text included; a longer one is a problem, it is never
            cut. Give the row length, since packing cuts what is longer than a row. None: any length.
        chat_template: Jinja source in place of the tokenizer's own template, and of ChatML where it has none.
        on_error: ``fail`` raises at the first record that is no such conversation, is too long, or in which nothing is
            predicted; ``skip`` passes over it and keeps count in :attr:`problems`.
        skip: documents to leave out at the beginning, for a conversion that goes on.
        drop: numbers of conversations to leave out (counted as :meth:`texts` gives them), such as duplicates.

    Raises:
        UserError: the template cannot be used; (while iterating) a bad record, with its place.
    """

    def __init__(
        self,
        records: Iterable[Mapping[str, Any] | Record],
        tokenizer: TokenizerWrapper,
        *,
        max_length: int | None = None,
        chat_template: str | None = None,
        on_error: str = "fail",
        skip: int = 0,
        drop: Container[int] = (),
    ) -> None:
        self.records = records
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.skip = skip
        self.drop = drop
        self.format = ChatFormat(tokenizer, chat_template)
        self.problems = Problems(on_error)
        self.empty = 0
        """Records whose columns are all null that the current or last iteration passed over."""
        self.dropped = 0
        """Conversations that it left out because of ``drop``."""

    def __iter__(self) -> Iterator[EncodedDocument]:
        self.problems = Problems(self.problems.on_error)
        self.empty = self.dropped = 0
        # A skipped document is tokenized too: whether it counts as one may depend on its length.
        yield from islice(self._documents(), self.skip, None)

    def texts(self) -> Iterator[str]:
        """What is said in each conversation that can be rendered, as JSON, before any is dropped."""
        for result in self._rendered():
            if result.chat is None:
                self.problems.add(result.place, result.problem)
            else:
                yield result.text

    def _documents(self) -> Iterator[EncodedDocument]:
        results = self._kept()
        while chunk := list(islice(results, _CHATS_PER_CALL)):
            encoded = iter(self.format.encode_batch([result.chat for result in chunk if result.chat is not None]))
            for result in chunk:  # problems and documents in the order of the records
                if result.chat is None:
                    self.problems.add(result.place, result.problem)
                    continue
                ids, mask = next(encoded)
                if self.max_length is not None and len(ids) > self.max_length:
                    self.problems.add(
                        result.place, f"{len(ids)} tokens, more than {self.max_length}; it would have to be cut."
                    )
                elif not mask[1:].any():  # nothing comes before the first token to predict it
                    self.problems.add(result.place, "nothing in it is to be predicted.")
                else:
                    yield EncodedDocument(ids, document_hash(result.text), mask)

    def _kept(self) -> Iterator[_Result]:
        number = -1
        for result in self._rendered():
            number += result.chat is not None
            if result.chat is not None and number in self.drop:
                self.dropped += 1
            else:
                yield result

    def _rendered(self) -> Iterator[_Result]:
        for place, value, unreadable in with_places(self.records):
            if unreadable is not None:
                yield _Result(place, problem=unreadable)
                continue
            try:
                conversation = None if value is None else read_conversation(value)
                if conversation is None:
                    self.empty += 1
                else:
                    yield _Result(place, self.format.render(conversation), conversation.text)
            except ChatError as error:
                yield _Result(place, problem=str(error))


class _Result(NamedTuple):
    """A rendered conversation with what is said in it as JSON, or the problem with a record."""

    place: object
    chat: RenderedChat | None = None
    text: str = ""
    problem: str = ""
