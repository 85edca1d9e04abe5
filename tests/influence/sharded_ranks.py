"""What ``test_sharded.py`` computes on one rank of several, and alone; ranks are processes of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank, SourceEstimator, forward_scores
from cheapertraining.influence.model_access import sample_losses, unwrap
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers.forward import check_precision
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.influence.scorers.hook import hook_scores
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer, source_microbatches
from cheapertraining.influence.sharding import Shards, gradient_scale, is_sharded, local
from tests.influence.tiny_llama import Batch, Sources, probe_loader, random_batch, tiny_llama

CASES = {
    "ddp": torch.float64,
    "fsdp": torch.float64,
    "fsdp2": torch.float64,
    "fsdp in float32": torch.float32,
    "fsdp2 in float32": torch.float32,
}
SOURCES = ("a", "b", "c")


def plain(dtype: torch.dtype) -> LlamaForCausalLM:
    """In float32 with Transformers' own norms, which read their weight in another way than torch's."""
    return tiny_llama(dtype=dtype, exact_norms=dtype == torch.float64)


def wrapped(case: str) -> nn.Module:
    model = plain(CASES[case])
    kind = case.split()[0]
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def rows_of(rank: int, world: int) -> Batch:
    """This rank's share of twelve rows; the sources' rows do not divide evenly."""
    batch = {**random_batch(12, 8), "source": torch.tensor([0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0, 0])}
    return {name: value[rank::world] for name, value in batch.items()}


def gathered(model: nn.Module, directions: Directions) -> dict[str, torch.Tensor]:
    shards = Shards(model, select_parameters(model))
    return {name: shards.gather(name, part).clone() for name, part in directions.tensors.items()}


def accumulated(model: nn.Module, directions: Directions, batch: Batch) -> dict[str, torch.Tensor]:
    scorer = MicrobatchScorer(model, directions, SOURCES)
    parts = source_microbatches(batch, 2)
    scorer.begin()
    for number, part in enumerate(parts):
        put_off = isinstance(model, DistributedDataParallel) and number + 1 < len(parts)
        with model.no_sync() if put_off else contextlib.nullcontext():
            sums, tokens = sample_losses(model, part)
            (sums.sum() / 300).backward()
            scorer.mark(int(part["source"][0]), tokens.sum(), 1 / 300)
    found = scorer.collect()
    return {"sums": found.sums, "tokens": found.tokens, "means": found.means}


def results(model: nn.Module, rank: int, world: int) -> dict[str, Any]:
    """Everything there is to compare; scores of this rank's own rows."""
    found = unwatched(model, rank, world)
    directions = found.pop("own directions")
    model.zero_grad()
    return found | watched(model, directions, rows_of(rank, world))


def unwatched(model: nn.Module, rank: int, world: int) -> dict[str, Any]:
    """What needs no look at single layers; with the directions as they lie on this rank."""
    model.eval()
    parameters, batch = select_parameters(model), rows_of(rank, world)
    bank = ProbeBank({"p": probe_loader(), "q": probe_loader(seed=7)}, samples=5, refresh_every=2)
    directions, losses = bank.current(model, 3, parameters, microbatch_size=2)
    look = SourceEstimator(Sources(), {"p": probe_loader()}, probe_samples=5, source_samples=3)
    measured = look.measure(model, update_index=2, microbatch_size=2)
    found = {
        "own directions": directions,
        "directions": gathered(model, directions),
        "state": bank.state_dict()["tensors"],
        "losses": torch.tensor([losses[name].mean for name in ("p", "q")]),
        "difference": forward_scores(model, directions, batch).scores,
        "documents": forward_scores(model, directions, batch, method="central", by="document").scores,
        "look-ahead": torch.from_numpy(measured.scores),
        "look-ahead errors": torch.from_numpy(measured.errors),
        "microbatch": accumulated(model, directions, batch),
    }
    again = ProbeBank({"p": probe_loader(), "q": probe_loader(seed=7)}, samples=5, refresh_every=2)
    again.load_state_dict(bank.state_dict())
    resumed, _ = again.current(model, 4, parameters)
    assert all(torch.equal(part, directions.tensors[name]) for name, part in resumed.tensors.items())
    return found


def watched(model: nn.Module, directions: Directions, batch: Batch) -> dict[str, Any]:
    """Hook and fused; the fused scorer's training gradients too, whole and as a sum over the ranks."""
    hook = hook_scores(model, directions, batch)
    assert all(parameter.grad is None for parameter in model.parameters()) or not is_sharded(unwrap(model))
    model.zero_grad()
    scorer = FusedScorer(model, directions)
    with scorer.armed(batch):
        (sample_losses(model, batch)[0].sum() / 300).backward()
    grads = {
        name: local(p.grad) if p.grad is not None else local(p) * 0 for name, p in select_parameters(model).items()
    }
    scale = gradient_scale(model)
    whole = gathered(model, Directions(("grad",), {name: grad[None] / scale for name, grad in grads.items()}))
    model.zero_grad()
    documents = hook_scores(model, directions, batch, by="document").scores
    return {"hook": hook.scores, "hook documents": documents, "fused": scorer.collect(1 / 300).scores, "grads": whole}


def leaves_no_trace(model: nn.Module) -> None:
    """Gradients, and what hangs on them, are as before: a step half accumulated goes on as if nothing had been."""
    parameters, calls = select_parameters(model.eval()), []
    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(calls.append)
    sample_losses(model, random_batch(2, 1))[0].sum().backward()
    fired = len(calls)
    before = {name: None if p.grad is None else local(p.grad).clone() for name, p in parameters.items()}
    weights = {name: local(p).clone() for name, p in parameters.items()}
    directions, _ = ProbeBank({"p": probe_loader()}).directions(model, 0, parameters)
    forward_scores(model, directions, random_batch(2, 1))
    assert len(calls) == fired
    for name, parameter in select_parameters(model).items():
        assert parameter is parameters[name]
        assert torch.equal(local(parameter), weights[name])
        assert (parameter.grad is None) == (before[name] is None)
        if parameter.grad is not None:
            assert torch.equal(local(parameter.grad), before[name])
    sample_losses(model, random_batch(2, 1))[0].sum().backward()
    for name, parameter in parameters.items():
        if before[name] is not None:
            torch.testing.assert_close(local(parameter.grad), 2 * before[name])


def refusals(model: nn.Module, rank: int) -> dict[str, str]:
    """Each is to end on all ranks with the same words, and not to hang."""
    parameters = select_parameters(model)
    directions, _ = ProbeBank({"p": probe_loader()}, samples=2).directions(model, 0, parameters)

    def marks(sources: list[int]) -> None:
        scorer = MicrobatchScorer(model, directions, SOURCES)
        scorer.begin()
        for source in sources:
            scorer.mark(source, 1)
        scorer.collect()

    attempts = {
        "window": lambda: ProbeBank({"p": probe_loader(3 + rank)}).directions(model, 0, parameters),
        "passes": lambda: ProbeBank({"p": probe_loader()}).directions(model, 0, parameters, 1 + rank),
        "marks": lambda: marks([0] * (1 + rank)),
        "sources": lambda: marks([0, rank]),
        "jvp": lambda: forward_scores(model, directions, random_batch(1, 0), method="jvp"),
        "put off": lambda: put_off(model, directions),
    }
    return refused(attempts)


def put_off(model: nn.Module, directions: Directions) -> None:
    """Gradients that FSDP has not reduced yet, between the microbatches of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
    with model.no_sync() if isinstance(model, FullyShardedDataParallel) else contextlib.nullcontext():
        scorer = MicrobatchScorer(model, directions, SOURCES)
        scorer.begin()
        scorer.mark(0, 1)


def wrappings() -> dict[str, str]:
    """Ways to spread a model that influence does not measure."""
    half = torch.bfloat16
    cpu: dict[str, Any] = {"device_id": torch.device("cpu")}
    spread = tiny_llama()
    head = spread.model.layers[0].mlp.down_proj
    head.weight = nn.Parameter(distribute_tensor(head.weight.data, init_device_mesh("cpu", (2,)), [Shard(0)]))
    models = {
        "flat": FullyShardedDataParallel(tiny_llama(), use_orig_params=False, **cpu),
        "tensor parallel": spread,
        "fsdp in half": FullyShardedDataParallel(
            plain(torch.float32), use_orig_params=True, mixed_precision=MixedPrecision(param_dtype=half), **cpu
        ),
        "fsdp2 in half": fully_shard(plain(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=half)),
    }

    def attempt(model: nn.Module) -> None:
        unwrap(model)
        check_precision(model)

    return refused({name: partial(attempt, model) for name, model in models.items()})


def refused(attempts: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except UserError as error:
            found[name] = str(error)
    return found


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for case in CASES:
        found[case] = results(wrapped(case), rank, world)
        leaves_no_trace(wrapped(case))
        found[case]["scale"] = gradient_scale(wrapped(case))
    found["refusals"] = {case: refusals(wrapped(case), rank) for case in ("ddp", "fsdp", "fsdp2")}
    found["wrappings"] = wrappings()
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    # Not by way of the destructors: torch's reducer may wait there, holding the interpreter's lock, for a thread of
    # gloo that needs it.
    os._exit(0)
