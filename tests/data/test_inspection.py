"""Looking at shards: counts against Streaming's own reader, and every kind of damage done on purpose."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from cheapertraining.data import TokenizerWrapper, read_meta, write_split
from cheapertraining.data.inspection import describe, diff, read_rows
from cheapertraining.data.rows import TokenRows
from cheapertraining.data.shards import DOCUMENTS_FILE
from cheapertraining.data.verification import verify
from cheapertraining.errors import UserError
from tests.data.many_shards import SEQ_LEN, write_many, write_rows
from tests.data.streamed import streamed


@pytest.fixture(scope="session")
def tokenizer(tiny_sample: Path) -> TokenizerWrapper:
    return TokenizerWrapper(tiny_sample / "tokenizer")


@pytest.fixture(scope="module")
def made(tokenizer: TokenizerWrapper, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``plain``, ``masked`` and ``zstd`` of the same documents, several shards each."""
    root = tmp_path_factory.mktemp("made")
    write_many(root / "plain", documents, tokenizer)
    write_many(root / "masked", documents, tokenizer, loss_mask=True)
    write_many(root / "zstd", documents, tokenizer, compression="zstd:3")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of ``plain`` to damage."""
    return Path(shutil.copytree(made / "plain", tmp_path / "plain"))


def findings(folder: Path) -> list[str]:
    """What verify finds, with names of files in place of paths."""
    return [str(finding).replace(f"{folder}/", "") for finding in verify(folder, workers=2).findings]


def edit_meta(folder: Path, **changes: Any) -> None:
    file = folder / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_index(folder: Path, shard: int, **changes: Any) -> None:
    """Change what the index says of the file of a shard."""
    content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    content["shards"][shard]["raw_data"] |= changes
    (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")


def row_of_bytes(file: Path, row: int) -> slice:
    """Where a sample lies in a shard file."""
    first, last = np.frombuffer(file.read_bytes(), "<u4", 2, 4 + 4 * row).tolist()
    return slice(first, last)


def all_rows(folder: Path) -> TokenRows:
    return read_rows(folder, range(read_meta(folder).samples))


class TestDescribe:
    @pytest.mark.parametrize("kind", ["plain", "masked", "zstd"])
    def test_counts_are_those_that_streaming_reads(self, made: Path, kind: str, tmp_path: Path) -> None:
        (found,) = describe(made / kind)
        copy = shutil.copytree(made / kind, tmp_path / kind)  # Streaming decompresses beside the shards
        ids: Counter[int] = Counter()
        lengths: list[int] = []
        loss_tokens = 0
        for sample in streamed(copy):
            lengths += sample["doc_lengths"].tolist()
            ids.update(sample["tokens"][: int(sample["doc_lengths"].sum())].tolist())
            loss_tokens += int(sample["loss_mask"].sum()) if "loss_mask" in sample else 0
        meta = read_meta(made / kind)
        assert (found.samples, found.documents) == (meta.samples, meta.documents)
        assert (found.tokens, found.padding) == (meta.tokens, meta.padding) == (sum(lengths), found.padding)
        assert found.pieces == len(lengths)
        assert found.loss_tokens == meta.loss_tokens == (loss_tokens if kind == "masked" else None)
        assert dict(enumerate(found.token_counts.tolist())) == {i: ids[i] for i in range(meta.vocab_size)}
        assert found.distinct_ids == len(ids)
        assert dict(found.most_frequent(5)) == dict(sorted(ids.items(), key=lambda item: (-item[1], item[0]))[:5])
        for row in found.lengths:
            inside = [length for length in lengths if row.low <= length <= row.high]
            assert (row.pieces, row.tokens) == (len(inside), sum(inside))
        assert sum(row.pieces for row in found.lengths) == len(lengths)

    def test_compression(self, made: Path) -> None:
        plain, packed = describe(made / "plain")[0], describe(made / "zstd")[0]
        assert plain.compression_ratio == 1
        assert plain.raw_bytes == plain.disk_bytes == sum(f.stat().st_size for f in (made / "plain").glob("*.mds"))
        index = json.loads((made / "zstd" / "index.json").read_text(encoding="utf-8"))
        assert packed.raw_bytes == sum(shard["raw_data"]["bytes"] for shard in index["shards"])
        assert packed.disk_bytes == sum(f.stat().st_size for f in (made / "zstd").glob("*.zstd"))
        assert packed.compression_ratio > 1.2

    def test_all_splits_of_a_source(self, tiny_sample: Path) -> None:
        assert [found.meta.split for found in describe(tiny_sample / "code")] == ["heldout", "probe", "train"]
        assert len(describe(tiny_sample)) == 9

    def test_read_rows_gives_what_streaming_gives(self, made: Path) -> None:
        theirs = streamed(made / "masked")
        wanted = [120, 3, len(theirs) - 1, 50, 3]
        rows = read_rows(made / "masked", wanted)
        parts = np.split(rows.doc_lengths, np.cumsum(rows.pieces)[:-1])
        assert rows.loss_mask is not None
        for i, index in enumerate(wanted):
            sample = theirs[index]
            assert (rows.tokens[i] == sample["tokens"]).all()
            assert (rows.loss_mask[i] == sample["loss_mask"]).all()
            assert parts[i].tolist() == sample["doc_lengths"].tolist()

    def test_no_shards(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"expected a shard folder .* found no shards in it"):
            describe(tmp_path)
        with pytest.raises(UserError, match="found no such folder"):
            describe(tmp_path / "nowhere")

    def test_damaged_shard(self, folder: Path) -> None:
        (folder / "shard.00001.mds").write_bytes(b"")
        with pytest.raises(UserError, match=r"shard\.00001\.mds: expected 50 samples, found a file of 0 bytes"):
            describe(folder)

    def test_samples_that_are_not_there(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"expected samples from 0 to \d+, found \[-1\]"):
            read_rows(folder, [-1])


class TestVerify:
    @pytest.mark.parametrize("kind", ["plain", "masked", "zstd"])
    def test_sound_shards(self, made: Path, kind: str) -> None:
        result = verify(made / kind, workers=2)
        assert result.findings == []
        assert result.samples == read_meta(made / kind).samples
        assert result.bytes == sum(file.stat().st_size for file in (made / kind).glob("*.mds*"))
        assert result.shards > 3
        assert result.unhashed == 0

    def test_rows_with_more_than_255_pieces(self, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
        """The head of a field is of another size then, and tokens lie at odd bytes."""
        texts = ["a"] * 1500 + ["b" * 3000]
        meta = write_split(
            tmp_path / "s", texts, tokenizer, seq_len=1024, source="s", split="train", license="none", origin="test"
        )
        assert verify(tmp_path / "s").findings == []
        assert describe(tmp_path / "s")[0].tokens == meta.tokens

    def test_all_splits_and_sources(self, tiny_sample: Path) -> None:
        result = verify(tiny_sample)
        assert (result.findings, result.folders) == ([], 9)

    def test_flipped_byte(self, folder: Path) -> None:
        file = folder / "shard.00002.mds"
        data = bytearray(file.read_bytes())
        before = xxhash.xxh64(data).hexdigest()
        data[row_of_bytes(file, 7).stop - 2 * SEQ_LEN] ^= 1  # the first token: still an id of the vocabulary
        file.write_bytes(data)
        found = findings(folder)
        assert len(found) == 2
        assert found[0].startswith("shard.00002.mds: expected sha1 ")
        assert found[1] == f"shard.00002.mds: expected xxh64 {before}, found {xxhash.xxh64(data).hexdigest()}."

    def test_wrong_id_under_a_right_hash(self, folder: Path) -> None:
        file = folder / "shard.00002.mds"
        data = bytearray(file.read_bytes())
        for row in (7, 31):
            last = row_of_bytes(file, row).stop
            data[last - 2 * SEQ_LEN : last - 2 * SEQ_LEN + 2] = (600).to_bytes(2, "little")
        file.write_bytes(data)
        edit_index(folder, 2, hashes={"xxh64": xxhash.xxh64(data).hexdigest()})
        assert findings(folder) == [
            "shard.00002.mds: expected token ids below 512, found 600 in row 7 (as in 1 more rows)."
        ]

    def test_swapped_shards(self, folder: Path) -> None:
        one, other = (folder / f"shard.0000{n}.mds" for n in (0, 1))
        data = one.read_bytes(), other.read_bytes()
        one.write_bytes(data[1])
        other.write_bytes(data[0])
        found = findings(folder)
        assert {line.split(":")[0] for line in found} == {"shard.00000.mds", "shard.00001.mds"}
        assert sum("xxh64" in line for line in found) == 2

    @pytest.mark.parametrize("keep", [-100, 100, 3, 0])
    def test_truncated(self, folder: Path, keep: int) -> None:
        file = folder / "shard.00001.mds"
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[:keep])
        found = findings(folder)
        assert found[0] == f"shard.00001.mds: expected {size} bytes, found {file.stat().st_size}."
        assert len(found) == 4  # size, two hashes, layout
        assert not any("meta.json" in line for line in found)  # nothing is known of the counts

    def test_missing_shard(self, folder: Path) -> None:
        (folder / "shard.00003.mds").unlink()
        assert findings(folder) == ["shard.00003.mds: expected a shard file, found none."]

    def test_files_that_the_index_does_not_name(self, folder: Path) -> None:
        shutil.copy(folder / "shard.00000.mds", folder / "part-000.00000.mds")
        expected = "part-000.00000.mds: expected only shards that index.json names, found one that it does not name."
        assert findings(folder) == [expected]

    def test_a_shard_named_twice(self, folder: Path) -> None:
        content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        content["shards"][1] = content["shards"][0]
        (folder / "shard.00001.mds").unlink()
        (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")
        assert findings(folder)[0] == "index.json: expected 'shard.00000.mds' once, found it 2 times."

    @pytest.mark.parametrize("name", ["samples", "tokens", "padding", "loss_tokens"])
    def test_wrong_counts(self, made: Path, tmp_path: Path, name: str) -> None:
        folder = Path(shutil.copytree(made / "masked", tmp_path / "masked"))
        right = getattr(read_meta(folder), name)
        edit_meta(folder, **{name: right + 1})
        assert findings(folder) == [f"meta.json: expected {right} {name}, as the shards have, found {right + 1}."]

    def test_documents(self, folder: Path) -> None:
        file = folder / DOCUMENTS_FILE
        data = file.read_bytes()
        file.write_bytes(data[:-8])
        assert findings(folder) == [f"{file.name}: expected 320 bytes for 40 documents, found 312."]
        file.write_bytes(data[8:] + data[:8])
        assert findings(folder)[0].startswith(f"{file.name}: expected input_hash {read_meta(folder).input_hash}")
        file.unlink()
        assert findings(folder) == [f"{file.name}: expected 40 hashes of documents, found no such file."]

    def test_lengths_that_do_not_fit(self, folder: Path) -> None:
        rows = all_rows(folder)
        rows.doc_lengths[0] += SEQ_LEN
        rows.doc_lengths[-1] = 0
        meta = read_meta(folder)
        for file in folder.glob("*.mds"):
            file.unlink()
        write_rows(folder, [rows], meta)
        found = findings(folder)
        assert found[0] == f"shard.00000.mds: expected doc_lengths of at least 1, found 0 in row {len(rows) - 1}."
        assert found[1].startswith("shard.00000.mds: expected doc_lengths that sum to at most 32, found ")
        assert found[1].endswith(" in row 0.")

    def test_padding(self, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
        texts = [f"short {n}" for n in range(9)]
        meta = write_split(
            tmp_path / "s",
            texts,
            tokenizer,
            packing="pad",
            seq_len=SEQ_LEN,
            source="s",
            split="train",
            license="none",
            origin="test",
        )
        rows = all_rows(tmp_path / "s")
        filled = rows.doc_lengths.astype(np.int64)
        other = replace(rows, tokens=np.where(np.arange(SEQ_LEN) < filled[:, None], rows.tokens, 3).astype(np.uint16))
        mixed = replace(rows, tokens=rows.tokens.copy())
        mixed.tokens[4, -2] = 9
        write_rows(tmp_path / "s", [rows, other, mixed], meta)
        edit_meta(tmp_path / "s", samples=27, tokens=3 * meta.tokens, padding=3 * meta.padding)
        assert findings(tmp_path / "s") == [
            "shard.00002.mds: expected only id 0 as padding, found 9 in row 4.",
            "shard.00001.mds: expected padding of id 0 as in shard.00000.mds, found id 3.",
        ]

    def test_loss_mask(self, made: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(made / "masked", tmp_path / "masked"))
        rows, meta = all_rows(folder), read_meta(folder)
        assert rows.loss_mask is not None
        filled = np.add.reduceat(rows.doc_lengths, np.cumsum(rows.pieces) - rows.pieces)
        short = int(np.flatnonzero(filled < SEQ_LEN)[0])
        rows.loss_mask[3, 0] = 2
        rows.loss_mask[short, -1] = 1
        for file in folder.glob("*.mds"):
            file.unlink()
        write_rows(folder, [rows], meta)
        edit_meta(folder, loss_tokens=int(rows.loss_mask.sum()))
        assert findings(folder) == [
            "shard.00000.mds: expected a loss_mask of 0 and 1, found 2 in row 3.",
            f"shard.00000.mds: expected a loss_mask of 0 in padding, found 1 in row {short}.",
        ]

    def test_damaged_compressed_shard(self, made: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(made / "zstd", tmp_path / "zstd"))
        file = folder / "shard.00001.mds.zstd"
        data = bytearray(file.read_bytes())
        data[:4] = b"none"
        file.write_bytes(data)
        found = findings(folder)
        assert len(found) == 3
        assert found[2].startswith("shard.00001.mds.zstd: expected data compressed with zstd:3, found '")

    def test_compressed_shard_of_other_rows(self, made: Path, tmp_path: Path) -> None:
        """Its own hash is right, but what is in it is not what the index says."""
        folder = Path(shutil.copytree(made / "zstd", tmp_path / "zstd"))
        content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        content["shards"][0]["zip_data"] = content["shards"][1]["zip_data"]
        (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")
        found = findings(folder)
        assert found[0].startswith("shard.00000.mds.zstd: expected only shards that index.json names")
        assert any(line.startswith("shard.00001.mds.zstd: expected decompressed xxh64 ") for line in found)

    def test_no_index_yet(self, made: Path, tmp_path: Path) -> None:
        shutil.copytree(made / "plain", tmp_path / "train")
        shutil.copytree(made / "plain", tmp_path / "probe", ignore=shutil.ignore_patterns("index.json"))
        assert findings(tmp_path) == [
            "probe/index.json: expected an index of MDS shards, found 'not found, so the folder is not finished'."
        ]

    def test_other_columns(self, made: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(made / "plain", tmp_path / "plain"))
        edit_meta(folder, seq_len=64)
        found = findings(folder)
        assert "ndarray:uint16:64" in found[0]
        assert "ndarray:uint16:32" in found[0]

    def test_without_hashes(self, tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path) -> None:
        write_many(tmp_path / "s", documents, tokenizer, hashes=())
        result = verify(tmp_path / "s")
        assert result.findings == []
        assert result.unhashed == result.shards > 3

    def test_random_damage_never_ends_in_another_error(self, folder: Path) -> None:
        """Bytes anywhere in a file: something is found, whatever they mean."""
        file = folder / "shard.00001.mds"
        sound = file.read_bytes()
        generator = np.random.default_rng(0)
        for _ in range(150):
            data = bytearray(sound)
            place = int(generator.integers(0, 2000 if generator.random() < 0.5 else len(data) - 4))
            data[place : place + 4] = generator.bytes(4)
            file.write_bytes(data)
            assert any("xxh64" in line for line in findings(folder)) == (bytes(data) != sound)


class TestDiff:
    def test_same(self, made: Path, tiny_sample: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(tiny_sample / "code", tmp_path / "code")
        assert diff(tiny_sample / "code", copy) == []

    def test_compression_changes_no_row(self, made: Path) -> None:
        """But the hashes of shards: a shard says how it is compressed."""
        found = diff(made / "plain", made / "zstd")
        assert found
        assert all(difference.what.startswith("sha1 of shard.") for difference in found)

    def test_other_shard_sizes(
        self, made: Path, tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path
    ) -> None:
        """The same rows in other shards: the number and the hashes of shards differ, no row does."""
        write_many(tmp_path / "other", documents, tokenizer, rows_in_shard=37)
        found = diff(made / "plain", tmp_path / "other")
        assert found[0].what == "number of shards"
        assert len(found) > 3
        assert all(difference.what.startswith("sha1 of shard.") for difference in found[1:])

    def test_one_token(self, made: Path, folder: Path) -> None:
        file = folder / "shard.00002.mds"
        data = bytearray(file.read_bytes())
        place = row_of_bytes(file, 7).stop - 2 * SEQ_LEN + 2 * 5
        before = int.from_bytes(data[place : place + 2], "little")
        data[place : place + 2] = (before ^ 1).to_bytes(2, "little")
        file.write_bytes(data)
        edit_index(folder, 2, hashes={"xxh64": "0" * 16})
        found = [str(difference) for difference in diff(made / "plain", folder)]
        assert found[0].endswith(f"| {'0' * 16}")
        assert found[1:] == [f"first row that differs, 107: token {before} in column 5 | token {before ^ 1}"]

    def test_documents_and_meta(
        self, tokenizer: TokenizerWrapper, documents: list[str], tmp_path: Path, made: Path
    ) -> None:
        write_many(tmp_path / "fewer", [*documents[:-2], documents[0], "another"], tokenizer)
        found = {difference.what: difference for difference in diff(made / "plain", tmp_path / "fewer")}
        mine = found["documents in only one"]
        assert mine.a.startswith("2 (")
        assert mine.b.startswith("2 (")  # one of them is there twice
        assert "meta.json, input_hash" in found
        assert any(what.startswith("first row that differs") for what in found)

    def test_more_rows(self, made: Path, folder: Path) -> None:
        content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        rows = sum(shard["samples"] for shard in content["shards"][:-1])
        content["shards"].pop()
        (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")
        assert [str(found) for found in diff(made / "plain", folder)][1:] == [f"row {rows}: there | none"]

    def test_with_and_without_loss_mask(self, made: Path) -> None:
        whats = [found.what for found in diff(made / "plain", made / "masked")]
        assert "meta.json, loss_tokens" in whats
        assert whats[-1] == "columns"

    def test_splits_in_only_one(self, tiny_sample: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_sample / "code" / "train", tmp_path / "code" / "train")
        found = [str(difference) for difference in diff(tiny_sample / "code", tmp_path / "code")]
        assert found == ["heldout: there | missing", "probe: there | missing"]
