"""The command line that looks at shards: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cheapertraining.data import TokenizerWrapper, read_meta, train_bpe, write_documents
from cheapertraining.data.conversion import Job, Settings, TextEncoder, convert
from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.documents import EncodedDocument
from cheapertraining.data.inspection import read_rows
from cheapertraining.data.pieces import list_pieces
from tests.data.many_shards import masked, write_many
from tools.inspect_shards import Style, main, readable, sample_text

COLOUR = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer(tiny_sample: Path) -> TokenizerWrapper:
    return TokenizerWrapper(tiny_sample / "tokenizer")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Thirty texts of some ten to some hundred words, no two alike."""
    return [" ".join(f"word{n * m}" for m in range(10 + n * 7 % 90)) for n in range(1, 31)]


@pytest.fixture
def chat(tokenizer: TokenizerWrapper, tmp_path: Path) -> Path:
    """A folder of two rows with a loss mask; two documents share one of them."""
    texts = ["ask the question, say the answer", "one\ntwo", "the third one is alone because of its length"]
    documents = []
    for text in texts:
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.uint16)
        documents.append(masked(EncodedDocument(ids, 7)))
    about = {"source": "s", "split": "train", "license": "none", "origin": "test"}
    write_documents(tmp_path / "chat", documents, tokenizer, seq_len=32, **about)
    return tmp_path / "chat"


class TestDescribe:
    def test_counts_histogram_and_samples(self, tiny_sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["describe", str(tiny_sample / "topics" / "train"), "--samples", "2"]) == 0
        printed = capsys.readouterr().out
        meta = read_meta(tiny_sample / "topics" / "train")
        assert f"tokens      {meta.tokens:,}" in printed
        assert f"samples     {meta.samples:,}  of 32 uint16 tokens" in printed
        assert "meta.json says" not in printed
        assert "16 to 31" in printed
        assert printed.count("\n  sample ") == 2
        assert "\x1b" not in printed

    def test_meta_that_counts_otherwise(
        self, tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = Path(shutil.copytree(tiny_sample / "topics" / "train", tmp_path / "train"))
        content = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        (folder / "meta.json").write_text(json.dumps(content | {"tokens": 12345}), encoding="utf-8")
        assert main(["describe", str(folder), "--samples", "0"]) == 0
        assert f"tokens      {content['tokens']:,}  but meta.json says 12,345" in capsys.readouterr().out

    def test_every_text_is_shown(self, chat: Path, tokenizer: TokenizerWrapper) -> None:
        """Without its marks, a row reads as its documents do."""
        rows = read_rows(chat, [0, 1])
        texts = [sample_text(rows, row, tokenizer, Style(coloured=False)) for row in range(2)]
        plain = {re.sub("[⟦⟧]", "", text).split("│ ")[0].rstrip("│") for text in texts}
        whole = "<|endoftext|>"
        alone = f"the third one is alone because of its length{whole}"
        pair = [f"ask the question, say the answer{whole}", f"one↵two{whole}"]
        found = sorted(part for text in plain for part in text.split("│"))
        assert found == sorted([alone, *pair])
        coloured = sample_text(rows, 0, tokenizer, Style(coloured=True))
        assert COLOUR.search(coloured)
        assert COLOUR.sub("", coloured) == re.sub("[⟦⟧]", "", texts[0])

    def test_marks_are_around_what_is_predicted(self, chat: Path, tokenizer: TokenizerWrapper) -> None:
        rows = read_rows(chat, [0])
        assert rows.loss_mask is not None
        text = sample_text(rows, 0, tokenizer, Style(coloured=False))
        predicted = tokenizer.decode(rows.tokens[0][rows.loss_mask[0] == 1].tolist())
        assert "".join(re.findall("⟦(.*?)⟧", text)) == readable(predicted)

    def test_ids_where_no_tokenizer_is_known(self, chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["describe", str(chat), "--samples", "1"]) == 0
        printed = capsys.readouterr().out
        assert "name it with --tokenizer" in printed
        assert " ".join(map(str, read_rows(chat, [0]).tokens[0, :2].tolist())) in printed

    def test_tokenizer_given(
        self, chat: Path, tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["describe", str(chat), "--tokenizer", str(tiny_sample / "tokenizer")]) == 0
        assert "ask the question" in capsys.readouterr().out
        train_bpe(["x y z"], 300, tmp_path / "other")
        assert main(["describe", str(chat), "--tokenizer", str(tmp_path / "other")]) == 2
        assert "made with another tokenizer" in capsys.readouterr().err

    def test_text_cannot_command_the_terminal(self) -> None:
        assert readable("a\x1b[2Jb\rc\u202ed") == "a�[2Jb�c�d"


class TestVerify:
    def test_exit_codes(
        self, tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_many(tmp_path / "s" / "train", documents, tokenizer)
        write_many(tmp_path / "s" / "probe", documents[:9], tokenizer)
        assert main(["verify", str(tmp_path / "s"), "--workers", "2"]) == 0
        printed = capsys.readouterr().out
        assert "ok: 0 findings in 2 folders" in printed
        assert "GB/s" in printed
        shard = tmp_path / "s" / "probe" / "shard.00000.mds"
        shard.write_bytes(shard.read_bytes()[:-1])
        assert main(["verify", str(tmp_path / "s" / "train"), str(tmp_path / "s" / "probe")]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{tmp_path / 's' / 'train'}: ok: 0 findings in 1 folders")
        assert lines[1].startswith(f"{shard}: expected {shard.stat().st_size + 1} bytes, found")
        assert ": WRONG: " in lines[-1]

    def test_no_such_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(tmp_path / "nowhere")]) == 2
        assert capsys.readouterr().err.startswith("inspect_shards: ")


def test_diff(tiny_sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tiny_sample / "code"), str(tiny_sample / "code")]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", str(tiny_sample / "code"), str(tiny_sample / "docs")]) == 1
    assert "heldout: meta.json, source: code | docs" in capsys.readouterr().out


def test_merge_of_parts_is_what_one_machine_makes(
    tiny_sample: Path, documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for number, text in enumerate(documents):
        (inputs / f"{number:02}.txt").write_text(text, encoding="utf-8")
    encoder = TextEncoder(str(tiny_sample / "tokenizer"))
    out = tmp_path / "out"
    pieces = tuple(list_pieces([str(inputs)]))
    for part in (1, 2):
        settings = Settings(source="out", seq_len=32, part=(part, 2))
        convert(Job(settings, encoder, pieces, Destination(str(out)), tmp_path / f"work{part}"))
        if part == 1:
            assert main(["merge", str(out)]) == 2
            assert capsys.readouterr().err.startswith("inspect_shards: ")
    assert main(["merge", str(out)]) == 0
    assert "train: " in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert read_meta(out / "train").documents == len(documents)
