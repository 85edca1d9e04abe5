"""Conversion into an object store: the bytes of a local one, also after a kill, and nothing that looks finished."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

from cheapertraining.data.conversion import merge_parts
from tests.data.streamed import streamed
from tests.end_to_end.real_runs import ROOT
from tests.end_to_end.s3_server import BUCKET, CuttingProxy, S3Server
from tests.processes import start

TOOL = ROOT / "tools" / "convert_text.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some hundred documents."""
    text = inspect.getsource(typing)
    file = tmp_path_factory.mktemp("corpus") / "typing.jsonl"
    lines = [json.dumps({"text": text[start : start + 500]}) for start in range(0, len(text), 500)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def command(corpus: Path, tiny_sample: Path, out: str, *more: str) -> list[str]:
    tool = [str(corpus), "--out", out, "--source", "s"]
    made = ["--tokenizer", str(tiny_sample / "tokenizer"), "--seq-len", "32", "--shard-size", "4kb"]
    return [*tool, *made, "--split-by-hash", "train:0.9,heldout:0.1", "--window-tokens", "2000", *more]


def run(arguments: list[str], folder: Path, code: int = 0) -> str:
    """Run to the end; returns what was said on standard error."""
    process = start(TOOL, *arguments, folder=folder)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    return errors


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def shards_in(s3: S3Server, prefix: str) -> dict[str, bytes]:
    """What is in the store but for the parts of the index, which are of no more use."""
    return {name: content for name, content in s3.get_folder(prefix).items() if not name.startswith(".parts/")}


@pytest.fixture(scope="module")
def local(corpus: Path, tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the undisturbed local conversion."""
    out = tmp_path_factory.mktemp("local") / "out"
    run(command(corpus, tiny_sample, str(out)), out.parent)
    files = files_of(out)
    assert sum(name.endswith(".mds") for name in files) > 25
    return files


@pytest.mark.slow
def test_the_same_bytes_also_after_kills(
    s3: S3Server, corpus: Path, tiny_sample: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed twice in the middle of its uploads; each start goes on where the last one was."""
    arguments = command(
        corpus, tiny_sample, f"s3://{BUCKET}/killed", "--workers", "2", "--work", str(tmp_path / "work")
    )
    seen = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, str(TOOL), *arguments, "--resume"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        until = time.monotonic() + 60
        while len(s3.get_folder("killed")) < seen + 6:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)  # its workers notice and end by themselves
        assert process.wait() == -signal.SIGKILL
        there = s3.get_folder("killed")
        assert not [name for name in there if name.endswith("index.json")]
        seen = len(there)
    run([*arguments, "--resume"], tmp_path)
    assert shards_in(s3, "killed") == local
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_store_that_begins_to_refuse(
    s3: S3Server, corpus: Path, tiny_sample: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = command(corpus, tiny_sample, f"s3://{BUCKET}/refused", "--work", str(tmp_path / "work"))
    with s3.refusing(after=20):
        said = run(arguments, tmp_path, code=2)
    assert said.count("\n") == 1
    assert said.startswith(f"convert_text: s3://{BUCKET}/refused: cannot write train/shard.")
    assert "(403" in said or "AccessDenied" in said or "InvalidAccessKeyId" in said
    there = s3.get_folder("refused")
    assert there
    assert all(name.endswith(".mds") for name in there)
    run([*arguments, "--resume"], tmp_path)
    assert shards_in(s3, "refused") == local


def test_a_store_that_refuses_at_once_or_is_not_there(
    s3: S3Server, corpus: Path, tiny_sample: Path, tmp_path: Path
) -> None:
    work = ["--work", str(tmp_path / "work")]
    with s3.refusing():
        said = run(command(corpus, tiny_sample, f"s3://{BUCKET}/closed", *work), tmp_path, code=2)
    assert said.count("\n") == 1
    assert f"s3://{BUCKET}/closed: cannot" in said
    assert not s3.get_folder("closed")
    said = run(command(corpus, tiny_sample, "s3://nowhere/s", "--work", str(tmp_path / "other")), tmp_path, code=2)
    assert said.count("\n") == 1
    assert "convert_text: s3://nowhere/s: cannot" in said


@pytest.mark.slow
def test_parts_of_two_machines_merge_in_the_store_to_the_same_rows(
    s3: S3Server, corpus: Path, tiny_sample: Path, tmp_path: Path
) -> None:
    out = f"s3://{BUCKET}/parts"
    second = corpus.with_name("second.jsonl")
    second.write_bytes(corpus.read_bytes())
    both = [command(corpus.parent, tiny_sample, place, *more) for place, more in (
        (out, ["--part", "1/2", "--work", str(tmp_path / "one")]),
        (out, ["--part", "2/2", "--work", str(tmp_path / "two")]),
        (str(tmp_path / "whole"), []),
    )]  # fmt: skip
    processes = [start(TOOL, *line, folder=tmp_path) for line in both]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert "train/index.json" not in s3.get_folder("parts")
    metas = merge_parts(out)
    for split in metas:
        folder = tmp_path / "merged" / split
        folder.mkdir(parents=True)
        for name, content in s3.get_folder(f"parts/{split}").items():
            (folder / name).write_bytes(content)
        assert rows_in(folder) == rows_in(tmp_path / "whole" / split)


def rows_in(folder: Path) -> list[bytes]:

    return [sample["tokens"].tobytes() for sample in streamed(folder)]


def test_cut_connections_while_writing(
    s3: S3Server,
    corpus: Path,
    tiny_sample: Path,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers are cut short, as those to uploads and to readings back; all is sent and asked for again."""
    with CuttingProxy(s3.url, after=3000, times=5) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        run(command(corpus, tiny_sample, f"s3://{BUCKET}/cut", "--work", str(tmp_path / "work")), tmp_path)
        assert proxy.cut == 5
    assert shards_in(s3, "cut") == local
