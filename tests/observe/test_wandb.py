"""W&B's own client against a server on loopback: a wrong key, a key without rights, a network that goes in mid-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb_server import WandbServer

from cheapertraining.observe.wandb_log import key_trouble
from tests.processes import start

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
KEY, WRONG = "0123456789" * 4, "fedcba9876" * 4
ONLINE = "loggers={jsonl: {}, wandb: {project: tests, mode: online}}"
AUTO = "loggers={jsonl: {}, wandb: {project: tests, mode: auto}}"


@pytest.fixture(autouse=True)
def as_people_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home without a key, and nothing set that other tests want."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer(KEY) as running:
        yield running


def steps(folder: Path) -> list[int]:
    """Batches in the file that W&B's client has written for `wandb sync`."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (log,) = folder.glob("wandb/*run-*/run-*.wandb")
    store, found = DataStore(), set()
    store.open_for_scan(str(log))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            found.add(record.history.step.num)
    return sorted(found)


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(yaml: Path, *overrides: str, ranks: int = 1, **environment: str) -> tuple[int | None, str, str]:
    process = start(ROOT / "train.py", str(yaml), *overrides, folder=yaml.parent, ranks=ranks, **environment)
    output, errors = process.communicate()
    return process.returncode, output, errors


@pytest.mark.parametrize("key", [WRONG, "short", f" {KEY}"], ids=["unknown", "malformed", "blank before it"])
def test_a_wrong_key_is_one_message_where_online_was_asked_for(tiny_run: Path, server: WandbServer, key: str) -> None:
    code, _, errors = train(tiny_run, ONLINE, WANDB_BASE_URL=server.url, WANDB_API_KEY=key)
    assert code == 2
    assert errors.strip().splitlines()[-1] == (
        f"loggers.wandb.mode: online, but {server.url} does not take the key of WANDB_API_KEY. Either get one at "
        f"{server.url}/authorize, or use loggers.wandb.mode=offline."
    )
    assert key.strip() not in errors
    assert "Traceback" not in errors


def test_a_wrong_key_that_was_merely_found_leaves_the_run_offline(
    tiny_run: Path, server: WandbServer, tmp_path: Path
) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {WRONG}\n")
    netrc.chmod(0o600)
    code, output, errors = train(tiny_run, AUTO, "max_duration=2ba", WANDB_BASE_URL=server.url)
    folder = tiny_run.parent / "runs" / "tiny"
    assert code == 0, output + errors
    assert f"does not take the key of {netrc} (machine 127.0.0.1). Training goes on offline" in errors
    assert WRONG not in errors
    assert steps(folder)[-1] == logged(folder)[-1] == 2


def test_a_key_without_rights_ends_all_ranks_with_a_message(tiny_run: Path) -> None:
    with WandbServer(KEY, forbidden=True) as server:
        code, _, errors = train(tiny_run, ONLINE, ranks=2, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert code == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith("loggers.wandb: W&B did not begin the run (")
    assert "Look at loggers.wandb.entity and project and at what the key may do" in last


def test_a_server_that_cannot_be_reached_is_no_wrong_key() -> None:
    with WandbServer(KEY) as server:
        there = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        assert key_trouble(there) is None
    gone = key_trouble(there)
    assert gone is not None
    assert not gone.refused
    assert "Connection refused" in gone.what


@pytest.mark.slow
def test_a_network_that_goes_in_mid_run_costs_nothing(tiny_run: Path, server: WandbServer) -> None:
    begun = time.monotonic()
    overrides = [ONLINE, "callbacks={generations: {prompts: [def], interval: 4ba, new_tokens: 4}}"]
    overrides.append("algorithms.online_mixing={strategy: influence, interval: 2ba, warmup: 2ba}")  # for its pictures
    process = start(HERE / "lost_network.py", str(tiny_run), KEY, *overrides, folder=tiny_run.parent, WANDB_API_KEY=KEY)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert time.monotonic() - begun < 120
    folder = tiny_run.parent / "runs" / "tiny"
    assert logged(folder) == list(range(9))
    assert set(logged(folder)) <= set(steps(folder))
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "summary.json is not there" not in report

    (kept,) = folder.glob("wandb/run-*")
    there = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-m", "wandb", "sync", str(kept)]
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["_step"] for line in server.history} == set(steps(folder))
    assert {"loss/train/total", "generations", "pictures/mixture"} <= {name for line in server.history for name in line}
