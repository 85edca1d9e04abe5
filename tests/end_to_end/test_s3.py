"""Shards in an object store: read and trained on with eviction, and what is said when the store does not answer."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cheapertraining.config import load_run_config
from cheapertraining.data import get_loader
from cheapertraining.data.conversion import Job, Settings, TextEncoder, convert
from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.pieces import list_pieces
from cheapertraining.data.store import ShardFolder, ShardStore
from cheapertraining.errors import UserError
from cheapertraining.training import train
from tests.end_to_end.real_runs import ROOT, comparable_metrics, final_state, model_hash, record, recorded, write_yaml
from tests.end_to_end.s3_server import CuttingProxy, S3Server
from tests.processes import start

SOURCES = {"code": "zstd:3", "docs": None, "topics": None}
SEQ_LEN = 32
ROW_BYTES = 64
SHARD_ROWS = 40


def stdlib_texts(source: str) -> list[str]:
    """Some hundred short documents a source."""
    import argparse
    import inspect
    import typing
    from pydoc_data.topics import topics

    everything = {
        "code": inspect.getsource(argparse),
        "docs": inspect.getsource(typing),
        "topics": "\n".join(topics[name] for name in sorted(topics))[:120_000],
    }[source]
    return [everything[start : start + 400] for start in range(0, len(everything), 400)]


def job(tokenizer: Path, inputs: list[str], out: str, work: Path, **changes: Any) -> Job:
    settings = {"source": "s", "seq_len": SEQ_LEN, "shard_bytes": SHARD_ROWS * ROW_BYTES} | changes
    return Job(
        Settings(**settings),
        TextEncoder(str(tokenizer)),
        tuple(list_pieces(inputs)),
        Destination(out),
        work,
    )


@pytest.fixture(scope="module")
def local(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of some twenty shards of 40 rows each, one of them compressed, made by the converter."""
    folder = tmp_path_factory.mktemp("many_shards")
    splits = (("train", 0.8), ("probe", 0.1), ("heldout", 0.1))
    for source, compression in SOURCES.items():
        file = folder / f"{source}.jsonl"
        lines = [json.dumps({"text": text}) for text in stdlib_texts(source)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        changes = {"source": source, "splits": splits, "compression": compression}
        out = folder / "shards" / source
        convert(job(tiny_sample / "tokenizer", [str(file)], str(out), folder / "work" / source, **changes))
    return folder / "shards"


@pytest.fixture(scope="module")
def remote(s3: S3Server, local: Path) -> str:
    return s3.put_folder(local, "three")


@pytest.fixture
def data(tiny_sample: Path) -> Any:
    """Makes a data config over the three sources in a folder."""

    def config(folder: Path, **changes: Any) -> dict[str, Any]:
        return data_config(folder, tiny_sample / "tokenizer", **changes)

    return config


def data_config(local: Path, tokenizer: Path, **changes: Any) -> dict[str, Any]:
    config = {
        "local": str(local),
        "tokenizer": str(tokenizer),
        "seq_len": SEQ_LEN,
        "sources": {name: {} for name in SOURCES},
        "probes": {"topics": {"source": "topics"}},
        "shuffle_block_size": 80,
    }
    return config | changes


def disk_use(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.mds*"))


def first_batches(config: dict[str, Any], count: int, **options: Any) -> list[list[list[int]]]:
    loader = get_loader(config, batch_size=12, **options)
    return [batch["input_ids"].tolist() for _, batch in zip(range(count), loader, strict=False)]


# ---- reading -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_local_shards(
    local: Path, remote: str, tmp_path: Path, workers: int, data: Any
) -> None:
    options = {"num_workers": workers, "prefetch_factor": 2}
    config = data(tmp_path / "cache", remote=remote, validate_hash="xxh64")
    assert first_batches(config, 60, **options) == first_batches(data(local), 60, **options)


def test_document_hashes_are_downloaded_only_where_they_are_compared(
    remote: str, s3: S3Server, tmp_path: Path, data: Any
) -> None:
    """Those of training shards are eight bytes for each document of a corpus."""
    get_loader(data(tmp_path / "cache", remote=remote), batch_size=12)
    found = {file.parent.name for file in (tmp_path / "cache").rglob("documents.u64")}
    assert found == {"probe", "heldout"}


@pytest.mark.parametrize("workers", [0, 1])
def test_eviction_keeps_the_limit_and_the_order(
    local: Path, remote: str, s3: S3Server, tmp_path: Path, workers: int, data: Any
) -> None:
    """Far below what is in use at once, so that shards go and come back."""
    indexes = sum(file.stat().st_size for file in local.rglob("index.json"))
    largest = max(file.stat().st_size for file in local.rglob("*.mds"))
    limit = indexes + 8 * largest
    before = s3.downloads("three")
    config = data(tmp_path / "cache", remote=remote, cache_limit=f"{limit}b", validate_hash="xxh64")
    options = {"num_workers": workers, "prefetch_factor": 2}
    assert first_batches(config, 100, **options) == first_batches(data(local), 100, **options)
    brought = s3.downloads("three") - before
    again = {name for name, times in brought.items() if ".mds" in name and times > 1}
    assert again
    on_their_way = 3 * largest  # by the reader and by the thread that reads ahead
    assert disk_use(tmp_path / "cache") <= limit - indexes + on_their_way
    assert limit - indexes < disk_use(local) / 2


@pytest.mark.slow
def test_training_from_s3_with_eviction_and_a_resume_equals_training_on_local_shards(
    local: Path, remote: str, s3: S3Server, tmp_path: Path, data: Any
) -> None:
    """Two ranks with a worker each, a cache of a fraction of the shards, a SIGTERM, and new processes."""
    indexes = sum(file.stat().st_size for file in local.rglob("index.json"))
    largest = max(file.stat().st_size for file in local.rglob("*.mds"))
    limit = indexes + 20 * largest
    cache = tmp_path / "cache"
    settings = {
        "max_duration": "160ba",
        "eval_loader": {"batch_size": 16, "interval": "40ba", "subset_num_batches": 1, "first": False},
        "algorithms": {"online_mixing": {"strategy": "influence", "interval": "20ba", "warmup": "10ba"}},
    }
    yamls = {}
    for name, config in {
        "local": data(local),
        "s3": data(cache, remote=remote, cache_limit=f"{limit}b", validate_hash="xxh64"),
    }.items():
        part = tmp_path / f"{name}_data.yaml"
        part.write_text(json.dumps({"data": config}), encoding="utf-8")
        yamls[name] = str(write_yaml(tmp_path / f"{name}.yaml", part, **settings))
    before = s3.downloads("three")
    worker = ["train_loader.num_workers=1"]
    stopped = {"label": "s3", "yaml": yamls["s3"], "overrides": worker, "stop": 70}
    rest = {"label": "s3-rest", "yaml": yamls["s3"], "overrides": ["run_name=s3", "autoresume=true", *worker]}
    record(2, [{"label": "local", "yaml": yamls["local"]}, stopped], tmp_path)
    record(2, [rest], tmp_path)

    assert recorded(tmp_path, "s3") + recorded(tmp_path, "s3-rest") == recorded(tmp_path, "local")
    runs = {name: tmp_path / "runs" / name for name in ("local", "s3")}
    assert comparable_metrics(runs["s3"]) == comparable_metrics(runs["local"])
    states = {name: final_state(run) for name, run in runs.items()}
    assert model_hash(states["s3"]) == model_hash(states["local"])
    brought = s3.downloads("three") - before
    shards = {name: times for name, times in brought.items() if ".mds" in name}
    assert disk_use(cache) <= limit - indexes + 4 * largest < disk_use(local) / 2  # four processes read
    assert len(shards) * largest > 1.5 * (limit - indexes), "nothing had to be evicted, so this shows nothing"
    assert max(shards.values()) > 1


def test_closed_loader_leaves_no_process_and_no_thread(remote: str, tmp_path: Path, data: Any) -> None:
    """Also where something, such as a traceback, still holds the iterator."""
    before = set(threading.enumerate())
    loader = get_loader(data(tmp_path / "cache", remote=remote), batch_size=12, num_workers=1, prefetch_factor=2)
    batches = iter(loader)
    next(batches)
    prefetching = [thread for thread in threading.enumerate() if thread.name == "shard-prefetch"]
    assert prefetching
    assert multiprocessing.active_children()
    loader.close()
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(30)
    assert not [thread for thread in left if thread.is_alive()]
    assert not multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]  # a generator


# ---- stores that refuse ----------------------------------------------------------------------------------------
def open_store(local: Path, remote: str | None, retry: int = 0, **options: Any) -> ShardStore:
    folder = ShardFolder("docs/train", local, remote)
    return ShardStore([folder], seq_len=SEQ_LEN, download_retry=retry, **options)


def all_ids(store: ShardStore) -> NDArray[np.int64]:
    samples = np.arange(store.samples(0))
    return store.ids(np.zeros_like(samples), samples)


def no_parts_in(folder: Path) -> bool:
    return not [file for file in folder.rglob("*") if ".part" in file.name]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_refused(remote: str, s3: S3Server, tmp_path: Path) -> None:
    with s3.refusing(), pytest.raises(UserError) as error:
        open_store(tmp_path, f"{remote}/docs/train", retry=5)  # a refusal is not tried again
    expected = f"shards of 'docs/train': cannot read {remote}/docs/train/meta.json at {s3.url} (403 Forbidden). "
    assert one_line(error) == f"{expected}Check the address, the credentials and the network."


def test_wrong_bucket(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"s3://nowhere/docs/meta.json at {s3.url} \(404 Not Found\)") as error:
        open_store(tmp_path, "s3://nowhere/docs")
    one_line(error)


def test_nobody_listens(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"'docs/train'.* at http://127.0.0.1:{port} \(EndpointConnection") as error:
        open_store(tmp_path, "s3://shards/docs")
    one_line(error)
    assert time.monotonic() - started < 30


def test_unknown_kind_of_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'docs/train': s4://shards/docs cannot be read from .*Unsupported") as error:
        open_store(tmp_path, "s4://shards/docs")
    one_line(error)


def test_hash_that_the_shards_do_not_have(remote: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validate_hash: the shards of 'docs/train' .*have no sha1, but xxh64"):
        open_store(tmp_path, f"{remote}/docs/train", validate_hash="sha1")


# ---- connections that break ------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["code", "docs"])
def test_cut_connections_are_tried_again(
    local: Path, s3: S3Server, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """More cuts than the S3 client's own five attempts at an object."""
    expected = open_store(local / source / "train", None)
    with CuttingProxy(s3.url, after=1200, times=9) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        store = open_store(tmp_path, f"{remote}/{source}/train", retry=3)
        assert (store.read(all_ids(store)).tokens == expected.read(all_ids(store)).tokens).all()
        assert proxy.cut == 9
    assert no_parts_in(tmp_path)


def test_connection_that_is_always_cut(
    s3: S3Server, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CuttingProxy(s3.url, after=1200, times=0) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        store = open_store(tmp_path, f"{remote}/docs/train", retry=1)
        proxy.times = 1000
        for _ in range(2):  # the second time must not wait for the first
            with pytest.raises(UserError, match=r"shards of 'docs/train': cannot read .*mds at .*2 attempts") as error:
                store.read(all_ids(store))
            assert f"{remote}/docs/train/shard.00000.mds at {proxy.url}" in one_line(error)
        assert not list(tmp_path.glob("*.mds"))
        assert no_parts_in(tmp_path)
        proxy.times = 0  # the line is whole again
        assert len(store.read(all_ids(store))) == store.samples(0)


@pytest.mark.parametrize("damage", ["shorter", "flipped"])
@pytest.mark.parametrize("source", ["code", "docs"])
def test_damaged_shard_is_never_kept(s3: S3Server, local: Path, tmp_path: Path, source: str, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(local / source / "train", folder)
    shard = sorted(folder.glob("shard.00001.mds*"))[-1]  # the compressed form where there is one
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content[:-7] if damage == "shorter" else content)
    remote = s3.put_folder(folder, f"damaged-{source}-{damage}")
    store = open_store(tmp_path / "cache", remote, validate_hash="xxh64")
    expected = r"expected \d+ bytes, got \d+" if damage == "shorter" else r"expected xxh64 \w+, got \w+"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{shard.name} at http.* \({expected}\)\. Copy or make") as error:
            store.read(all_ids(store))
        one_line(error)
    assert not (tmp_path / "cache" / shard.name).exists()
    assert not (tmp_path / "cache" / "shard.00001.mds").exists()
    assert no_parts_in(tmp_path)


def write_run_with_a_hole(s3: S3Server, local: Path, tmp_path: Path, data: Any) -> tuple[Path, str]:
    """A run yaml over remote shards of which one is missing, and their address."""
    folder = tmp_path / "holes"
    shutil.copytree(local, folder)
    (folder / "docs" / "train" / "shard.00003.mds").unlink()
    remote = s3.put_folder(folder, "holes")
    part = tmp_path / "data.yaml"
    sources = {"code": {"weight": 1}, "docs": {"weight": 10}, "topics": {"weight": 1}}
    config = data(tmp_path / "cache", remote=remote, download_retry=0, sources=sources)
    part.write_text(json.dumps({"data": config}), encoding="utf-8")
    return write_yaml(tmp_path / "run.yaml", part, run_name="holes"), remote


def test_shard_that_is_missing_in_the_middle_of_a_run_is_one_line(
    s3: S3Server, local: Path, tmp_path: Path, data: Any
) -> None:
    """Met by a worker process of the loader."""
    run, remote = write_run_with_a_hole(s3, local, tmp_path, data)
    process = start(ROOT / "train.py", str(run), "train_loader.num_workers=1", folder=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    said = [line for line in errors.splitlines() if line.startswith("shards of 'docs/train'")]
    expected = f"cannot read {remote}/docs/train/shard.00003.mds at {s3.url} (404 Not Found)."
    assert len(said) == 1
    assert expected in said[0]
    assert "Traceback" not in errors


@pytest.mark.parametrize("workers", [0, 1])
def test_run_that_failed_has_closed_what_it_opened(
    s3: S3Server, local: Path, tmp_path: Path, data: Any, workers: int
) -> None:
    """What is still open would be closed in whichever thread collects it, and perhaps after the interpreter's end."""
    run, _ = write_run_with_a_hole(s3, local, tmp_path, data)
    handler = signal.getsignal(signal.SIGTERM)
    before = set(threading.enumerate())
    with pytest.raises(UserError, match="404 Not Found") as error:
        train(load_run_config(str(run), [f"train_loader.num_workers={workers}"]))
    assert signal.getsignal(signal.SIGTERM) is handler, "the trainer is not closed"
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:  # a download under way, and a queue's thread that has been told to end
        thread.join(30)
    assert not [thread for thread in left if thread.is_alive()]
    assert not multiprocessing.active_children()
    assert error.tb is not None, "the frames of the run are still held"
