"""Processes that share the parts of a run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.offline.job import LoadedModel, LoadModel, ScoringJob
from cheapertraining.influence.offline.rows import Part, ShardSet, part_batches
from cheapertraining.influence.offline.scoring import Checkpoint, score_part

__all__ = ["limited_threads", "run_processes", "run_workers", "work_on"]

_END_SECONDS = 10


def work_on(
    job: ScoringJob,
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    sets: Sequence[ShardSet],
    parts: Sequence[Part],
    numbers: Sequence[int],
    advance: Callable[[int], None],
) -> None:
    """Score some parts with one checkpoint and commit them one by one; ``advance`` is told of each batch's rows."""
    if not numbers:
        return
    scorer = checkpoint.scorer(job, loaded)
    for number in numbers:
        batches = part_batches(sets, parts[number], job.batch_size)
        checkpoint.parts.write(number, score_part(scorer, batches, job.unit, checkpoint.parts.dtype, advance))


def run_workers(
    job: ScoringJob,
    checkpoints: Sequence[Checkpoint],
    load: LoadModel,
    sets: Sequence[ShardSet],
    parts: Sequence[Part],
    advance: Callable[[int], None],
) -> None:
    """Let ``job.processes`` processes do the missing parts, each an interleaved share; return when all is committed.

    Raises:
        UserError: a process met one, or died; what it had committed is kept.
    """
    missing = [checkpoint.parts.missing() for checkpoint in checkpoints]
    shares = [[each[number :: job.processes] for each in missing] for number in range(job.processes)]
    work = [(number, job, checkpoints, load, sets, parts, share) for number, share in enumerate(shares) if any(share)]
    run_processes(_score_shares, work, advance)


def run_processes(work: Callable[..., None], shares: Sequence[tuple[Any, ...]], advance: Callable[[int], None]) -> None:
    """Start a process for each share and return when all have ended.

    Args:
        work: called with the arguments of a share and, last, with a function to report progress to; picklable.
        shares: picklable arguments.
        advance: is told what the processes report.

    Raises:
        UserError: a process met one, or died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks and could not use CUDA
    running: dict[Connection, Any] = {}
    try:
        for share in shares:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, work, share), daemon=True)
            process.start()
            theirs.close()  # or the end of the process would not end the pipe
            running[mine] = process
        while running:
            for connection in wait(list(running)):
                _take(connection, running, advance)  # type: ignore[arg-type]  # they are what was waited for
    finally:
        for process in running.values():
            process.terminate()
            process.join(_END_SECONDS)


def _take(connection: Connection, running: dict[Connection, Any], advance: Callable[[int], None]) -> None:
    """One message of a process: rows that are done, or what went wrong; or its end."""
    try:
        message = connection.recv()
    except EOFError:
        process = running.pop(connection)
        process.join()
        if process.exitcode != 0:
            raise UserError(
                f"--processes {len(running) + 1}: a process died (exit code {process.exitcode}; out of memory?). The "
                "parts it committed are kept: go on with --resume, perhaps with fewer processes."
            ) from None
        return
    if isinstance(message, str):
        raise UserError(message)
    advance(message)


def _work(connection: Connection, work: Callable[..., None], share: tuple[Any, ...]) -> None:
    """A process: its share. It ends when nobody listens any more (its parent was killed)."""
    try:
        with limited_threads():
            work(*share, connection.send)
    except UserError as error:
        connection.send(str(error))
    except BrokenPipeError:
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(130)
    connection.close()


def _score_shares(
    number: int,
    job: ScoringJob,
    checkpoints: Sequence[Checkpoint],
    load: LoadModel,
    sets: Sequence[ShardSet],
    parts: Sequence[Part],
    shares: Sequence[Sequence[int]],
    advance: Callable[[int], None],
) -> None:
    """A process's share of each checkpoint."""
    for checkpoint, path, share in zip(checkpoints, job.models, shares, strict=True):
        if share:
            loaded = load(path, job.process_device(number))
            work_on(job, checkpoint, loaded, sets, parts, share, advance)


@contextlib.contextmanager
def limited_threads() -> Iterator[None]:
    """Threads of torch as OMP_NUM_THREADS says, or 1: sums that are split otherwise round otherwise.

    So the scores do not depend on the number of processes, and processes do not fight for cores.
    """
    given, before = os.environ.get("OMP_NUM_THREADS", ""), torch.get_num_threads()
    torch.set_num_threads(int(given) if given.isdigit() and int(given) > 0 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
