"""What ``test_preconditioned_ranks.py`` computes on one rank of several, and alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.model_access import sample_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners import EKFAC, DataInf, GGNConjugateGradient, Preconditioner, Schedule
from cheapertraining.influence.sharding import Shards
from tests.influence.sharded_ranks import wrapped
from tests.influence.tiny_llama import Batch, random_batch, tiny_llama

CASES = ("ddp", "fsdp", "fsdp2")


def batches_of(rank: int, world: int) -> list[Batch]:
    return [{name: rows[rank::world] for name, rows in random_batch(8, seed).items()} for seed in (1, 2)]


def applied(
    model: nn.Module, preconditioner: Preconditioner, whole: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole directions, to each rank's shards, through the preconditioner, and back."""
    shards = Shards(model, select_parameters(model))
    u = Directions(("p", "q"), {name: shards.scatter(name, part) for name, part in whole.items()})
    found = preconditioner.apply(u)
    for name, part in found.tensors.items():
        assert part.shape == u.tensors[name].shape
    return {name: shards.gather(name, part).clone() for name, part in found.tensors.items()}


def results(model: nn.Module, rank: int, world: int, *, sharded: bool) -> dict[str, dict[str, torch.Tensor]]:
    model.eval()
    parameters, batches = select_parameters(model), batches_of(rank, world)
    shards = Shards(model, parameters)
    generator = torch.Generator().manual_seed(4)
    whole = {}
    for name, parameter in parameters.items():
        held = shards.gather(
            name, parameter.detach()[None].to_local() if hasattr(parameter, "to_local") else parameter[None]
        )
        whole[name] = torch.randn(2, *held.shape[1:], generator=generator, dtype=torch.float64)
    kept = EKFAC(parameters, schedule=Schedule(fraction=1.0, first=1, lag=1))
    for batch in [*batches, *batches]:
        with kept.observing(model, batch, loss_scale=0.1):
            (sample_losses(model, batch)[0].sum() * 0.1).backward()
        model.zero_grad()
    found = {
        "kept": applied(model, kept, whole),
        "datainf": applied(model, DataInf(parameters).fit(model, batches), whole),
        "ekfac": applied(model, EKFAC(parameters, labels="given").fit(model, batches), whole),
    }
    if not sharded:
        solver = GGNConjugateGradient(parameters, damping=100.0, tolerance=1e-9).fit(model, batches)
        found["ggn_cg"] = applied(model, solver, whole)
    return found


def refusals(rank: int) -> list[str]:
    """Each is to end on all ranks with the same words, and not to hang."""
    model, found = tiny_llama(), []
    parameters, batch = select_parameters(model), random_batch(2, 1)
    masked = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for kind in (DataInf, EKFAC):
        for batches in ([batch] * (1 + rank), [masked]):
            try:
                kind(parameters).fit(model, batches)
            except UserError as error:
                found.append(str(error))
    return found


def solved_with_a_masked_batch(rank: int) -> dict[str, torch.Tensor]:
    """One rank's second batch counts nothing; the other's does."""
    model = tiny_llama().eval()
    parameters, batches = select_parameters(model), batches_of(rank, 2)
    if rank == 0:
        batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    directions = Directions(("u",), {name: torch.ones_like(p.detach())[None] for name, p in parameters.items()})
    return GGNConjugateGradient(parameters, damping=100.0).fit(model, batches).apply(directions).tensors


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {case: results(wrapped(case), rank, world, sharded=case != "ddp") for case in CASES}
    saved = {"found": found, "refusals": refusals(rank), "masked": solved_with_a_masked_batch(rank)}
    torch.save(saved, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # see two_ranks.py
