"""The norm of all gradients together, and clipping by it, whatever the layout."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["clip_gradient_norm"]


def clip_gradient_norm(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients in place so that their common Euclidean norm is at most ``max_norm``; call it on all ranks.

    As ``torch.nn.utils.clip_grad_norm_`` does for one process. That function gives each rank of FSDP1 a norm of its own
    shards, fails on DTensors of several meshes, and needs a CPU backend for offloaded gradients; here each rank sums
    the squares of what it holds, divided by the number of ranks that hold the same, and one sum over the ranks ends it.

    Args:
        model: plain, in DDP, with FSDP1 inside, or with DTensor parameters (FSDP2, tensor parallelism); or one that has
            a method ``clip_gradients`` (a pipeline), whose business it then is.
        max_norm: largest norm, above 0.

    Returns:
        The norm before clipping, a scalar on the device that the ranks talk on (so that nothing waits for it).
    """
    if hasattr(model, "clip_gradients"):
        norm: torch.Tensor = cast(Any, model).clip_gradients(max_norm)
        return norm
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" and cast(Any, module).check_is_root():
            own: torch.Tensor = cast(Any, module).clip_grad_norm_(max_norm)  # It alone knows its shards.
            return own
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = _norm(gradients)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)  # torch's own formula, to the same rounding.
    for gradient in gradients:
        held = cast(Any, gradient).to_local() if hasattr(gradient, "to_local") else gradient
        held.mul_(scale.to(held.device, held.dtype))
    return total


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all ranks' shards, float32 or wider, on the device that the ranks talk on."""
    sharded = any(hasattr(gradient, "device_mesh") for gradient in gradients)
    held = [cast(Any, g).to_local() if hasattr(g, "to_local") else g for g in gradients]
    norms = [torch.linalg.vector_norm(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in held]
    if not norms:
        return torch.zeros(())
    if not sharded:
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return whole
    device = next(g.device_mesh.device_type for g in map(_any, gradients) if hasattr(g, "device_mesh"))
    copies = torch.tensor([_copies(gradient) for gradient in gradients], dtype=torch.float64).to(device)
    total = (torch.stack([norm.double().to(device) for norm in norms]) ** 2 / copies).sum()
    dist.all_reduce(total)
    return total.sqrt()


def _copies(gradient: torch.Tensor) -> int:
    """Ranks that hold the same numbers."""
    world = dist.get_world_size()
    if not hasattr(gradient, "device_mesh"):
        return world
    for size, placement in zip(_any(gradient).device_mesh.shape, _any(gradient).placements, strict=True):
        world //= 1 if placement.is_replicate() else size
    return world


def _any(tensor: torch.Tensor) -> Any:
    return tensor
