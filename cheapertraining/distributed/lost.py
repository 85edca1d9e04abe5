"""A rank that is gone is told of by the others, in words, and within a bounded time."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from cheapertraining.errors import UserError

__all__ = ["bound_waiting", "lost_ranks_explained"]

_CLOSED = re.compile(r"connection closed by peer|connection reset|broken pipe|remote process exited", re.IGNORECASE)
_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)
_TRANSPORT = re.compile(r"gloo|nccl|socket|store|collective|waiting", re.IGNORECASE)


def bound_waiting(seconds: float) -> None:
    """Let no rank wait longer than that in a collective of any process group there is.

    Groups that are made of the default one wait for half an hour (gloo) or ten minutes (NCCL) otherwise, whatever the
    default group was told. Call it when all of them have been made.
    """
    if not dist.is_initialized():
        return
    module: Any = dist.distributed_c10d
    for group in list(module._world.pg_map):
        module._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


@contextlib.contextmanager
def lost_ranks_explained(seconds: float) -> Iterator[None]:
    """Turn what torch raises when another rank is gone, or silent for ``seconds``, into a UserError.

    On NCCL torch's own watchdog ends the process after the same time, with its own words.
    """
    try:
        yield
    except RuntimeError as error:  # of which torch's own kinds are subclasses
        reason = _reason(str(error), seconds)
        if reason is None or not dist.is_initialized():
            raise
        raise UserError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: {reason}. This rank ends too. Look for the first "
            "error of the others (out of memory, a node that went down), then start again with autoresume=true and the "
            "same run_name, on as many ranks as are left if need be."
        ) from error


def _reason(text: str, seconds: float) -> str | None:
    if _CLOSED.search(text):
        return "another rank has gone (it closed its connection)"
    if _LATE.search(text) and _TRANSPORT.search(text):
        return f"another rank has not answered for {seconds:g} seconds (parallelism.dist_timeout)"
    return None
