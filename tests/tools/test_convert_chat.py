"""The command line that converts conversations: same documents as without files, bad records, templates, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cheapertraining.data import SFTDataset, TokenizerWrapper, read_meta
from cheapertraining.data.shards import read_document_hashes
from cheapertraining.data.store import ShardFolder, ShardStore
from tests.data.chats import CHATML, INST, LAST_CLOSED, assistant, make_tokenizer, user
from tools.convert_chat import main

SEQ_LEN = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Sixty conversations in the three layouts, one of them twice, and two bad ones."""
    records = [
        {"messages": [user(f"q {n}"), assistant(f"a {n}")]} if n % 3 == 0
        else {"prompt": f"q {n}", "response": f"a {n}"} if n % 3 == 1
        else {"instruction": "q", "input": str(n), "output": f"a {n}"}
        for n in range(60)
    ]  # fmt: skip
    lines = [json.dumps(record) for record in [*records, {"prompt": "q 0", "response": "a 0"}]]
    lines += ['{"prompt": "x"}', json.dumps({"prompt": "x", "response": "long " * 60})]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def convert(chats: Path, tokenizer: TokenizerWrapper, out: Path, *more: str) -> int:
    options = ("--tokenizer", tokenizer.path, "--seq-len", str(SEQ_LEN), "--out", str(out))
    return main([str(chats), *options, *more])


def documents(folder: Path, tokenizer: TokenizerWrapper) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of each document of a shard folder."""
    store = ShardStore([ShardFolder("s", folder)], seq_len=SEQ_LEN, tokenizer=tokenizer)
    rows = store.read(np.arange(store.samples(0)))
    assert rows.loss_mask is not None
    found, piece = [], 0
    for row, pieces in enumerate(rows.pieces.tolist()):
        ends = np.cumsum(rows.doc_lengths[piece : piece + pieces])
        parts = [np.split(of, ends)[:-1] for of in (rows.tokens[row], rows.loss_mask[row])]
        found += [(ids.tolist(), mask.tolist()) for ids, mask in zip(*parts, strict=True)]
        piece += pieces
    return sorted(found)


def test_shards_hold_the_documents_of_the_dataset(
    chats: Path, tokenizer: TokenizerWrapper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(chats, tokenizer, out, "--on-error", "skip", "--split-by-hash", "train:0.8,heldout:0.2") == 0
    report = capsys.readouterr().out
    assert f"{chats}:62: expected columns messages, or prompt and response" in report
    assert f"{chats}:63: " in report
    assert f"tokens, more than {SEQ_LEN}; it would have to be cut." in report
    records = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
    data = list(SFTDataset(records, tokenizer, max_length=SEQ_LEN, on_error="skip"))
    metas = [read_meta(out / split) for split in ("train", "heldout")]
    assert sum(meta.documents for meta in metas) == len(data) == 61
    assert sum(meta.loss_tokens or 0 for meta in metas) == sum(int(d.loss_mask.sum()) for d in data)  # type: ignore[union-attr]
    assert min(meta.documents for meta in metas) > 3
    made = documents(out / "train", tokenizer) + documents(out / "heldout", tokenizer)
    expected = [
        (document.ids.tolist(), document.loss_mask.tolist()) for document in data if document.loss_mask is not None
    ]
    assert sorted(made) == sorted(expected)


def test_workers_and_resuming_give_the_same_bytes(chats: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        assert (
            convert(chats, tokenizer, tmp_path / name, "--on-error", "skip", "--workers", workers, "--source", "s") == 0
        )
    one, two = tmp_path / "one" / "train", tmp_path / "two" / "train"
    before = {file.name: file.read_bytes() for file in one.iterdir()}
    assert {file.name: file.read_bytes() for file in two.iterdir()} == before
    assert convert(chats, tokenizer, tmp_path / "one", "--on-error", "skip", "--source", "s", "--resume") == 0
    assert {file.name: file.read_bytes() for file in one.iterdir()} == before


def test_duplicates_whatever_their_layout(chats: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    assert convert(chats, tokenizer, tmp_path / "out", "--on-error", "skip", "--deduplicate") == 0
    hashes = read_document_hashes(tmp_path / "out" / "train")
    assert len(hashes) == len(np.unique(hashes)) == 60


def test_another_template(chats: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    template = tmp_path / "inst.jinja"
    template.write_text(INST, encoding="utf-8")
    options = ("--on-error", "skip", "--chat-template", str(template))
    assert convert(chats, tokenizer, tmp_path / "out", *options) == 0
    texts = [tokenizer.decode(ids) for ids, _ in documents(tmp_path / "out" / "train", tokenizer)]
    assert "<s>[INST] q 3 [/INST] a 3</s>" in texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"chats.jsonl:62: expected columns messages.* \(--on-error\)."),
        (
            ("--chat-template", "none.jinja"),
            "--chat-template: expected a text file with a Jinja template, cannot read none",
        ),
        (("--on-error", "ignore"), "on_error: expected one of fail, skip, found 'ignore'."),
    ],
)
def test_refusals(
    chats: Path,
    tokenizer: TokenizerWrapper,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    import re

    assert convert(chats, tokenizer, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert re.search(f"^convert_chat: .*{message}", error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "train" / "index.json").exists()


def test_a_broken_template(
    chats: Path, tokenizer: TokenizerWrapper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text(LAST_CLOSED.removesuffix("{% endif %}"), encoding="utf-8")
    assert convert(chats, tokenizer, tmp_path / "out", "--chat-template", str(template)) == 2
    assert "convert_chat: chat template: not a readable Jinja template" in capsys.readouterr().err
