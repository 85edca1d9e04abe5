"""Two "hosts" with a network between them and a cache of shards each train as one process does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.kill_many import TRAIN
from tests.end_to_end.real_runs import finish, read_metrics, write_yaml
from tests.processes import start

pytestmark = pytest.mark.slow
HOST = Path(__file__).with_name("host.py")
NAMES = tuple(f"ct{os.getpid()}h{number}" for number in (0, 1))
ADDRESSES = ("10.231.77.1", "10.231.77.2")
DEVICE = "link"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two network namespaces and a wire."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("-n", NAMES[0], "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        _remove()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield
    _remove()


def _remove() -> None:
    for name in NAMES:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)


def test_two_hosts_train_as_one_process_does(network: None, tiny_sample: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", tiny_sample / "data.yaml", max_duration="4ba", loggers={"jsonl": {}})
    cache = tmp_path / "cache"
    places = [tmp_path / f"cache-{number}" for number in (0, 1)]
    for folder in (cache, *places):
        folder.mkdir()
    remote = (f"data.remote={tiny_sample}", f"data.local={cache}", f"data.tokenizer={tiny_sample / 'tokenizer'}")
    finish(start(TRAIN, str(path), "run_name=alone", *remote, folder=tmp_path))
    expected = read_metrics(tmp_path / "runs" / "alone")
    shutil.rmtree(cache)
    cache.mkdir()

    where = (",".join(NAMES), DEVICE, ADDRESSES[0], ",".join(map(str, places)), str(cache))
    hosts = start(HOST, *where, str(path), "run_name=hosts", *remote, folder=tmp_path, ranks=2)
    assert hosts.wait() == 0, hosts.output(name="err")
    found = read_metrics(tmp_path / "runs" / "hosts")
    for step in range(1, 5):
        assert found[step]["loss/train/total"] == pytest.approx(expected[step]["loss/train/total"], rel=1e-5)
    assert not list(cache.iterdir())
    for place in places:
        assert list(place.rglob("*.mds")), f"{place} holds no shard"
