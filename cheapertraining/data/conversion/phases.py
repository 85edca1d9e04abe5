"""What a conversion does, in which order, on whatever runs its tasks: this machine's cores, or a cluster."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from cheapertraining.data.conversion.assemble import ShardTask, finish_part, plan_shards, write_planned_shard
from cheapertraining.data.conversion.job import Job, open_job
from cheapertraining.data.conversion.report import Report, collect_report
from cheapertraining.data.conversion.windows import Progress, convert_piece, hash_piece, mark_duplicates

__all__ = ["RunTasks", "Step", "run_phases"]

Step = Callable[[Job, Any, Progress], None]
"""Does one task; may be run in any process that reaches the job's folder, but not twice at once."""

RunTasks = Callable[[str, Step, Sequence[Any], int], None]
"""Does all tasks: the phase's name for people, the step, its tasks, and the bytes of input that they read."""


def run_phases(job: Job, engine: Callable[[], AbstractContextManager[RunTasks]], resume: bool) -> Report:
    """Do a conversion, or what is left of it, with the tasks run by ``engine``.

    Raises:
        UserError: as :func:`cheapertraining.data.conversion.convert`.
    """
    started = time.monotonic()
    _ = job.token_dtype  # refused here rather than in every process
    with open_job(job, resume) as to_do:
        if not to_do:
            return Report({}, 0, 0, (), 0, 0, 0.0)
        with engine() as run:
            if job.settings.deduplicate:
                run("hash", hash_piece, range(len(job.pieces)), sum(piece.bytes for piece in job.pieces))
                mark_duplicates(job)
            run("tokenize", convert_piece, job.my_pieces, sum(job.pieces[number].bytes for number in job.my_pieces))
            run("write", _write, plan_shards(job), 0)
        metas = finish_part(job)
        report = collect_report(job, metas, time.monotonic() - started)
    shutil.rmtree(job.work, ignore_errors=True)
    return report


def _write(job: Job, task: ShardTask, progress: Progress) -> None:
    write_planned_shard(job, task)
