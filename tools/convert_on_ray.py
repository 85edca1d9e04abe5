"""convert_text on a Ray cluster: the same options, the same bytes, with the work spread over all its machines.

    python tools/convert_on_ray.py '/shared/raw/*.parquet' --tokenizer /shared/tokenizer --seq-len 2048 \\
        --out s3://bucket/shards/web --work /shared/web.conversion --address auto

Each machine must have this package, and reach inputs, tokenizer and --work (or --out, where it is a folder) under the
same paths. --workers is how many tasks run at once (default: one a core of the cluster). Without --address or
RAY_ADDRESS, a cluster of this machine alone is started.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from cheapertraining.data.conversion import Job, Report
from cheapertraining.data.conversion.phases import Step, run_phases
from cheapertraining.errors import UserError
from tools.convert_text import add_options, add_text_options, exit_code, job_of


def convert(job: Job, *, at_once: int, resume: bool, progress: bool) -> Report:
    """Do a conversion, or what is left of it, on the cluster that this process is connected to.

    Args:
        job: what to do; its ``work`` folder and inputs are reached by all machines.
        at_once: tasks that run at the same time; 0 is one a core of the cluster.
        resume: go on with an unfinished conversion; one that is finished is left alone.
        progress: show a bar on standard error.

    Raises:
        UserError: as :func:`cheapertraining.data.conversion.convert`.
    """
    return run_phases(job, lambda: nullcontext(_Runner(job, at_once, progress)), resume)


class _Silent:
    """A task is told of when it is done, not before."""

    def add(self, bytes: int = 0, documents: int = 0, tokens: int = 0) -> None:
        return


def _on_a_machine(step: Step, job: Job, folder: str, task: Any) -> None:
    """What a task is: relative paths mean the same as where the conversion was started."""
    os.chdir(folder)
    with open(job.work / "workers.lock", "a+") as lock:  # who resumes a killed conversion waits for this task's end
        fcntl.flock(lock, fcntl.LOCK_SH)
        step(job, task, _Silent())


class _Runner:
    """Runs tasks on the cluster, a bounded number at a time; the first error ends it."""

    def __init__(self, job: Job, at_once: int, progress: bool) -> None:
        import ray

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other machines may not have this script
        self._job = ray.put(job)
        self._task = ray.remote(num_cpus=1)(_on_a_machine)
        self._at_once = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._progress = progress

    def __call__(self, what: str, step: Step, tasks: Sequence[Any], bytes: int) -> None:
        import ray
        from tqdm import tqdm

        left = list(tasks)
        bar = tqdm(total=len(left), desc=what, unit="task", disable=not self._progress, dynamic_ncols=True)
        running: list[Any] = []
        try:
            while left or running:
                while left and len(running) < self._at_once:
                    running.append(self._task.remote(step, self._job, os.getcwd(), left.pop(0)))
                done, running = ray.wait(running)
                ray.get(done)
                bar.update(len(done))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"a task of the conversion died ({type(error).__name__}: {reason}). What is finished is kept: run the "
                "same command with --resume, with fewer --workers or a smaller --window-tokens if memory was short."
            ) from error
        finally:
            bar.close()
            for task in running:
                ray.cancel(task, force=True)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one of this machine.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed. Run: pip install 'cheapertraining[ray]'.") from error
    try:
        _check_listens(address)
        environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}  # the tasks are the parallelism
        ray.init(address, logging_level=logging.WARNING, log_to_driver=False, runtime_env=environment)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--address: no Ray cluster at '{address}' ({reason}). Start one: ray start --head.") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str | None) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, _, port = (address or "").partition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_text_options(parser)
    parser.add_argument(
        "--address", metavar="HOST:PORT|auto", help="of the Ray cluster (default: RAY_ADDRESS, else this machine)"
    )
    parser.set_defaults(workers=0)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert; see :func:`~tools.convert_text.exit_code`."""
    given = _parser().parse_args(arguments)

    def work() -> None:
        from cheapertraining.data.conversion import TextEncoder, try_out

        job = job_of(given, TextEncoder(given.tokenizer, given.text_column, given.on_error))
        if given.dry_run:
            print(try_out(job))
            return
        with _cluster(given.address):
            print(convert(job, at_once=given.workers, resume=given.resume, progress=sys.stderr.isatty()))

    return exit_code("convert_on_ray", work)


if __name__ == "__main__":
    sys.exit(main())
