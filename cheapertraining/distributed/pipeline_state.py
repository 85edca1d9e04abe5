"""Checkpoints and gradient norms of a model that is spread over ranks in stages, each with other parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from cheapertraining.errors import UserError

__all__ = ["clip_across_stages", "gather_stages", "load_stages"]

State = dict[str, Any]


def clip_across_stages(model: nn.Module, max_norm: float, duplicates: Collection[str] = ()) -> Tensor:
    """Scale all gradients in place so that the Euclidean norm over all ranks together is at most ``max_norm``.

    Args:
        model: this rank's stages.
        max_norm: largest norm, above 0.
        duplicates: names of parameters whose gradients another rank has too, and counts.

    Returns:
        The norm before clipping, a scalar.
    """
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    device = next(model.parameters()).device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for name, gradient in named:
        if name not in duplicates:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            squares += torch.linalg.vector_norm(gradient, dtype=wide).double() ** 2
    dist.all_reduce(squares)
    total = squares.sqrt()
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)  # torch's own formula, to the same rounding
    for _, gradient in named:
        gradient.mul_(scale.to(gradient.dtype))
    return total


def gather_stages(model: nn.Module, optimizer: Optimizer, duplicates: Collection[str] = ()) -> tuple[State, State]:
    """State dicts of the whole model and its optimizer, as one process has them; a collective call.

    Args:
        model: this rank's stages, named as in the whole model.
        optimizer: over them.
        duplicates: this rank's parameters that stand for one of another rank; the optimizer's state knows only that.

    Returns:
        ``(model, optimizer)`` on rank 0, in host memory; two empty ones on the others.
    """
    own: State = get_optimizer_state_dict(model, optimizer)
    states = {name: entry for name, entry in own["state"].items() if name not in duplicates}
    flat = {f"{name}\n{key}": value for name, entry in states.items() for key, value in entry.items()}
    groups = [
        group | {"params": [name for name in group["params"] if name not in duplicates]}
        for group in own["param_groups"]
    ]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, groups)
    weights: State = get_model_state_dict(model)
    whole = _collect(weights)
    moments = _collect(flat)
    if dist.get_rank() != 0:
        return {}, {}
    state: State = {}
    for name, value in moments.items():
        parameter, key = name.split("\n")
        state.setdefault(parameter, {})[key] = value
    merged = [
        first | {"params": [name for rank in told for name in rank[number]["params"]]}
        for number, first in enumerate(told[0])
    ]
    return whole, {"state": state, "param_groups": merged}


def load_stages(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer, aliases: Mapping[str, str], sharded: bool
) -> None:
    """Load what this rank has of a checkpoint into its stages and their optimizer, in place; a collective call.

    Args:
        checkpoint: of any layout; a file, or a folder of shards.
        model: this rank's stages.
        optimizer: over them.
        aliases: for parameters that one process has under another name: that name.
        sharded: whether it is a folder.

    Raises:
        UserError: it was saved with another kind of optimizer.
    """
    weights: State = get_model_state_dict(model)
    own: State = get_optimizer_state_dict(model, optimizer)
    moments = {name: {key: _empty(value) for key, value in entry.items()} for name, entry in own["state"].items()}
    source = {name: aliases.get(name, name) for name in moments}
    if sharded:
        wanted: State = {"model": weights, "optimizer": {"state": {source[name]: moments[name] for name in moments}}}
        try:
            load(wanted, checkpoint_id=checkpoint)
        except Exception as error:  # of DCP, which wraps what it does not find
            if "Missing key" not in str(error):
                raise
            raise _other_optimizer(checkpoint) from error
    else:
        content = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["state"]
        saved = next(iter(content["optimizers"].values()))["state"]
        for name, tensor in weights.items():
            tensor.copy_(content["model"][name])
        for name, entry in moments.items():
            if entry.keys() - saved.get(source[name], {}).keys():
                raise _other_optimizer(checkpoint)
            for key in entry:
                entry[key] = saved[source[name]][key]
    set_model_state_dict(model, weights)
    loaded: State = {"state": moments, "param_groups": own["param_groups"]}
    set_optimizer_state_dict(model, optimizer, loaded)


def _other_optimizer(checkpoint: Path) -> UserError:
    return UserError(f"{checkpoint}: saved with another optimizer than this run's. Use that optimizer.")


def _empty(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value


def _collect(mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks, on rank 0 in host memory; one at a time goes over the wire."""
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, {name: (tuple(value.shape), value.dtype) for name, value in mine.items()})
    rank = dist.get_rank()
    wire = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    found = {name: value.detach().cpu().clone() for name, value in mine.items()} if rank == 0 else {}
    for owner, described in enumerate(shapes):
        for name, (shape, dtype) in described.items() if owner else ():
            if rank == owner:
                dist.send(mine[name].detach().to(wire).contiguous(), 0)
            elif rank == 0:
                received = torch.empty(shape, dtype=dtype, device=wire)
                dist.recv(received, owner)
                found[name] = received.cpu()
    return found
