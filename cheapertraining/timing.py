"""What share of the steps' time a part of their work takes.

    share = TimeShare()
    share.begin_step()
    with share.part(device): ...        # as often as wanted, not one inside another
    share.end_step()
    share.read()                        # now and then: it waits for the device

On a GPU the part is timed by events in its stream, so that no step waits for it: kernels run long after the calls that
start them, whose time would say nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["TimeShare"]


class TimeShare:
    """Seconds of all steps, and those of a part, since it was made."""

    def __init__(self) -> None:
        self._steps = 0.0
        self._part = 0.0
        self._began: float | None = None
        self._unread: list[tuple[Any, Any]] = []  # CUDA events at both ends of a part

    def begin_step(self) -> None:
        """A step begins; call it where the device has nothing left to do, as between a trainer's steps."""
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """The step is over; without a beginning it counts nothing."""
        if self._began is not None:
            self._steps += time.perf_counter() - self._began
            self._began = None

    @contextlib.contextmanager
    def part(self, device: torch.device) -> Iterator[None]:
        """What is done inside counts as the part.

        Args:
            device: that does it.
        """
        if device.type != "cuda":
            started = time.perf_counter()
            try:
                yield
            finally:
                self._part += time.perf_counter() - started
            return
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        try:
            yield
        finally:
            end.record(torch.cuda.current_stream(device))
            self._unread.append((start, end))

    def read(self) -> float:
        """The part's share of the time of all steps so far, in [0, 1]; 0 before the first has ended."""
        for start, end in self._unread:
            end.synchronize()
            self._part += start.elapsed_time(end) / 1e3
        self._unread.clear()
        return min(1.0, self._part / self._steps) if self._steps else 0.0
