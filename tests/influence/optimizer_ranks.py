"""A plain loop on this rank of several; started in processes of their own by ``test_optimizer.py``."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.data import get_loader
from cheapertraining.influence import InfluenceAwareOptimizer
from cheapertraining.mixing import MixtureWeightCalculator
from cheapertraining.mixing.agreement import agreed
from tests.influence.plain_run import tiny_model


def train(rank: int, world: int, folder: str, sample: str) -> None:
    """Seven steps; writes the weights, the parameters' sum and what is said where ranks differ."""
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    loader = get_loader(f"{sample}/data.yaml", batch_size=6, lag=2, seed=5)
    model = DistributedDataParallel(tiny_model().eval())
    calculator = MixtureWeightCalculator(model, loader.probes, {"source_samples": 8, "threshold": 1.0})
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = InfluenceAwareOptimizer(sgd, calculator, loader.mixture, 3, learning_rate=1.0, rank=rank)
    for batch in islice(loader, 7):
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = ""
    try:
        agreed({"a": 0.5 + 0.1 * rank, "b": 0.5 - 0.1 * rank}, ("a", "b"))
    except RuntimeError as error:
        said = str(error)
    found = {
        "weights": loader.mixture.get_current_weights(),
        "parameters": float(sum(parameter.double().abs().sum() for parameter in model.parameters())),
        "said": said,
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # not by way of the destructors, where gloo's threads may wait for the interpreter
