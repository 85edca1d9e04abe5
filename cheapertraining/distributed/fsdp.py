"""FSDP1 (``FullyShardedDataParallel``) by decoder block, for runs that began with it; FSDP2 is the better choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy

from cheapertraining.distributed.fsdp2 import MixedPrecisionName, half_precision
from cheapertraining.distributed.gloo import mend_fsdp_on_cpu

__all__ = ["original_shapes", "shard_with_fsdp"]


def shard_with_fsdp(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    *,
    precision: str = "fp32",
    mixed: MixedPrecisionName = "DEFAULT",
    cpu_offload: bool = False,
) -> nn.Module:
    """Wrap ``model`` and each block; the wrapped model, whose original parameters the optimizer is made of.

    Args:
        model: whole, with the same numbers on every rank.
        blocks: its decoder blocks.
        mesh: of one dimension (shards), or two (replicas of shards, HYBRID_SHARD).
        device: of this rank. Composer's own wrapping asks CUDA for it, and so cannot run on a CPU.
        precision, mixed: see :func:`~cheapertraining.distributed.fsdp2.half_precision`.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
    """
    if device.type == "cpu":
        mend_fsdp_on_cpu()
    parameters, reduced = half_precision(precision, mixed)
    wanted = {id(block) for block in blocks}
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.FULL_SHARD if mesh.ndim == 1 else ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in wanted),
        mixed_precision=MixedPrecision(param_dtype=parameters, reduce_dtype=reduced, buffer_dtype=None),
        cpu_offload=CPUOffload(offload_params=True) if cpu_offload else None,
        device_id=device,
        use_orig_params=True,
    )


def original_shapes(model: nn.Module) -> dict[int, torch.Size]:
    """Whole shapes by ``id(parameter)`` of what FSDP1 shows as flat slices; empty for any other model."""
    wrapped = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    handles = [module._handle for module in wrapped if module._handle is not None]
    return {
        id(parameter): shape
        for handle in handles
        for parameter, shape in zip(handle.flat_param._params or (), handle.flat_param._shapes, strict=True)
    }
