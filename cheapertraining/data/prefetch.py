"""Download shards ahead of the training order, so that a step never waits for one.

Which shards a source needs next does not depend on its weight, only on its own order: a weight decides how soon.
"""

from __future__ import annotations

import os
import threading

from cheapertraining.data.plan import MixturePlan
from cheapertraining.data.store import ShardStore

__all__ = ["ShardPrefetcher"]

_LOOK_UP = 0.5  # seconds in which an idle thread notices that the interpreter wants to end


class ShardPrefetcher:
    """One thread on the first rank of each node that fetches the next shards of every source.

    A failed download is left to the reader, which needs the shard, tries again and reports.

    The interpreter waits for the thread at its end, since a daemon thread would not survive it: whatever allocates may
    collect garbage, and this thread then frees tensors of the run that is over. Torch lets go of the GIL to free one;
    where the interpreter is being torn down meanwhile, CPython ends the thread as it asks for the GIL again, inside a
    C++ destructor, and that aborts the process.
    """

    def __init__(self, store: ShardStore, plan: MixturePlan) -> None:
        self._store = store
        self._plan = plan
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._fetched: set[tuple[int, int]] = set()
        self._wanted: list[tuple[int, int]] = []
        self._thread: threading.Thread | None = None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=False)
            self._thread.start()

    def advance(self, batch: int) -> None:
        """Tell the thread which batch is planned next (called from the thread that plans: the plan is not locked)."""
        if self._thread is None:
            return
        drawn = self._plan.counts_before(batch)
        self._wanted = [
            (source, shard)
            for source, start in enumerate(drawn.tolist())
            for shard in self._plan.order(source).upcoming_shards(start)
        ]
        self._wake.set()

    def close(self) -> None:
        """Stop after the download under way, without waiting for it."""
        self._closed.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._over():
            if not self._wake.wait(_LOOK_UP):
                continue
            self._wake.clear()
            wanted = self._wanted
            self._fetched &= set(wanted)  # one that left the window may have been evicted since
            for source, shard in wanted:
                if self._over():
                    return
                if (source, shard) not in self._fetched:
                    self._fetch(source, shard)

    def _over(self) -> bool:
        # Nobody calls close on a loader that is still open when the program ends.
        return self._closed.is_set() or not threading.main_thread().is_alive()

    def _fetch(self, source: int, shard: int) -> None:
        try:
            self._store.fetch(source, shard)
        except Exception:  # any storage client's error; the reader meets it again and reports it
            return
        self._fetched.add((source, shard))
