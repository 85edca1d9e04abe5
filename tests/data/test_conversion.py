"""Documents to shards: nothing lost, the same bytes for any workers, parts and crashes, and clear refusals."""

from __future__ import annotations

import filecmp
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cheapertraining.data import PackedDataset, PretrainDataset, TokenizerWrapper, read_meta, train_bpe
from cheapertraining.data import pieces as pieces_module
from cheapertraining.data.conversion import Job, Report, Settings, TextEncoder, convert, merge_parts, try_out
from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.documents import document_hash
from cheapertraining.data.pieces import list_pieces
from cheapertraining.data.shards import read_document_hashes
from cheapertraining.errors import UserError
from tests.data.streamed import streamed
from tools.convert_text import main

SPLITS = (("train", 0.8), ("heldout", 0.2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    return train_bpe(["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x"], 300,
                     tmp_path_factory.mktemp("tokenizer"))  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of documents of all lengths; one document comes twice, some are empty."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for file in range(3):
        with (folder / f"{file}.jsonl").open("w") as handle:
            for number in range(300):
                length = int(generator.lognormal(4.5, 1.2))
                text = "".join(generator.choice(list("the quick brown\n"), length)) if number % 50 else ""
                handle.write(json.dumps({"text": text, "n": number}) + "\n")
            handle.write(json.dumps({"text": "twice"}) + "\n")
    return folder


def make_job(corpus: Path | str, out: Path, tokenizer: TokenizerWrapper, **changes: Any) -> Job:
    """Many pieces and windows of little input."""
    on_error = changes.pop("on_error", "fail")
    settings = Settings("s", 32, SPLITS, shard_bytes=40_000, window_tokens=5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "SMALLEST_PIECE", changes.pop("piece_bytes", 20_000))
        found = tuple(list_pieces([str(corpus)]))
    encoder = TextEncoder(tokenizer.path, on_error=on_error)
    part = changes.get("part", (1, 1))
    work = out / ".conversion" / (f"{part[0]}" if part[1] > 1 else "")
    return Job(replace(settings, **changes), encoder, found, Destination(str(out)), work)


def texts_in(corpus: Path) -> list[str]:
    lines = [line for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]
    return [text for line in lines if (text := json.loads(line)["text"])]


def documents_in(folder: Path, tokenizer: TokenizerWrapper) -> Counter[str]:
    """Decoded documents of a shard folder, read by Streaming itself; only for rows whose documents are not cut."""
    found: Counter[str] = Counter()
    for sample in streamed(folder):
        ends = np.cumsum(sample["doc_lengths"])
        for end, length in zip(ends.tolist(), sample["doc_lengths"].tolist(), strict=True):
            ids = sample["tokens"][end - length : end]
            assert ids[-1] == tokenizer.eos_id
            found[tokenizer.decode(ids[:-1])] += 1
    return found


def same_files(a: Path, b: Path) -> bool:
    names = [sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    return names[0] == names[1] and not filecmp.cmpfiles(a, b, names[0], shallow=False)[1]


def test_every_document_comes_back_and_the_report_adds_up(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    job = make_job(corpus, tmp_path / "s", tokenizer, seq_len=4096, window_tokens=20_000)
    report = convert(job)
    texts = texts_in(corpus)
    assert sum((documents_in(tmp_path / "s" / split, tokenizer) for split, _ in SPLITS), Counter()) == Counter(texts)
    assert (report.records, report.empty, report.problems, report.duplicates) == (903, 903 - len(texts), 0, 0)
    assert sum(meta.tokens for meta in report.metas.values()) == sum(len(tokenizer.encode(t)) + 1 for t in texts)
    for split, share in SPLITS:
        meta = read_meta(tmp_path / "s" / split)
        assert meta == report.metas[split]
        assert meta.tokens + meta.padding == meta.samples * meta.seq_len
        of_split = [h for text in texts if ((h := document_hash(text)) < 0.8 * 2**64) == (split == "train")]
        assert sorted(read_document_hashes(tmp_path / "s" / split).tolist()) == sorted(of_split)
        assert meta.documents == pytest.approx(share * len(texts), rel=0.2)
    assert not (tmp_path / "s" / ".conversion").exists()


@pytest.mark.parametrize("packing", ["best_fit", "concat", "pad"])
def test_no_token_is_lost_whatever_the_packing(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path, packing: str
) -> None:
    report = convert(make_job(corpus, tmp_path / "s", tokenizer, packing=packing, splits=(("train", 1.0),)))
    expected = Counter(id for text in texts_in(corpus) for id in [*tokenizer.encode(text), tokenizer.eos_id])
    found: Counter[int] = Counter()
    for sample in streamed(tmp_path / "s" / "train"):
        found.update(sample["tokens"][: int(sample["doc_lengths"].sum())].tolist())
    assert found == expected
    meta = report.metas["train"]
    assert meta.tokens == sum(expected.values())


def test_the_shards_are_those_that_the_same_documents_give_without_files(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    job = make_job(corpus, tmp_path / "s", tokenizer, piece_bytes=10**9, splits=(("train", 1.0),))
    convert(job)
    packed = PackedDataset(PretrainDataset(texts_in(corpus), tokenizer), 32, tokenizer.pad_id, window_tokens=5000)
    rows = np.concatenate([window.tokens for window in packed])
    shards = streamed(tmp_path / "s" / "train")
    assert np.array_equal(rows, np.stack([sample["tokens"] for sample in shards]))
    ids = np.concatenate([batch["input_ids"].numpy() for batch in packed.batches(7)])
    assert np.array_equal(ids, rows)


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_the_same_bytes_for_any_number_of_workers(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path, compression: str | None
) -> None:
    for workers in (1, 2):
        job = make_job(corpus, tmp_path / str(workers), tokenizer, compression=compression)
        convert(job, workers=workers)
    assert same_files(tmp_path / "1", tmp_path / "2")


def test_parts_of_several_machines_merge_to_the_same_rows(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    convert(make_job(corpus, tmp_path / "one", tokenizer))
    with pytest.raises(UserError, match=r"no parts to merge"):
        merge_parts(str(tmp_path / "many"))
    for number in (3, 1):
        convert(make_job(corpus, tmp_path / "many", tokenizer, part=(number, 3)))
    with pytest.raises(UserError, match=r"2 of 3 parts are finished, missing: 2/3"):
        merge_parts(str(tmp_path / "many"))
    assert not (tmp_path / "many" / "train" / "index.json").exists()
    convert(make_job(corpus, tmp_path / "many", tokenizer, part=(2, 3)))
    metas = merge_parts(str(tmp_path / "many"))
    for split, _ in SPLITS:
        folders = [tmp_path / name / split for name in ("one", "many")]
        one, many = ([s["tokens"] for s in streamed(f)] for f in folders)
        assert np.array_equal(one, many)
        assert metas[split] == read_meta(folders[0])


def test_parts_made_differently_do_not_merge(corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    convert(make_job(corpus, tmp_path, tokenizer, part=(1, 2)))
    convert(make_job(corpus, tmp_path, tokenizer, part=(2, 2), seed=1))
    with pytest.raises(UserError, match=r"its seed differs from \.parts/0001-of-0002: 1 and 0"):
        merge_parts(str(tmp_path))


def test_duplicates_leave_only_the_first(corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    job = make_job(corpus, tmp_path / "s", tokenizer, deduplicate=True, seq_len=4096)
    report = convert(job, workers=2)
    texts = texts_in(corpus)
    assert report.duplicates == len(texts) - len(set(texts)) > 0
    found = sum((documents_in(tmp_path / "s" / split, tokenizer) for split, _ in SPLITS), Counter())
    assert found == Counter(set(texts))


def test_duplicates_found_in_several_classes_of_hashes_are_the_same(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    from cheapertraining.data.conversion.windows import hash_piece, mark_duplicates

    found = []
    for most in (10, 10**6):
        job = make_job(corpus, tmp_path / str(most), tokenizer)
        for number in range(len(job.pieces)):
            hash_piece(job, number, _Silent())
        mark_duplicates(job, most)
        found.append([np.load(file).tolist() for file in sorted((job.work / "duplicates").glob("*.npy"))])
    assert found[0] == found[1]
    assert sum(map(len, found[0])) == len(texts_in(corpus)) - len(set(texts_in(corpus)))


class _Silent:
    def add(self, bytes: int = 0, documents: int = 0, tokens: int = 0) -> None:
        return


def test_a_finished_conversion_is_left_alone_and_another_one_refused(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    job = make_job(corpus, tmp_path / "s", tokenizer)
    convert(job)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")}
    assert convert(job, resume=True).metas == {}
    for again, resume, message in [
        (job, False, r"holds a finished conversion .* Choose another --out"),
        (make_job(corpus, tmp_path / "s", tokenizer, seed=5), True, r"with other inputs or settings"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(again, resume=resume)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")} == before


def test_an_output_folder_with_something_else_in_it_is_refused(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"expected an empty folder, found thesis\.tex"):
        convert(make_job(corpus, tmp_path, tokenizer))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_going_on_needs_resume_and_the_same_settings(corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "a.jsonl").write_text((corpus / "0.jsonl").read_text() + "{broken\n")
    with pytest.raises(UserError, match=rf"{bad}/a\.jsonl:302: broken JSON.*on_error=skip"):
        convert(make_job(bad, tmp_path / "s", tokenizer))
    assert not list((tmp_path / "s").glob("*/index.json"))
    for changes, resume, message in [
        ({}, False, r"holds an unfinished conversion\. Run the same command with --resume"),
        ({"seed": 3}, True, r"has another seed \(0 then, 3 now\)"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(make_job(bad, tmp_path / "s", tokenizer, **changes), resume=resume)
    (bad / "b.jsonl").write_text((corpus / "0.jsonl").read_text())
    with pytest.raises(UserError, match=r"has another inputs \(other files, sizes or names\)"):
        convert(make_job(bad, tmp_path / "s", tokenizer), resume=True)
    (bad / "b.jsonl").unlink()
    assert convert(make_job(bad, tmp_path / "s", tokenizer, on_error="skip"), resume=True).problems == 1


def test_bad_records_can_be_skipped_and_are_counted(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    lines = [b'{"text": "good one"}', b"{broken", b'{"txt": "a"}', b'{"text": 7}', b'{"text": "\\ud800"}', b"\xff{}"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": null}', b'{"text": "good two"}']))
    report = convert(
        make_job(tmp_path / "a.jsonl", tmp_path / "s", tokenizer, on_error="skip", splits=(("train", 1.0),))
    )
    assert (report.records, report.problems, report.empty) == (8, 5, 1)
    expected = ["broken JSON", "expected a column 'text', found 'txt'", "found int", "lone surrogate", "invalid UTF-8"]
    for line, (message, part) in enumerate(zip(report.messages, expected, strict=True), 2):
        assert message.startswith(f"{tmp_path}/a.jsonl:{line}: ")
        assert part in message
    assert str(report).count("unusable: ") == 5
    assert report.metas["train"].documents == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": (("train", 0.5),)}, r"split shares: expected positive numbers that sum to 1, found train:0\.5"),
        ({"packing": "bestfit"}, r"packing: .* found 'bestfit'\. Did you mean 'best_fit'"),
        ({"compression": "zst"}, r"compression: expected one of .*found 'zst'"),
        ({"hashes": ("md6",)}, r"hash: expected one of .*found 'md6'"),
        ({"part": (3, 2)}, r"part: expected i/n"),
        ({"seq_len": 1}, r"seq_len: expected at least 2"),
    ],
)
def test_bad_settings(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_job(corpus, tmp_path, tokenizer, **changes)


def test_zero_documents_and_a_split_without_any(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"none of the 0 documents with text fell into its share"):
        convert(make_job(tmp_path / "a.jsonl", tmp_path / "s", tokenizer))
    (tmp_path / "b.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(UserError, match=r"none of the 1 documents"):
        convert(make_job(tmp_path / "b.jsonl", tmp_path / "t", tokenizer))
    assert not list(tmp_path.glob("*/*/index.json"))


def word_tokenizer(folder: Path, words: list[str]) -> TokenizerWrapper:
    """One token a word, so that the tokens of a text are known."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([*words, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return TokenizerWrapper(folder)


def test_sixteen_bits_must_hold_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tokenizer", [f"w{i}" for i in range(70_000)])
    (tmp_path / "a.txt").write_text("w69999")
    one = (("train", 1.0),)
    with pytest.raises(UserError, match=r"uint16 holds ids below 65,536, the tokenizer .* has 70,001 tokens"):
        convert(make_job(tmp_path / "a.txt", tmp_path / "s", tokenizer, token_dtype="uint16", splits=one))
    convert(make_job(tmp_path / "a.txt", tmp_path / "s", tokenizer, splits=one))
    row = streamed(tmp_path / "s" / "train")[0]
    assert row["tokens"].dtype == np.uint32
    assert row["tokens"][:2].tolist() == [69_999, 70_000]


def test_a_document_of_fifty_megabytes_in_one_line(tmp_path: Path) -> None:
    word, words = "x" * 999, 50_000
    tokenizer = word_tokenizer(tmp_path / "tokenizer", [word])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"{word} " * words}) + "\n" + '{"text": "short"}\n')
    job = make_job(tmp_path / "a.jsonl", tmp_path / "s", tokenizer, splits=(("train", 1.0),), shard_bytes=10**8)
    meta = convert(job).metas["train"]
    assert (meta.documents, meta.cut_documents, meta.tokens) == (2, 1, words + 1 + 2)
    rows = streamed(tmp_path / "s" / "train")
    found = Counter(id for row in rows for id in row["tokens"][: int(row["doc_lengths"].sum())].tolist())
    assert found == {0: words, 1: 1 + 2}  # <eos> stands for unknown words as well


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1, max_size=20)
)
def test_any_text_comes_back(
    tokenizer: TokenizerWrapper, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = make_job(folder / "a.jsonl", folder / "s", tokenizer, splits=(("train", 1.0),), seq_len=512)
    convert(job)
    assert documents_in(folder / "s" / "train", tokenizer) == Counter(texts)


def test_trying_out_writes_nothing(corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    trial = try_out(make_job(corpus, tmp_path / "s", tokenizer))
    assert not (tmp_path / "s").exists()
    texts = texts_in(corpus)
    assert trial.documents <= len(texts)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert trial.tokens / trial.documents == pytest.approx(tokens / len(texts), rel=0.2)


CONVERT = """
import sys
sys.path.insert(0, {root!r})
from tools.convert_text import main
sys.exit(main({arguments!r}))
"""


def convert_in_process(*arguments: str, limit: int) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", CONVERT.format(root=root, arguments=list(arguments))],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )


def test_a_full_disk_is_one_message_and_resume_finishes(
    corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk: the same error comes from the same calls."""
    options = ["--tokenizer", tokenizer.path, "--seq-len", "32", "--source", "s"]
    arguments = [str(corpus), *options, "--out", str(tmp_path / "s")]
    full = convert_in_process(*arguments, limit=30_000)
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1
    assert ".conversion: cannot be written (" in full.stderr
    assert "--resume" in full.stderr
    assert not list((tmp_path / "s").glob("*/index.json"))
    assert main([*arguments, "--resume"]) == 0
    assert main([str(corpus), *options, "--out", str(tmp_path / "t")]) == 0
    assert same_files(tmp_path / "s", tmp_path / "t")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_no_permission(corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        convert(make_job(corpus, tmp_path / "s", tokenizer))


def test_a_place_that_cannot_be_written(corpus: Path, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/s/\.conversion: cannot be written \(Not a directory\)"):
        convert(make_job(corpus, tmp_path / "file" / "s", tokenizer))


def test_the_report_accounts_for_each_record() -> None:
    report = Report({}, 0, 0, (), 0, 0, 0.0)
    assert str(report) == "Nothing to do: this conversion is finished."
