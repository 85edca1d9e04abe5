"""The thread that downloads shards ahead: it ends with its loader, and never later than the interpreter allows."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any, cast

import pytest

from cheapertraining.data.plan import MixturePlan
from cheapertraining.data.prefetch import ShardPrefetcher
from cheapertraining.data.store import ShardStore

_LEFT_OPEN = """
import gc, sys, threading, time
import torch
from cheapertraining.data.plan import MixturePlan
from cheapertraining.data.prefetch import ShardPrefetcher

class Cycle:
    def __init__(self):
        self.me, self.tensor = self, torch.ones(1)

class Store:
    def fetch(self, source, shard):
        under_way.set()
        end = time.monotonic() + 2
        while time.monotonic() < end:  # a download that outlasts the run, and collects what the run leaves behind
            cycles = [Cycle() for _ in range(200)]
            del cycles
            gc.collect()

under_way = threading.Event()
plan = MixturePlan({"a": [40, 40]}, {"a": 1.0}, global_batch_size=4, seed=0)
prefetcher = ShardPrefetcher(Store(), plan)
prefetcher.advance(0)
under_way.wait()
sys.exit(2)
"""


def test_interpreter_ends_in_good_order_in_the_middle_of_a_download() -> None:
    """As a daemon, the thread asks for the GIL in a destructor of torch when there is none any more: SIGABRT."""
    done = subprocess.run([sys.executable, "-c", _LEFT_OPEN], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("failing", [False, True])
def test_close_stops_after_the_download_under_way(failing: bool) -> None:
    begun, let_go = threading.Event(), threading.Event()
    fetched = []

    class Store:
        def fetch(self, source: int, shard: int) -> None:
            fetched.append(shard)
            begun.set()
            let_go.wait(30)
            if failing:
                raise OSError("cut")

    plan = MixturePlan({"a": [4] * 20}, {"a": 1.0}, global_batch_size=4, seed=0)
    prefetcher = ShardPrefetcher(cast(ShardStore, cast(Any, Store())), plan)
    prefetcher.advance(0)
    assert begun.wait(30)
    thread = next(thread for thread in threading.enumerate() if thread.name == "shard-prefetch")
    prefetcher.close()
    let_go.set()
    thread.join(30)
    assert not thread.is_alive()
    assert len(fetched) == 1
