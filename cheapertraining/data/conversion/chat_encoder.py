"""How the records of a conversion of conversations become documents."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from cheapertraining.data.chat import CHATML
from cheapertraining.data.conversion.encoders import load_tokenizer
from cheapertraining.data.datasets.sft import SFTDataset
from cheapertraining.data.documents import Record
from cheapertraining.data.tokenization import TokenizerWrapper

__all__ = ["ChatEncoder"]


@dataclass(frozen=True)
class ChatEncoder:
    """Documents with a loss mask from conversations; see :class:`~cheapertraining.data.datasets.sft.SFTDataset`.

    Attributes:
        tokenizer_path: see :class:`~cheapertraining.data.tokenization.TokenizerWrapper`.
        chat_template: Jinja source. In full, though the tokenizer may have it too: a conversion goes on only with the
            same one.
        max_length: most tokens of a conversation.
        on_error: ``fail`` at the first bad record, or ``skip`` such records.
    """

    tokenizer_path: str
    chat_template: str
    max_length: int
    on_error: str = "fail"
    masked = True

    @classmethod
    def of(cls, tokenizer_path: str, chat_template: str | None, max_length: int, on_error: str = "fail") -> ChatEncoder:
        """With the template given, else the tokenizer's own, else ChatML."""
        template = chat_template or load_tokenizer(tokenizer_path).chat_template or CHATML
        return cls(tokenizer_path, template, max_length, on_error)

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer, loaded once in each process."""
        return load_tokenizer(self.tokenizer_path)

    @property
    def columns(self) -> tuple[str, ...]:
        """All: which ones a record has decides its layout."""
        return ()

    def documents(self, records: Iterable[Record], skip: int = 0, drop: Container[int] = ()) -> SFTDataset:
        """The documents of records, see :class:`~cheapertraining.data.conversion.encoders.Encoder`."""
        return SFTDataset(
            records,
            self.tokenizer,
            max_length=self.max_length,
            chat_template=self.chat_template,
            on_error=self.on_error,
            skip=skip,
            drop=drop,
        )

    def texts(self, records: Iterable[Record]) -> Iterator[str]:
        """What is said in the conversations, see :class:`~cheapertraining.data.conversion.encoders.Encoder`."""
        return self.documents(records).texts()
