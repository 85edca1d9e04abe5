"""Tokenizers: round trip, no special tokens from text, a fingerprint that changes with what decides the ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cheapertraining.data import TokenizerWrapper, train_bpe
from cheapertraining.errors import UserError

TEXTS = ["the cat sat on the mat", "a dog and a cat", "Grüße, 世界"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    return train_bpe(TEXTS, 300, tmp_path_factory.mktemp("tokenizer"))


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(tokenizer: TokenizerWrapper, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_special_token_spelled_in_text_stays_text(tokenizer: TokenizerWrapper) -> None:
    ids = tokenizer.encode("before <|endoftext|> after")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "before <|endoftext|> after"


def test_transformers_loads_the_folder_and_agrees(tokenizer: TokenizerWrapper) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path)
    assert theirs.eos_token_id == tokenizer.eos_id == 0
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    wrapped = TokenizerWrapper(theirs)
    assert wrapped.fingerprint == tokenizer.fingerprint
    assert wrapped.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_fingerprint(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    assert train_bpe(TEXTS, 300, tmp_path / "same").fingerprint == tokenizer.fingerprint
    assert train_bpe(TEXTS, 260, tmp_path / "smaller").fingerprint != tokenizer.fingerprint
    assert tokenizer.token_dtype == "uint16"


def test_no_end_of_text_token(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((Path(tokenizer.path) / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}), encoding="utf-8")
    with pytest.raises(UserError, match="no end-of-text token"):
        TokenizerWrapper(tmp_path)


def test_unreadable_and_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable tokenizer file"):
        TokenizerWrapper(tmp_path)
    with pytest.raises(UserError, match=r"expected a folder with tokenizer.json"):
        TokenizerWrapper(tmp_path / "nothing" / "here")
