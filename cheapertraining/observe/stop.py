"""End in good order when the machine is wanted back: finish the batch, save a checkpoint, leave.

GracefulStop(exit_code=143)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

__all__ = ["GracefulStop"]

_PR_SET_PDEATHSIG = 1


class GracefulStop(Callback):
    """On SIGTERM or SIGUSR1, finish the batch, save a checkpoint, and exit. A second signal ends the process at once.

    A signal need reach only one rank: all ranks agree after each batch (one all-reduce of one number), stop after the
    same batch, and leave only when the checkpoint is complete. Evaluations that are due at that batch are left out,
    since whoever sends the signal seldom waits long. ``SystemExit`` leaves ``Trainer.fit``; close the trainer in a
    ``finally`` block. With ``autoresume`` the same command continues the run.

    Composer's launcher does not pass signals on, so ranks that it started ask the kernel (Linux) for a SIGTERM at its
    end: stopping the launcher stops the run in good order as well.

    Args:
        exit_code: 143 is what a process that SIGTERM ended returns, so that nothing takes the run for complete.
    """

    def __init__(self, exit_code: int = 143) -> None:
        self.exit_code = exit_code
        self.received: str | None = None
        """Name of the signal this rank received, if any."""
        self._previous: dict[int, Any] = {}
        self._stopping = False
        self._process = 0

    def init(self, state: State, logger: Logger) -> None:
        del state, logger
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        self._process = os.getpid()
        for number in _signals():
            self._previous[number] = signal.signal(number, self._receive)
        if "LOCAL_RANK" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        assert state.max_duration is not None
        # After its last batch the run ends by itself, with the checkpoint and the evaluations that belong to its end.
        self._stopping = self._agreed(state) and state.timestamp < state.max_duration
        if self._stopping:
            state.evaluators = []

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if not self._stopping:
            return
        savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
        for saver in savers:
            saver.save_interval = lambda state, event: True
            saver.batch_checkpoint(state, logger)
        dist.barrier()
        # The rank that leaves first makes the launcher signal the others, which may still be closing their logs.
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        if dist.get_global_rank() == 0:
            what = "saved a checkpoint" if savers else "no checkpoint saved (save_folder is not set)"
            name = self.received or "signal on another rank"
            print(f"{name}: stopped after batch {state.timestamp.batch.value}, {what}", file=sys.stderr, flush=True)
        raise SystemExit(self.exit_code)

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        if not self._stopping:
            self._restore()

    def _agreed(self, state: State) -> bool:
        """Whether any rank has received a signal."""
        if dist.get_world_size() == 1:
            return self.received is not None
        flag = state.device.tensor_to_device(torch.tensor([self.received is not None], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation="MAX")
        return bool(flag.item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        # A forked child (a loader's worker) inherits this handler, but has nothing to finish.
        if self.received is not None or os.getpid() != self._process:
            self._restore()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = name
        # Not print: the signal may have come in the middle of another write to the same stream.
        os.write(2, f"{name}: stopping after this batch; send it again to end at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}


def _signals() -> tuple[int, ...]:
    return (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)
