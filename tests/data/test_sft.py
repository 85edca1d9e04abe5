"""Conversations as documents: problems with their places, rows and batches, shards, mixtures with plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cheapertraining.data import PackedDataset, SFTDataset, TokenizerWrapper, get_loader, write_documents, write_split
from cheapertraining.data.documents import document_hash
from cheapertraining.data.pieces import list_pieces
from cheapertraining.data.records import read_piece
from cheapertraining.data.shards import read_document_hashes, read_meta
from cheapertraining.data.store import ShardFolder, ShardStore
from cheapertraining.errors import UserError
from tests.data.chats import CHATML, LAST_CLOSED, assistant, make_tokenizer, user
from tests.data.streamed import streamed

SEQ_LEN = 48
ABOUT: dict[str, Any] = {"seq_len": SEQ_LEN, "license": "none", "origin": "test"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Seventy short conversations of one to three turns, no two alike."""
    return [
        {"messages": [m for t in range(1 + n % 3) for m in (user(f"what is {n}+{t}"), assistant(f"{n + t}"))]}
        for n in range(70)
    ]


def predicted(tokenizer: TokenizerWrapper, row: Any, mask: Any) -> str:
    return tokenizer.decode(row[np.asarray(mask, bool)].tolist())


# ---- documents -------------------------------------------------------------------------------------------------------


def test_documents(tokenizer: TokenizerWrapper, records: list[dict[str, Any]]) -> None:
    data = SFTDataset(records, tokenizer, max_length=SEQ_LEN * 4)
    documents = list(data)
    assert len(documents) == len(records)
    assert (data.problems.count, data.empty) == (0, 0)
    for record, document in zip(records, documents, strict=True):
        assert document.loss_mask is not None
        answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        assert predicted(tokenizer, document.ids, document.loss_mask) == "<|im_end|>".join([*answers, "</s>"])
        text = json.dumps([record["messages"]], sort_keys=True, ensure_ascii=False)
        assert document.hash == document_hash(text)
    again = list(data)
    assert [document.ids.tolist() for document in again] == [document.ids.tolist() for document in documents]


def test_skip_and_drop(tokenizer: TokenizerWrapper, records: list[dict[str, Any]]) -> None:
    documents = [document.hash for document in SFTDataset(records, tokenizer)]
    texts = list(SFTDataset(records, tokenizer).texts())
    assert [document_hash(text) for text in texts] == documents
    bad: list[Any] = [{"prompt": "x"}, *records]  # what is no conversation has no number
    rest = SFTDataset(bad, tokenizer, on_error="skip", skip=3, drop={0, 5})
    assert [document.hash for document in rest] == [
        documents[n] for n in range(len(records)) if n not in (0, 1, 2, 3, 5)
    ]
    assert (rest.dropped, rest.problems.count) == (2, 1)


def test_problems_have_places_and_come_in_order(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": "Hi", "response": "Ho"}),
        json.dumps({"messages": [user("x"), {"role": "bot", "content": "y"}]}),
        json.dumps({"messages": None, "prompt": None}),
        "{not json",
        json.dumps({"instruction": "Count.", "output": "one two " * 40}),
        json.dumps({"prompt": "Hi", "response": ""}),
        json.dumps({"prompt": "Hi", "response": "Hey"}),
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    read = [record for piece in list_pieces([str(file)]) for record in read_piece(piece)]
    data = SFTDataset(read, tokenizer, max_length=64, on_error="skip")
    assert [predicted(tokenizer, document.ids, document.loss_mask) for document in data] == [
        "Ho<|im_end|></s>",
        "Hey<|im_end|></s>",
    ]
    assert data.problems.count == 4
    assert data.empty == 1
    role, broken, long, empty = data.problems.messages
    assert role == f"{file}:2: message 2: expected a role of system, user, assistant, tool, found 'bot'."
    assert broken.startswith(f"{file}:4: ")
    assert long.startswith(f"{file}:5: ")
    assert " tokens, more than 64; it would have to be cut." in long
    assert empty == f"{file}:6: column 'response' is empty."
    with pytest.raises(UserError, match=r"chats\.jsonl:2: message 2: .* or pass over such records with on_error=skip"):
        list(SFTDataset(read, tokenizer))
    with pytest.raises(UserError, match=r"chats\.jsonl:5: \d+ tokens, more than 64"):
        list(SFTDataset(read[4:], tokenizer, max_length=64))


def test_a_template_that_does_not_tell_the_turns(tokenizer: TokenizerWrapper) -> None:
    two = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    data = SFTDataset([two, {"prompt": "a", "response": "b"}], tokenizer, chat_template=LAST_CLOSED, on_error="skip")
    assert [tokenizer.decode(document.ids.tolist()) for document in data] == ["user: a\nassistant: b</s>"]
    assert "record 0: the chat template renders a turn of the assistant otherwise" in data.problems.messages[0]


def test_nothing_to_predict(tokenizer: TokenizerWrapper) -> None:
    """The answer is the first token, before which nothing stands."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    record = {"messages": [assistant("x"), user("y")]}
    with pytest.raises(UserError, match="record 0: nothing in it is to be predicted"):
        list(SFTDataset([record], tokenizer, chat_template=template))


# ---- rows, shards, batches -------------------------------------------------------------------------------------------


def test_iterable_and_shards_give_the_same(
    tokenizer: TokenizerWrapper, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    documents = SFTDataset(records, tokenizer, max_length=SEQ_LEN * 4)
    meta = write_documents(tmp_path / "s", documents, tokenizer, source="s", split="train", **ABOUT)
    (window,) = PackedDataset(documents, SEQ_LEN, tokenizer.pad_id)
    assert window.loss_mask is not None
    store = ShardStore([ShardFolder("s", tmp_path / "s")], seq_len=SEQ_LEN, tokenizer=tokenizer)
    rows = store.read(np.arange(store.samples(0)))
    assert rows.loss_mask is not None
    for ours, theirs in ((rows.tokens, window.tokens), (rows.loss_mask, window.loss_mask)):
        assert (ours == theirs).all()
    assert rows.doc_lengths.tolist() == window.doc_lengths.tolist()
    for row, sample in enumerate(streamed(tmp_path / "s")):
        assert (sample["loss_mask"] == rows.loss_mask[row]).all()
    assert meta.loss_tokens == int(rows.loss_mask.sum()) == sum(int(d.loss_mask.sum()) for d in documents)  # type: ignore[union-attr]
    assert read_meta(tmp_path / "s") == meta
    assert meta.documents == len(read_document_hashes(tmp_path / "s")) == len(records)


def test_batches(tokenizer: TokenizerWrapper, records: list[dict[str, Any]]) -> None:
    """Labels are where the mask is, at the place of their own token; packed conversations are positions apart."""
    documents = SFTDataset(records, tokenizer)
    said, starts = [], 0
    for batch in PackedDataset(documents, 256, tokenizer.pad_id).batches(4):
        labels, ids, positions = batch["labels"], batch["input_ids"], batch["position_ids"]
        assert (labels[labels != -100] == ids[labels != -100]).all()
        starts += int(((positions == 0) & (batch.get("attention_mask", torch.ones_like(ids)) == 1)).sum())
        said.append(tokenizer.decode(labels[labels != -100].tolist()))
    expected = [predicted(tokenizer, document.ids, document.loss_mask) for document in documents]
    assert starts == len(records)
    assert sorted("".join(said).split("</s>")[:-1]) == sorted(text.removesuffix("</s>") for text in expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mixture_of_conversations_and_plain_text(
    tokenizer: TokenizerWrapper, records: list[dict[str, Any]], documents: list[str], tmp_path: Path, workers: int
) -> None:
    for split, chats, texts in (("train", records[:60], documents[:30]), ("heldout", records[60:], documents[30:])):
        chosen = SFTDataset(chats, tokenizer)
        write_documents(tmp_path / "chat" / split, chosen, tokenizer, source="chat", split=split, **ABOUT)
        write_split(tmp_path / "text" / split, texts, tokenizer, source="text", split=split, **ABOUT)
    data = {"local": str(tmp_path), "seq_len": SEQ_LEN, "sources": {"text": {}, "chat": {}}}
    loader = get_loader(data, tokenizer, 8, num_workers=workers)
    shards = [streamed(tmp_path / name / "train") for name in ("text", "chat")]
    seen = {0: 0, 1: 0}
    for batch, _ in zip(loader, range(12), strict=False):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
        first = batch["position_ids"] == 0
        sources, samples = batch["source"].numpy(), batch["sample_id"].numpy()
        for row, (source, sample) in enumerate(zip(sources, samples, strict=True)):
            theirs = shards[source][int(sample)]
            mask = torch.from_numpy(theirs.get("loss_mask", np.ones(SEQ_LEN, np.uint8)).astype(bool))
            expected = mask & real[row] & ~first[row]
            assert ((batch["labels"][row] != -100) == expected).all()
            assert (batch["input_ids"][row].numpy() == theirs["tokens"]).all()
            seen[source] += 1
    assert min(seen.values()) > 30
    held = next(iter(loader.heldout["chat"]))
    assert 0 < int((held["labels"] != -100).sum()) < held["labels"].numel() // 2


def test_documents_of_both_kinds_do_not_share_a_folder(
    tokenizer: TokenizerWrapper, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    from cheapertraining.data import PretrainDataset

    both = [*SFTDataset(records[:2], tokenizer), *PretrainDataset(["text"], tokenizer)]
    for documents in (both, both[::-1]):
        with pytest.raises(UserError, match="source 's', split 'train': some documents have a loss mask, others not"):
            write_documents(tmp_path / "s", documents, tokenizer, source="s", split="train", **ABOUT)
    assert not (tmp_path / "s").exists()
