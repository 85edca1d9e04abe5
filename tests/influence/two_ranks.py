"""One measurement on this rank of several; started in processes of their own by ``test_ranks.py``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.influence import SourceEstimator
from tests.influence.tiny_llama import Sources, probe_loader, tiny_llama


def measure(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = DistributedDataParallel(tiny_llama().train())
    # 5 probe samples and 9 source samples do not divide by 2: the padding rows must not count.
    look = SourceEstimator(Sources(), {"p": probe_loader()}, probe_samples=5, source_samples=3)
    found = [look.measure(model, update_index=update, microbatch_size=2) for update in range(2)]
    assert all(parameter.grad is None for parameter in model.parameters())
    np.savez(
        Path(folder) / f"rank{rank}.npz",
        scores=np.stack([each.scores for each in found]),
        errors=np.stack([each.errors for each in found]),
        losses=np.stack([each.probe_losses for each in found]),
        changes=found[1].probe_changes,
    )
    dist.barrier()
    # Not by way of the destructors: torch's reducer may wait there, holding the interpreter's lock, for a thread of
    # gloo that needs it.
    os._exit(0)
