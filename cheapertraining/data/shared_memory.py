"""Clear away what a killed process of ours left in shared memory, and nothing else.

StreamingDataset numbers its shared memory segments and lock files by a prefix. After a hard kill they stay behind, the
next start then finds its folders "reused" (remote shards) or takes a higher prefix, without end. Streaming's own
cleaner also removes the segments of jobs that live. Here every process notes which prefix it is about to make; the next
start removes the prefixes whose process is gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["register", "remove_stale", "starting"]

_SEGMENTS = Path("/dev/shm")


@contextmanager
def starting() -> Iterator[None]:
    """Clear away, then keep other starts of this user on this node out while a StreamingDataset is made.

    Two that look for a free prefix at the same moment would find the same one. The prefix that Streaming will find is
    noted before it is made, or a kill in between would leave segments that nobody knows of. Only the first rank of a
    node does any of this; the others must wait for it (a barrier) before they make theirs.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    from filelock import FileLock
    from streaming.base.constant import SHM_TO_CLEAN
    from streaming.base.shared.prefix import _check_and_find

    with FileLock(_notes() / f"cheapertraining-{_user()}.lock"):
        remove_stale()
        expected = max(_check_and_find([], [], name) for name in SHM_TO_CLEAN)
        _note(expected)
        try:
            yield
        except BaseException:
            _note_of(expected).unlink(missing_ok=True)  # another process may have that prefix next
            raise


def register(dataset: StreamingDataset) -> None:
    """Note that this process made the segments of ``dataset`` (on each node, its first rank did)."""
    if dataset._unique_rank_world.is_local_leader:
        _note(dataset._shm_prefix_int)


def remove_stale() -> list[int]:
    """Remove segments and lock files of our processes that no longer live; returns their prefixes.

    Several processes may call it at once: a segment that another has removed meanwhile is passed over.
    """
    removed = []
    for file in sorted(_notes().glob(f"cheapertraining-{_user()}-*.json")):
        with suppress(OSError, ValueError, KeyError):  # gone meanwhile, or half written
            note = json.loads(file.read_text(encoding="utf-8"))
            if note["namespace"] != _namespace() or _start_time(int(note["pid"])) == note["started"]:
                continue
            _remove_prefix(int(note["prefix"]))
            file.unlink()
            removed.append(int(note["prefix"]))
    return removed


def _notes() -> Path:
    """Beside the segments where that is a folder: the temporary folder may be another one at the next start."""
    return _SEGMENTS if _SEGMENTS.is_dir() else Path(gettempdir())


def _note_of(prefix: int) -> Path:
    return _notes() / f"cheapertraining-{_user()}-{prefix:06}.json"


def _note(prefix: int) -> None:
    pid = os.getpid()
    note = {"prefix": prefix, "pid": pid, "started": _start_time(pid), "namespace": _namespace()}
    _note_of(prefix).write_text(json.dumps(note), encoding="utf-8")


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _namespace() -> str | None:
    """Where a pid means anything: containers may share memory and still number their processes separately."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _remove_prefix(prefix: int) -> None:
    from multiprocessing.shared_memory import SharedMemory

    from streaming.base import constant

    for name in constant.SHM_TO_CLEAN:
        with suppress(FileNotFoundError):
            segment = SharedMemory(f"{prefix:06}_{name}", create=False)
            segment.close()
            segment.unlink()
    for name in (constant.BARRIER_FILELOCK, constant.CACHE_FILELOCK):
        Path(gettempdir(), f"{prefix:06}_{name}").unlink(missing_ok=True)


def _start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks, or None if there is none: a pid alone may have been reused."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return _alive_without_proc(pid)


def _alive_without_proc(pid: int) -> str | None:
    """Systems without /proc: only whether the process lives."""
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
