"""FSDP2 (``fully_shard``) by decoder block: mixed precision, CPU offload, checkpointed activations, compiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cheapertraining.errors import UserError

__all__ = ["MixedPrecisionName", "checkpoint_blocks", "compile_blocks", "half_precision", "shard_with_fsdp2"]

MixedPrecisionName = Literal["DEFAULT", "PURE", "FULL"]
"""As Composer names them: parameters in half and gradients reduced in float32; both in half; neither."""

_HALVES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def half_precision(precision: str, mixed: MixedPrecisionName) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes that parameters are gathered in and gradients reduced in; None leaves them as they are.

    Args:
        precision: the run's, resolved: ``"fp32"``, ``"amp_bf16"`` or ``"amp_fp16"``.
        mixed: see :data:`MixedPrecisionName`.
    """
    half = _HALVES.get(precision)
    if half is None or mixed == "FULL":
        return None, None
    return half, torch.float32 if mixed == "DEFAULT" else half


def shard_with_fsdp2(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    precision: str = "fp32",
    mixed: MixedPrecisionName = "DEFAULT",
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Spread parameters, gradients and optimizer state over ``mesh``, in place: a group a block, one for the rest.

    Parameters become DTensors, so the optimizer is made afterwards. On the meta device nothing is allocated.

    Args:
        model: the module that is called; embedding, head and norms (tied or not) are its own group.
        blocks: its decoder blocks, in the order they run.
        mesh: of one dimension (shards), or two (replicas of shards, HSDP).
        precision, mixed: see :func:`half_precision`.
        reshard_after_forward: free a block's gathered parameters until its backward pass; False gathers once a step.
        cpu_offload: keep shards, gradients and optimizer state in host memory.

    Raises:
        UserError: a parameter is cut twice along one dimension that cannot be divided so often, which torch 2.7 would
            save and load wrongly.
    """
    parameters, reduced = half_precision(precision, mixed)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=parameters, reduce_dtype=reduced),
        "offload_policy": offload,
    }
    for name, parameter in model.named_parameters():
        _check_even(name, parameter, mesh.size(mesh.ndim - 1))
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **settings)
    # What the head needs in the forward pass it needs at the beginning of the backward pass, so it stays gathered.
    fully_shard(model, reshard_after_forward=False, **settings)


def _check_even(name: str, parameter: nn.Parameter, shards: int) -> None:
    if not isinstance(parameter, DTensor) or shards == 1 or not parameter.placements[0].is_shard(0):
        return
    rows, tensor = parameter.shape[0], parameter.device_mesh.size()
    if rows % (tensor * shards):
        raise UserError(
            f"parallelism: {name} has {rows} rows, which {tensor} tensor parallel times {shards} data parallel ranks "
            "do not divide. Use other degrees, or a vocabulary or width that they divide."
        )


def checkpoint_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Keep only the inputs of each block for the backward pass and run the block again there; the wrapped blocks.

    Names in ``state_dict`` stay as they are.
    """
    wrapped = {id(block): checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT) for block in blocks}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in wrapped and module is not wrapped[id(child)]:
                setattr(module, name, wrapped[id(child)])
    return [wrapped[id(block)] for block in blocks]


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward pass of each block; the hooks around it, which gather parameters, stay outside.

    All blocks are of one shape, so that what was compiled for the first serves the others.
    """
    for block in blocks:
        inner = cast(nn.Module, getattr(block, "_checkpoint_wrapped_module", block))
        inner.forward = torch.compile(inner.forward)
