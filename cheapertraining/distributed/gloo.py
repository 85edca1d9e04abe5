"""What torch 2.7's FSDP needs to be right on a CPU with gloo. On CUDA with NCCL nothing here is used.

Private functions of torch are replaced, once a process, each by one that does as before wherever gloo is not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["mend_fsdp2_on_gloo", "mend_fsdp_on_cpu"]

log = logging.getLogger(__name__)


def mend_fsdp2_on_gloo() -> bool:
    """Let FSDP2 average gradients on gloo, where torch 2.7 sums them, and reduce over replicas there.

    FSDP2 reduces float32 and bfloat16 with the operation AVG. Gloo's reduce-scatter takes it for SUM (pytorch issue
    162338), and its all-reduce, which replicas of shards use, refuses it; float16 and float64 are summed and divided by
    hand. Here every type is. The public all-reduce hook would come too late for replicas, which besides expect events
    of CUDA streams that a CPU has not.

    Returns:
        Whether the default process group is one of gloo, so that this counts. Logged the first time.
    """
    from torch.distributed.fsdp import _fully_shard

    collectives: Any = _fully_shard._fsdp_collectives
    groups: Any = _fully_shard._fsdp_param_group
    if dist.get_backend() != "gloo":
        return False
    divide: Any = collectives._get_gradient_divide_factors
    reduce: Any = groups.foreach_reduce
    if getattr(divide, "_mended", False):
        return True

    def divide_by_ranks(
        scatter: dist.ProcessGroup, replicas: dist.ProcessGroup | None, dtype: torch.dtype, device_type: str = ""
    ) -> Any:
        if dist.get_backend(scatter) != "gloo":
            return divide(scatter, replicas, dtype, device_type)
        return 1.0, float(scatter.size() * (1 if replicas is None else replicas.size()))

    def reduce_without_events(*args: Any, **kwargs: Any) -> Any:
        scattered, scatter_event, post_event, reduced, reduce_event, partial = reduce(*args, **kwargs)
        # The input of the second reduction is kept until its event: on a CPU it is done, and there is none.
        return scattered, scatter_event, post_event, None if reduce_event is None else reduced, reduce_event, partial

    divide_by_ranks._mended = True  # type: ignore[attr-defined]
    collectives._get_gradient_divide_factors = divide_by_ranks
    groups.foreach_reduce = reduce_without_events
    log.warning("gloo: FSDP2's gradients are summed and divided by the ranks here, since gloo's AVG is a SUM.")
    return True


def mend_fsdp_on_cpu() -> None:
    """Let FSDP1 collect whole state dicts on a CPU: it would free gathered parameters once they are "moved" there."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    move: Any = FlatParamHandle.to_cpu
    if getattr(move, "_mended", False):
        return

    @contextlib.contextmanager
    def stay_or_move(handle: Any) -> Iterator[None]:
        with contextlib.nullcontext() if handle.flat_param.device.type == "cpu" else move(handle):
            yield

    stay_or_move._mended = True  # type: ignore[attr-defined]
    FlatParamHandle.to_cpu = stay_or_move  # type: ignore[assignment, method-assign]
