"""Texts to rows on the fly, in the spelling of other packages: one item a row, tokenizer and length given.

For data of any size, shards are the way (``tools/convert_text.py``); this is for tests and small texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cheapertraining.data.collate import Batch
from cheapertraining.data.datasets import PretrainDataset
from cheapertraining.data.packed import PackedDataset
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError

__all__ = ["PackedTexts", "TokenPacker", "batch_tokenize", "compute_position_ids"]

_ROW = ("input_ids", "position_ids", "labels")


def compute_position_ids(input_ids: torch.Tensor, separator_token_id: int) -> torch.Tensor:
    """Positions that begin anew behind each separator, which is itself the last token of its document.

    Shards know the bounds of their documents and need no such guess: a separator inside a text is a bound here.

    Args:
        input_ids: integers ``[S]``.
        separator_token_id: the token that ends a document.

    Returns:
        ``[S]``, of the dtype and on the device of ``input_ids``.
    """
    index = torch.arange(len(input_ids), device=input_ids.device)
    ends = torch.zeros_like(index)
    ends[1:] = torch.where(input_ids == separator_token_id, index + 1, 0)[:-1]
    return (index - ends.cummax(0).values if len(index) else index).to(input_ids.dtype)


def batch_tokenize(texts: Sequence[str], tokenizer: Any, add_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each text, nothing added and nothing cut.

    Args:
        texts: any number.
        tokenizer: a Hugging Face tokenizer or a :class:`TokenizerWrapper`.
        add_special_tokens: must be false: documents are closed by one end-of-text token, when they are packed.

    Raises:
        UserError: special tokens are asked for.
    """
    if add_special_tokens:
        raise UserError("add_special_tokens: expected false: the end of text is added when documents are packed.")
    return _wrapped(tokenizer).encode_batch(texts) if texts else []


class PackedTexts(PackedDataset):
    """:class:`PackedDataset` of texts, by rows; ``PackedDataset(dataset=..., tokenizer=...)`` makes one.

    Args:
        dataset: texts, or mappings with the text in ``text_column``; iterated anew by each iteration.
        tokenizer: a Hugging Face tokenizer or a :class:`TokenizerWrapper`.
        max_length: tokens in a row.
        separator_token_id: the token that ends each document; None: the tokenizer's end of text, which alone is used
            for packing.
        text_column: key of the text in a mapping.
        packing: as for :class:`PackedDataset`.
    """

    def __init__(
        self,
        dataset: Iterable[str | Mapping[str, Any]],
        tokenizer: Any,
        max_length: int = 2048,
        separator_token_id: int | None = None,
        *,
        text_column: str = "text",
        packing: str = "best_fit",
    ) -> None:
        eos: int = tokenizer.eos_id if isinstance(tokenizer, TokenizerWrapper) else tokenizer.eos_token_id
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.separator_token_id = eos if separator_token_id is None else separator_token_id
        self._text_column = text_column
        self._packing = packing
        self._eos = eos

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # rows, not windows: what such loops iterate over
        """``input_ids``, ``position_ids`` and ``labels`` of each row, int64 ``[max_length]``."""
        if self.separator_token_id != self._eos:
            raise UserError(
                f"separator_token_id: expected the tokenizer's end of text ({self._eos}), found "
                f"{self.separator_token_id}. Leave it out."
            )
        wrapped = _wrapped(self.tokenizer)
        documents = PretrainDataset(self.dataset, wrapped, self._text_column)
        packed = PackedDataset(documents, self.max_length, wrapped.pad_id, self._packing)
        for batch in packed.batches(1):
            yield {name: batch[name][0] for name in _ROW}

    def _compute_position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return compute_position_ids(input_ids, self.separator_token_id)


class TokenPacker:
    """:class:`PackedTexts` for texts that come one by one.

    Args:
        tokenizer: a Hugging Face tokenizer or a :class:`TokenizerWrapper`.
        max_length: tokens in a row.
        tokenize_batch_size: texts that are tokenized and packed together. The last row of each lot may be padded.
    """

    def __init__(self, tokenizer: Any, max_length: int = 2048, tokenize_batch_size: int = 256) -> None:
        self.tokenizer = _wrapped(tokenizer)
        self.max_length = max_length
        self.tokenize_batch_size = tokenize_batch_size
        self._texts: list[str] = []

    def add_text(self, text: str) -> Iterator[Batch]:
        """Take in a text; yield the rows of a lot that is complete with it."""
        self._texts.append(text)
        if len(self._texts) >= self.tokenize_batch_size:
            yield from self.flush()

    def flush(self) -> Iterator[Batch]:
        """The rows of what has not been packed yet."""
        texts, self._texts = [text for text in self._texts if text], []
        if texts:
            yield from PackedTexts(texts, self.tokenizer, self.max_length)

    def reset(self) -> None:
        """Forget what has not been packed yet."""
        self._texts.clear()


def _wrapped(tokenizer: Any) -> TokenizerWrapper:
    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
