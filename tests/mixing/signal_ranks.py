"""What ``test_signal_ranks.py`` measures on one rank of several, and alone; ranks are processes of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cheapertraining.influence import ProbeBank, SourceEstimator
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.scorers.accumulation import MicrobatchEstimator
from cheapertraining.influence.scorers.gram import GradientEstimator
from cheapertraining.influence.scorers.microbatch import source_microbatches
from tests.influence.sharded_ranks import SOURCES, plain, rows_of, wrapped
from tests.influence.tiny_llama import Sources, probe_loader

CASES = ("ddp", "fsdp2", "fsdp2 in float32")
HALF = "fsdp2 in half"


def moments(model: nn.Module) -> dict[str, torch.Tensor]:
    """GRAM and PROBE_LOSSES; sample counts that two ranks do not divide."""
    found = GradientEstimator(Sources(), 3).measure(model, update_index=1, microbatch_size=4)
    losses = ProbeBank({"p": probe_loader(), "q": probe_loader(seed=7)}, samples=5).losses(model, 1, 2)
    values = {name: getattr(found, name) for name in ("products", "errors", "squared_norms", "variances")}
    return {name: torch.from_numpy(value) for name, value in values.items()} | {
        "probe losses": torch.tensor([losses[name].mean for name in ("p", "q")], dtype=torch.float64)
    }


def influence(model: nn.Module, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Cosine by source, and scores of training's own microbatches with a state in between."""
    probes = {"p": probe_loader()}
    options: dict[str, Any] = {"probe_samples": 5, "layers": "last_1"}
    look = SourceEstimator(Sources(), probes, metric="cosine", scorer="hook", source_samples=3, **options)
    cosine = look.measure(model, update_index=1, microbatch_size=2)
    first, second = (MicrobatchEstimator(SOURCES, probes, **options) for _ in range(2))
    first.prepare(model, microbatch_size=2)
    train(model, first, rank, world)
    second.load_state_dict(first.state_dict())
    second.resume(model)
    train(model, second, rank, world)
    own = second.measure(model, update_index=1, microbatch_size=2)
    model.zero_grad()
    return {
        "cosine": torch.from_numpy(cosine.scores),
        "microbatch": torch.from_numpy(own.scores),
        "microbatch errors": torch.from_numpy(own.errors),
    }


def train(model: nn.Module, estimator: MicrobatchEstimator, rank: int, world: int) -> None:
    model.zero_grad()
    estimator.begin_batch()
    for part in source_microbatches(rows_of(rank, world), 2):
        estimator.begin_pass()
        sums, tokens = sample_losses(model, part)
        (sums.sum() / 300).backward()
        estimator.mark(part["source"], tokens.sum(), torch.tensor(1 / 300))
    estimator.end_batch()


def results(model: nn.Module, rank: int, world: int) -> dict[str, torch.Tensor]:
    model.eval()
    return moments(model) | influence(model, rank, world)


def in_half() -> nn.Module:
    model = plain(torch.float32).eval()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {case: results(wrapped(case), rank, world) for case in CASES}
    found[HALF] = moments(in_half())
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # As in sharded_ranks.
