"""A conversion on the cores of one machine: processes, progress, and what happens when one of them dies."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import IO, Any

from cheapertraining.data.conversion.job import Job
from cheapertraining.data.conversion.phases import RunTasks, Step, run_phases
from cheapertraining.data.conversion.report import Report
from cheapertraining.errors import UserError

__all__ = ["convert"]

_POLL_SECONDS = 0.5


def convert(job: Job, *, workers: int = 1, resume: bool = False, progress: bool = False) -> Report:
    """Do a conversion, or what is left of it.

    The shards are the same bytes for any number of workers and after any number of crashes.

    Args:
        job: what to do.
        workers: processes.
        resume: go on with an unfinished conversion; one that is finished is left alone.
        progress: show a bar on standard error.

    Raises:
        UserError: bad input, see :class:`Settings`, :func:`list_pieces` and :func:`open_job`; a process died.
    """
    return run_phases(job, lambda: _processes(job, workers, progress), resume)


class _Shared:
    """Bytes, documents and tokens by worker; without a lock, which a killed worker might hold for ever."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.counts = context.RawArray("q", 3 * workers)
        self.taken = context.Value("i")

    def take_slot(self) -> int:
        """The next worker's place in ``counts``."""
        with self.taken.get_lock():
            self.taken.value += 1
            return int(self.taken.value - 1) % (len(self.counts) // 3)

    def totals(self) -> list[int]:
        """Bytes, documents and tokens of all workers."""
        return [sum(self.counts[index::3]) for index in range(3)]

    def reset(self) -> None:
        """Start at 0 again, while no worker is at work."""
        for index in range(len(self.counts)):
            self.counts[index] = 0


class _Counters:
    """This process's share of the progress."""

    def __init__(self, shared: _Shared) -> None:
        self.counts = shared.counts
        self.first = 3 * shared.take_slot()

    def add(self, bytes: int = 0, documents: int = 0, tokens: int = 0) -> None:
        self.counts[self.first] += bytes
        self.counts[self.first + 1] += documents
        self.counts[self.first + 2] += tokens


_worker_job: Job
_worker_counters: _Counters
_worker_lock: IO[str]


@contextmanager
def _processes(job: Job, workers: int, progress: bool) -> Iterator[RunTasks]:
    """Run tasks in processes that end when this one does; one worker is this process itself."""
    if workers < 1:
        raise UserError(f"workers: expected at least 1, found {workers}.")
    shared = _Shared(workers)

    def run_in(pool: Executor | None) -> RunTasks:
        def run(what: str, step: Step, tasks: Sequence[Any], bytes: int) -> None:
            with _bar(progress and bytes > 0, what, bytes, shared):
                _run(pool, job, step, tasks, shared)

        return run

    if workers == 1:
        yield run_in(None)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cheapertraining.data.conversion", "streaming"])
    alive, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, shared, alive))
    try:
        yield run_in(pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()


def _start_worker(job: Job, shared: _Shared, alive: Connection) -> None:
    global _worker_job, _worker_counters, _worker_lock
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_job, _worker_counters = job, _Counters(shared)
    _end_with(alive)
    _worker_lock = open(job.work / "workers.lock", "a+")  # noqa: SIM115 (held until the process ends)
    fcntl.flock(_worker_lock, fcntl.LOCK_SH)


def _end_with(alive: Connection) -> None:
    """A killed main process must not leave workers behind that write into a folder another one has taken over.

    Only the main process holds the other end of the pipe (the fork server, the workers' parent, outlives it).
    """

    def watch() -> None:
        with suppress(EOFError, OSError):
            alive.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(step: Step, task: Any) -> None:
    step(_worker_job, task, _worker_counters)


def _run(pool: Executor | None, job: Job, step: Step, tasks: Sequence[Any], shared: _Shared) -> None:
    """Do all tasks; the first error stops those that have not begun."""
    if pool is None:
        counters = _Counters(shared)
        for task in tasks:
            step(job, task, counters)
        return
    futures = [pool.submit(_in_worker, step, task) for task in tasks]
    try:
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{job.work}: a process of this conversion died (out of memory, or killed). What is finished is kept: run "
            "the same command with --resume, with fewer --workers or a smaller --window-tokens if memory was short."
        ) from error
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _bar(show: bool, what: str, total: int, shared: _Shared) -> Iterator[None]:
    """A progress bar of input bytes with documents and tokens a second, drawn by a thread."""
    shared.reset()
    if not show:
        yield
        return
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(total=total or None, desc=what, unit="B", unit_scale=True, miniters=0, dynamic_ncols=True) as bar:
        started = time.monotonic()

        def draw() -> None:
            bytes, documents, tokens = shared.totals()
            seconds = max(time.monotonic() - started, 1e-9)
            if documents:
                bar.set_postfix_str(f"{documents / seconds:,.0f} docs/s, {tokens / seconds:,.0f} tok/s", refresh=False)
            bar.update(min(bytes, total or bytes) - bar.n)

        def watch() -> None:
            while not done.wait(_POLL_SECONDS):
                draw()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            draw()
