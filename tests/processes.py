"""Processes of their own whose imports are done: forked from a server that has torch, Composer and this package.

Importing those takes ten CPU seconds, more than most of what tests start processes for. What is to be seen in the
import itself, in Composer's launcher or in a command line as typed, is started without this.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch import multiprocessing as torch_multiprocessing

__all__ = ["Started", "run_on_ranks", "start"]

PRELOADED = [
    "cheapertraining.training.run",
    "cheapertraining.distillation",
    "cheapertraining.influence.preconditioners",
    "cheapertraining.influence.scorers.hook",
    "cheapertraining.data.conversion",
    "composer.trainer",
    "streaming",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
]
_PATIENCE = 30.0
"""Seconds that the other ranks have to end by themselves after one that failed, as with Composer's launcher."""
_numbers = itertools.count()
_server_pid: int | None = None


def _serve() -> None:
    """Have the server running, with the imports done; a conversion may have started one that has others."""
    global _server_pid  # one a process, like the standard library's own
    server = forkserver._forkserver
    if _server_pid is None or server._forkserver_pid != _server_pid:
        server._stop()  # type: ignore[attr-defined]
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
        _server_pid = server._forkserver_pid


def run_on_ranks(work: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """``work(rank, ranks, *arguments)`` in that many processes at once; an exception in one is raised here."""
    _serve()
    torch_multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        work, args=(ranks, *arguments), nprocs=ranks, start_method="forkserver"
    )


def start(script: Path, *arguments: str, folder: Path, ranks: int = 1, **environment: str) -> Started:
    """``python script arguments`` on each rank, in ``folder``, as Composer's launcher starts it but for the imports."""
    _serve()
    outputs = folder / f"output-{next(_numbers)}"
    outputs.mkdir(parents=True)
    settings = {**os.environ, **environment}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            settings["MASTER_PORT"] = str(free.getsockname()[1])
        settings |= {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
        settings |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = multiprocessing.get_context("forkserver").Process(
            target=_become, args=(str(script), arguments, {**settings, **own}, str(folder), str(outputs / str(rank)))
        )
        process.start()
        processes.append(process)
    return Started(processes, outputs)


class Started:
    """A script under way on one rank or more; to be asked like a ``subprocess.Popen``.

    Each rank has a session of its own: ``os.killpg`` ends it with all that it has started. What rank ``r`` prints is
    in ``outputs/r.out``, what it says on standard error in ``outputs/r.err``.
    """

    def __init__(self, processes: list[BaseProcess], outputs: Path) -> None:
        self.processes, self.outputs = processes, outputs
        self._failed_at: float | None = None

    @property
    def pid(self) -> int:
        """Of rank 0."""
        assert self.processes[0].pid is not None
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Exit code once all ranks have ended: the first that is not 0. A rank that fails ends the others."""
        codes = [process.exitcode for process in self.processes]
        bad = next((code for code in codes if code), 0)
        if None not in codes:
            return bad
        if bad and self._failed_at is None:
            self._failed_at = time.monotonic()
            self._signal(signal.SIGTERM)
        elif self._failed_at is not None and time.monotonic() > self._failed_at + _PATIENCE:
            self.kill()
        return None

    def wait(self, timeout: float = 600) -> int:
        """Exit code; after ``timeout`` seconds all is killed and AssertionError says what was printed."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no end after {timeout} s; printed {self.output()}{self.output(name='err')}")
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What rank 0 has printed, and said on standard error, at its end."""
        self.wait(timeout)
        return self.output(), self.output(name="err")

    def output(self, rank: int = 0, name: str = "out") -> str:
        """What a rank has printed so far (``out``) or said on standard error (``err``)."""
        file = self.outputs / f"{rank}.{name}"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def kill(self) -> None:
        """SIGKILL to all ranks, but not to what they have started."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)


def _become(script: str, arguments: tuple[str, ...], environment: Mapping[str, str], folder: str, output: str) -> None:
    """What the interpreter does before, with and after a script, without its start."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115  # to the process's end
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    # A tracker of its own for shared memory, as any process has that was not forked: it ends with the process's group.
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
    multiprocessing.set_start_method(None, force=True)  # not the one that this process was started by
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves by os._exit, where an interpreter would come to these
