"""Clear away what a killed process of ours left in shared memory, and nothing else.

StreamingDataset numbers its shared memory segments and lock files by a prefix. After a hard kill they stay behind, the
next start then finds its folders "reused" (remote shards) or takes a higher prefix, without end. Streaming's own
cleaner also removes the segments of jobs that live. Here every process notes which prefix it is about to make; the next
start removes the prefixes whose process is gone.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming import StreamingDataset
    from streaming.base.shared import SharedMemory

__all__ = ["open_dataset", "remove_stale"]

_SEGMENTS = Path("/dev/shm")


def open_dataset(make: Callable[[], StreamingDataset]) -> StreamingDataset:
    """Clear away, then call ``make`` while other starts of this user on this node are kept out.

    Two that look for a free prefix at the same moment would find the same one. The prefix that Streaming will find is
    noted before it is made, or a kill in between would leave segments that nobody knows of. Only the first rank of a
    node does any of this; ``make`` lets the others wait for it (a barrier) before they look.

    What the data set opened is closed when it is collected, or at exit.
    """
    with _segments_opened() as segments, _first_rank_alone() as first:
        dataset = make()
        prefix = dataset._shm_prefix_int
        if first:
            _note(prefix)
    mine = [segment for segment in segments if segment.shm.name.lstrip("/").startswith(f"{prefix:06}_")]
    for segment in segments:
        if segment not in mine:  # only looked at, in the search for a free prefix
            segment.cleanup()
    weakref.finalize(dataset, _release, mine, prefix if first else None, os.getpid())
    return dataset


@contextmanager
def _first_rank_alone() -> Iterator[bool]:
    """Hold this user's lock on this node and have the next prefix noted; yields whether this is the first rank."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield False
        return
    from filelock import FileLock
    from streaming.base.constant import SHM_TO_CLEAN
    from streaming.base.shared.prefix import _check_and_find

    with FileLock(_notes() / f"cheapertraining-{_user()}.lock"):
        remove_stale()
        expected = max(_check_and_find([], [], name) for name in SHM_TO_CLEAN)
        _note(expected)
        try:
            yield True
        except BaseException:
            _note_of(expected).unlink(missing_ok=True)  # another process may have that prefix next
            raise


@contextmanager
def _segments_opened() -> Iterator[list[SharedMemory]]:
    """Catch the segments that Streaming opens meanwhile, on whose closing at exit it would otherwise insist.

    It registers each of them with ``atexit``, also those it merely looks at: several open files for every data set that
    a process ever makes, and more with each, until there are no more to have.
    """
    from streaming.base.shared import memory as their_module

    memory: Any = their_module  # its import of atexit is not part of what it offers
    opened: list[SharedMemory] = []

    class Catcher:
        @staticmethod
        def register(cleanup: Callable[[], None]) -> None:
            opened.append(cleanup.__self__)  # type: ignore[attr-defined]  # a bound method

    original = memory.atexit
    memory.atexit = Catcher
    try:
        yield opened
    except BaseException:
        for segment in opened:
            segment.cleanup()
        raise
    finally:
        memory.atexit = original


def _release(segments: list[SharedMemory], prefix: int | None, owner: int) -> None:
    if os.getpid() != owner:  # a DataLoader worker must not close its parent's
        return
    for segment in segments:
        with suppress(BufferError):  # an array still looks into it; the process's end closes it
            segment.cleanup()
    if prefix is not None:
        _remove_locks(prefix, Path(gettempdir()))
        _note_of(prefix).unlink(missing_ok=True)


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
            _remove_segments(int(note["prefix"]))
            _remove_locks(int(note["prefix"]), Path(note["locks"]))
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
    _note_of(prefix).write_text(json.dumps(note | {"locks": gettempdir()}), encoding="utf-8")


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _namespace() -> str | None:
    """Where a pid means anything: containers may share memory and still number their processes separately."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _remove_segments(prefix: int) -> None:
    from multiprocessing.shared_memory import SharedMemory

    from streaming.base.constant import SHM_TO_CLEAN

    for name in SHM_TO_CLEAN:
        with suppress(FileNotFoundError):
            segment = SharedMemory(f"{prefix:06}_{name}", create=False)
            segment.close()
            segment.unlink()


def _remove_locks(prefix: int, folder: Path) -> None:
    """Streaming never removes its lock files, and passes over each prefix that has one."""
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK

    for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
        (folder / f"{prefix:06}_{name}").unlink(missing_ok=True)


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
