"""Clipping and early stopping on this rank of several; started in processes of their own by the tests beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from cheapertraining.training import PlateauEarlyStopping, ZClip


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def clipped(model: nn.Module, share: float = 1.0) -> list[tuple[float, float, bool]]:
    """Raw norm, clipped norm and whether they differ, of ordinary steps and a spike; then the norm that is left."""
    zclip = ZClip(warmup_steps=4)
    found = []
    for scale in (1.0, 1.2, 0.9, 1.1, 1.0, 300.0):
        inputs = torch.linspace(-1, 1, 24).view(4, 6)
        model.zero_grad()
        (share * scale * model(inputs).square().mean()).backward()
        stats = zclip.clip(model)
        found.append((stats.raw_norm, stats.clipped_norm, stats.was_clipped))
    again = ZClip().clip(model).raw_norm
    return [*found, (again, again, True)]


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    sharded = make_model()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    flat = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    # Ranks differ: alone, rank 1 would stop a step earlier.
    stopping = PlateauEarlyStopping(patience=1, min_delta=0.1, min_evals=1, rank=rank)
    metrics = ((2.0, 2.0), (1.0, 2.0), (2.0, 2.0))
    found = {
        "fsdp2": clipped(sharded, share=1 / world),  # on a CPU, FSDP2 adds gradients up and does not average them
        "fsdp1": clipped(flat),
        "stops": [stopping.check(each[rank], step) for step, each in enumerate(metrics)],
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # not by way of the destructors, where gloo's threads may wait for the interpreter
