"""The mixture as a DataLoader: one order for any workers, ranks and resumes; batches that a model can be trained on."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pytest
import torch

from cheapertraining.data import MixtureLoader, get_loader
from cheapertraining.errors import UserError

BATCH = 8
CHANGES = 10  # batches between weight changes


def run(loader: MixtureLoader, stop: int) -> list[tuple[list[int], list[int], dict[str, float]]]:
    """(sources, sample ids, weights) of each batch up to ``stop``; the weights change every ``CHANGES`` batches."""
    seen = []
    for batch in loader:
        number = loader.mixture.consumed
        weights = loader.mixture.weights_at(number - 1)
        seen.append((batch["source"].tolist(), batch["sample_id"].tolist(), weights))
        if number % CHANGES == 0:
            loader.mixture.set_weights({"code": number % 7, "docs": 1, "topics": 3})
        if number == stop:
            break
    return seen


def merged(ranks: list[list[tuple[list[int], list[int], dict[str, float]]]]) -> list[Any]:
    """Global batches from the slices of all ranks."""
    return [
        ([s for part in parts for s in part[0]], [i for part in parts for i in part[1]], parts[0][2])
        for parts in zip(*ranks, strict=True)
    ]


@pytest.fixture
def reference(data_config: dict[str, Any]) -> list[Any]:
    return run(get_loader(data_config, batch_size=BATCH, seed=5), 200)


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (1, True), (2, False), (2, True)])
def test_order_does_not_depend_on_workers(
    data_config: dict[str, Any], reference: list[Any], workers: int, persistent: bool
) -> None:
    loader = get_loader(
        data_config, batch_size=BATCH, seed=5, num_workers=workers, prefetch_factor=4, persistent_workers=persistent
    )
    assert run(loader, 200) == reference


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(data_config: dict[str, Any], reference: list[Any], world_size: int) -> None:
    ranks = [
        run(get_loader(data_config, batch_size=BATCH, seed=5, rank=rank, world_size=world_size), 200)
        for rank in range(world_size)
    ]
    assert merged(ranks) == reference


@pytest.mark.parametrize(("stop", "workers", "world_size"), [(1, 2, 1), (37, 0, 2), (73, 1, 2), (110, 2, 4)])
def test_resume_with_other_workers_and_ranks(
    data_config: dict[str, Any], reference: list[Any], stop: int, workers: int, world_size: int
) -> None:
    first = get_loader(data_config, batch_size=BATCH, seed=5, num_workers=2)
    assert run(first, stop) == reference[:stop]
    state = json.loads(json.dumps(first.mixture.state_dict()))
    ranks = []
    for rank in range(world_size):
        loader = get_loader(
            data_config, batch_size=BATCH, seed=5, rank=rank, world_size=world_size, num_workers=workers
        )
        loader.mixture.load_state_dict(state)
        ranks.append(run(loader, 200))
    assert merged(ranks) == reference[stop:]


def test_iterating_again_continues_behind_the_last_batch(data_config: dict[str, Any], reference: list[Any]) -> None:
    loader = get_loader(data_config, batch_size=BATCH, seed=5, num_workers=1, persistent_workers=True)
    assert run(loader, 33) + run(loader, 60) == reference[:60]


def test_change_takes_effect_after_exactly_lag_batches(data_config: dict[str, Any]) -> None:
    for workers, lag in ((0, 1), (0, 8), (2, 8)):
        loader = get_loader(data_config, batch_size=BATCH, num_workers=workers, lag=lag)
        first = None
        for batch in loader:
            number = loader.mixture.consumed
            if number == 5:
                assert loader.mixture.set_weights({"docs": 1}) == 5 + lag
            if number > 5 and set(batch["source"].tolist()) == {1}:
                first = number - 1
                break
        assert first == 5 + lag


def test_one_pass_reads_each_sample_once_over_ranks(data_config: dict[str, Any]) -> None:
    data_config["on_exhaustion"] = "renormalize"
    seen: list[tuple[int, int]] = []
    for rank in range(2):
        loader = get_loader(data_config, batch_size=2, rank=rank, world_size=2, num_workers=rank)
        for batch in loader:
            seen += zip(batch["source"].tolist(), batch["sample_id"].tolist(), strict=True)
        assert loader.mixture.exhausted is not None
    sizes = loader.mixture.plan.sizes
    assert len(seen) == len(set(seen)) == int(sizes.sum()) // 2 * 2
    counts = loader.mixture.counts()
    assert counts.samples.sum() == len(seen)
    assert counts.epochs.max() == 1.0


def test_batch_against_the_rows_by_hand(data_config: dict[str, Any]) -> None:
    loader = get_loader(data_config, batch_size=32)
    batch = next(iter(loader))
    assert {key: value.dtype for key, value in batch.items() if key != "attention_mask"} == dict.fromkeys(
        ("input_ids", "labels", "position_ids", "source", "sample_id"), torch.int64
    )
    store = loader.mixture.store
    ids = store.ids(batch["source"].numpy(), batch["sample_id"].numpy())
    for row, index in enumerate(ids.tolist()):
        sample = store._dataset[index]  # Streaming's own reader
        labels, positions = sample["tokens"].astype(np.int64), []
        start = 0
        for length in [*sample["doc_lengths"].tolist(), 32 - int(sample["doc_lengths"].sum())]:
            positions += list(range(length))
            labels[start : start + 1] = -100
            start += length
        labels[int(sample["doc_lengths"].sum()) :] = -100
        assert batch["input_ids"][row].tolist() == sample["tokens"].tolist()
        assert batch["labels"][row].tolist() == labels.tolist()
        assert batch["position_ids"][row].tolist() == positions


def test_attention_mask_only_with_padding(data_config: dict[str, Any]) -> None:
    loader = get_loader(data_config, batch_size=2)
    masks = 0
    for batch in loader:
        if "attention_mask" in batch:
            masks += 1
            assert batch["attention_mask"].sum() < 64
            assert ((batch["attention_mask"] == 1) | (batch["labels"] == -100)).all()
        else:
            assert (batch["labels"][:, 0] == -100).all()
        if loader.mixture.consumed == 300:
            break
    assert 0 < masks < 300


def test_draw_leaves_the_order_alone(data_config: dict[str, Any], reference: list[Any]) -> None:
    loader = get_loader(data_config, batch_size=BATCH, seed=5)
    first, again, other = (loader.mixture.draw("docs", 6, key)["sample_id"].tolist() for key in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 6
    assert run(loader, 30) == reference[:30]
    with pytest.raises(UserError, match="no source is named 'delta'"):
        loader.mixture.draw("delta", 1, 0)


def test_probe_and_heldout_loaders(data_config: dict[str, Any], tiny_sample: Path) -> None:
    loader = get_loader(data_config, batch_size=4)
    assert list(loader.probes) == ["topics"]
    assert list(loader.heldout) == ["code", "docs", "topics"]
    probe = list(loader.probes["topics"])
    meta = json.loads((tiny_sample / "topics" / "probe" / "meta.json").read_text(encoding="utf-8"))
    assert sum(len(batch["source"]) for batch in probe) == meta["samples"]
    assert {int(s) for batch in probe for s in batch["source"]} == {2}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"batch_size": 6, "rank": 0, "world_size": 4}, "6 cannot be divided by the world size 4"),
        ({}, {"num_workers": 3, "prefetch_factor": 4}, "lag: 8 is less than num_workers . prefetch_factor = 12"),
        ({}, {"lag": 0}, "lag: expected at least 1"),
        ({"sources": {"code": {"weight": -1.0}}}, {}, "weight"),
        ({"sources": {"code": {}, "delta": {}}}, {}, "no shards of 'delta/train'"),
    ],
)
def test_bad_settings(
    data_config: dict[str, Any], changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        get_loader(data_config | {"probes": {}} | changes, **({"batch_size": 4} | arguments))


def test_probe_that_is_the_heldout_split(data_config: dict[str, Any], tiny_sample: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "probe").symlink_to(tiny_sample / "docs" / "heldout")
    data_config["probes"] = {"target": {"local": str(tmp_path / "own")}}
    with pytest.raises(UserError, match=r"data.probes.target: .* is also the held-out split of 'docs'"):
        get_loader(data_config, batch_size=4)


def test_probe_that_shares_documents_with_heldout(
    data_config: dict[str, Any], tiny_sample: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sample / "code" / "heldout", tmp_path / "own" / "probe")
    data_config["probes"] = {"target": {"local": str(tmp_path / "own")}}
    with pytest.raises(UserError, match=r"4 of its 4 documents .* are also in the held-out split of 'code'"):
        get_loader(data_config, batch_size=4)


def test_state_of_another_lag_is_refused(data_config: dict[str, Any]) -> None:
    state = get_loader(data_config, batch_size=4, lag=8).mixture.state_dict()
    with pytest.raises(UserError, match=r"lag was 8 when the checkpoint was saved and is 4 now"):
        get_loader(data_config, batch_size=4, lag=4).mixture.load_state_dict(state)


def test_remote_shards_are_fetched_ahead_and_cached(
    data_config: dict[str, Any], reference: list[Any], tiny_sample: Path, tmp_path: Path
) -> None:
    data_config |= {"local": str(tmp_path / "cache"), "remote": str(tiny_sample), "validate_hash": "xxh64"}
    data_config["tokenizer"] = str(tiny_sample / "tokenizer")
    loader = get_loader(data_config, batch_size=BATCH, seed=5, num_workers=1)
    assert run(loader, 200) == reference
    assert (tmp_path / "cache" / "code" / "train" / "shard.00000.mds").is_file()


def test_unreachable_remote(data_config: dict[str, Any], tiny_sample: Path, tmp_path: Path) -> None:
    data_config |= {"local": str(tmp_path), "remote": str(tmp_path / "nothing"), "download_retry": 0}
    data_config["tokenizer"] = str(tiny_sample / "tokenizer")
    with pytest.raises(UserError, match=r"shards of 'code/train': cannot read .*meta.json"):
        get_loader(data_config, batch_size=4)


KILLED = """
import os
from cheapertraining.data import get_loader, shared_memory
if {early}:  # its segments are made, and nothing more
    shared_memory.weakref.finalize = lambda *arguments: os.killpg(0, 9)
next(iter(get_loader({config!r}, batch_size=4)))
os.killpg(0, 9)
"""


@pytest.mark.parametrize("early", [False, True])
def test_a_killed_process_leaves_nothing_that_stops_the_next(
    data_config: dict[str, Any], tiny_sample: Path, tmp_path: Path, early: bool
) -> None:
    """Remote shards: Streaming alone refuses to start again ('Reused local directory')."""
    data_config |= {"local": str(tmp_path / "cache"), "remote": str(tiny_sample)}
    data_config["tokenizer"] = str(tiny_sample / "tokenizer")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(config=data_config, early=early)],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # batch systems give each job another one
        start_new_session=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    loader = get_loader(data_config, batch_size=4)
    segments = [file for file in Path("/dev/shm").glob("*_locals") if bytes(tmp_path) in file.read_bytes()]
    assert segments == [Path(f"/dev/shm/{loader.mixture.store._dataset._shm_prefix_int:06}_locals")]


def test_a_loader_that_is_gone_leaves_nothing(data_config: dict[str, Any], tiny_sample: Path, tmp_path: Path) -> None:
    data_config |= {"local": str(tmp_path), "remote": str(tiny_sample), "tokenizer": str(tiny_sample / "tokenizer")}
    loader = get_loader(data_config, batch_size=4, num_workers=1)
    next(iter(loader))
    prefix = loader.mixture.store._dataset._shm_prefix_int
    del loader
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the thread that fetches shards ahead may be in the middle of one
        gc.collect()
        left = [*Path("/dev/shm").glob(f"{prefix:06}_*"), *Path(gettempdir()).glob(f"{prefix:06}_*")]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


def test_open_files_do_not_grow_with_the_loaders_made(data_config: dict[str, Any]) -> None:
    """Streaming alone keeps several files open for each data set that a process has ever made."""

    def open_files_after(count: int) -> int:
        for _ in range(count):
            next(iter(get_loader(data_config, batch_size=4)))
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    few = open_files_after(2)
    assert open_files_after(6) <= few + 2
