"""Shards: read back by Streaming itself, nothing lost, never half written, read alike by the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cheapertraining.data import TokenizerWrapper, read_meta, write_split
from cheapertraining.data.shards import read_document_hashes
from cheapertraining.data.store import ShardFolder, ShardStore
from cheapertraining.errors import UserError
from tests.data.streamed import streamed

TEXT = {"seq_len": 32, "source": "s", "split": "train", "license": "PSF-2.0", "origin": "test"}


@pytest.fixture(scope="module")
def tokenizer(tiny_sample: Path) -> TokenizerWrapper:
    return TokenizerWrapper(tiny_sample / "tokenizer")


def pieces_of(folder: Path) -> list[list[int]]:
    """The pieces of documents in the rows of a folder, as Streaming's own reader gives them."""
    pieces = []
    for sample in streamed(folder):
        ends = np.cumsum(sample["doc_lengths"])
        assert ends[-1] <= len(sample["tokens"])
        pieces += [part.tolist() for part in np.split(sample["tokens"], ends)[:-1]]
    return pieces


@pytest.mark.parametrize("packing", ["best_fit", "concat", "pad"])
def test_all_tokens_come_back_through_streaming(
    tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path, packing: str
) -> None:
    meta = write_split(tmp_path / "s", documents, tokenizer, packing=packing, **TEXT)  # type: ignore[arg-type]
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in documents]
    pieces = pieces_of(tmp_path / "s")
    assert sorted(token for piece in pieces for token in piece) == sorted(token for ids in expected for token in ids)
    assert meta.tokens == sum(map(len, expected))
    assert meta.documents == len(documents)
    assert meta.samples * 32 == meta.tokens + meta.padding
    assert read_meta(tmp_path / "s") == meta
    assert len(np.unique(read_document_hashes(tmp_path / "s"))) == len(set(documents))


def test_store_reads_what_streaming_reads(tiny_sample: Path) -> None:
    folders = [ShardFolder(name, tiny_sample / name / "train") for name in ("code", "docs")]
    store = ShardStore(folders, seq_len=32)
    theirs = streamed(tiny_sample / "docs" / "train")
    wanted = np.array([5, 0, 3, len(theirs) - 1, 5])
    rows = store.read(store.ids(np.full(len(wanted), 1), wanted))
    ends = np.cumsum(rows.pieces)
    for row, index in enumerate(wanted.tolist()):
        sample = theirs[index]
        assert (rows.tokens[row] == sample["tokens"]).all()
        assert (rows.doc_lengths[ends[row] - rows.pieces[row] : ends[row]] == sample["doc_lengths"]).all()


def test_more_than_255_pieces_in_a_row(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    """The MDS header of a field grows with its length."""
    write_split(tmp_path / "s", ["a"] * 700, tokenizer, **(TEXT | {"seq_len": 1024}))  # type: ignore[arg-type]
    rows = ShardStore([ShardFolder("s", tmp_path / "s")], seq_len=1024).read(np.array([0]))
    assert rows.pieces.max() > 255
    assert (rows.doc_lengths == 2).all()


def test_same_input_same_bytes(tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_split(tmp_path / name, documents, tokenizer, **TEXT)  # type: ignore[arg-type]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_interrupted_write_leaves_what_was_there(
    tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path
) -> None:
    before = write_split(tmp_path / "s", documents[:5], tokenizer, **TEXT)  # type: ignore[arg-type]
    (tmp_path / ".s.unfinished").mkdir()
    (tmp_path / ".s.unfinished" / "index.json").write_text("{}", encoding="utf-8")

    def failing() -> list[str]:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_split(tmp_path / "s", (text for text in failing()), tokenizer, **TEXT)  # type: ignore[arg-type]
    assert read_meta(tmp_path / "s") == before
    write_split(tmp_path / "s", documents[:7], tokenizer, **TEXT)  # type: ignore[arg-type]
    assert read_meta(tmp_path / "s").documents == 7
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_no_documents(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source 's', split 'train': no documents with text"):
        write_split(tmp_path / "s", ["", ""], tokenizer, **TEXT)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


class TestBadShards:
    @pytest.fixture
    def folder(self, tiny_sample: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_sample / "code" / "train", tmp_path / "code"))

    @staticmethod
    def open(folder: Path, seq_len: int = 32, tokenizer: TokenizerWrapper | None = None) -> ShardStore:
        return ShardStore([ShardFolder("code/train", folder)], seq_len=seq_len, tokenizer=tokenizer, hint="make sample")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"no shards of 'code/train': .*index.json not found. Run `make sample` first"
        ):
            self.open(tmp_path / "nowhere")

    def test_other_seq_len(self, folder: Path) -> None:
        with pytest.raises(UserError, match="expects seq_len 64, the shards have 32"):
            self.open(folder, seq_len=64)

    def test_other_tokenizer(self, folder: Path, tmp_path: Path) -> None:
        from cheapertraining.data import train_bpe

        with pytest.raises(UserError, match="made with another tokenizer"):
            self.open(folder, tokenizer=train_bpe(["x y z"], 300, tmp_path / "other"))

    def test_truncated(self, folder: Path) -> None:
        shard = next(folder.glob("shard.*.mds"))
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"shard\.00000\.mds: truncated or overwritten: expected \d+ bytes, found"):
            self.open(folder)

    def test_shard_file_gone(self, folder: Path) -> None:
        next(folder.glob("shard.*.mds")).unlink()
        with pytest.raises(UserError, match="shard file not found"):
            self.open(folder)

    def test_no_meta(self, folder: Path) -> None:
        (folder / "meta.json").unlink()
        with pytest.raises(UserError, match=r"meta.json: not found, though every shard folder has one"):
            self.open(folder)

    def test_unreadable_meta(self, folder: Path) -> None:
        (folder / "meta.json").write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match=r"meta.json: unreadable"):
            self.open(folder)

    def test_empty_source(self, folder: Path) -> None:
        (folder / "index.json").write_text(json.dumps({"version": 2, "shards": []}), encoding="utf-8")
        with pytest.raises(UserError, match="An empty source cannot be sampled"):
            self.open(folder)

    def test_half_copied_folder(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        (folder / "meta.json").write_text(json.dumps(meta | {"samples": 3}), encoding="utf-8")
        with pytest.raises(UserError, match=r"meta.json counts 3 samples, index.json \d+"):
            self.open(folder)

    def test_cache_limit_on_the_only_copy(self, folder: Path) -> None:
        with pytest.raises(UserError, match="delete the only copy"):
            ShardStore([ShardFolder("code/train", folder)], seq_len=32, cache_limit="1gb")
