"""What the tests beside it compute on one rank of two, all in one process group; started by ``test_layouts.py``."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cheapertraining.config import FSDP2Config, ParallelismConfig, TensorParallelConfig
from cheapertraining.distributed.agreement import check_alike
from cheapertraining.distributed.clipping import clip_gradient_norm
from cheapertraining.distributed.parallelism import Layout, build_mesh
from cheapertraining.distributed.tensor_parallel import apply_tensor_parallel
from cheapertraining.errors import UserError
from cheapertraining.models import CausalLM
from cheapertraining.models.sharded import build_spread
from tests.influence.tiny_llama import Batch
from tools.bench._layouts import config_of, resume_from, run_once

LAYOUTS = ("ddp", "fsdp", "fsdp2", "hsdp", "tp")
SGD = ("fsdp2", "tp")
STEPS, SAVED_AT, RESUMED_TO = 6, 4, 6
RING = {"fsdp": "ddp", "fsdp2": "fsdp", "tp": "hsdp", "ddp": "tp"}
"""Who goes on from whose checkpoint."""
MEASURED = ("fsdp2", "hsdp")
"""Layouts that influence is measured under, by forward passes and then by a backward pass; FSDP1 is seen in
``tests/influence/test_sharded.py``."""

_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, **_STILL)),
}
WAYS: dict[str, ParallelismConfig] = {
    "tp": ParallelismConfig(tp=TensorParallelConfig()),
    "fsdp2": ParallelismConfig(fsdp2=FSDP2Config()),
    "fsdp2, activations again": ParallelismConfig(fsdp2=FSDP2Config(), activation_checkpointing=True),
    "fsdp2, on the host": ParallelismConfig(fsdp2=FSDP2Config(cpu_offload=True, reshard_after_forward=False)),
}


def checkpoint_of(runs: Path, run: str, batch: int) -> Path:
    """A run's checkpoint after ``batch`` batches, whichever its format."""
    return next((runs / run / "checkpoints").glob(f"ep0-ba{batch}*"))


def work(path: Path, measuring: Path, folder: Path) -> None:
    """Everything, on this rank."""
    runs, rank = path.parent / "runs", dist.get_rank()
    for layout in LAYOUTS:
        steps = (f"run_name={layout}-adamw", f"max_duration={STEPS}ba", f"save_interval={SAVED_AT}ba")
        background = ["parallelism.async_save=true"] if layout == "tp" else []
        _keep(run_once(config_of(path, layout, *steps, *background)), folder, f"{layout}-adamw")
    for layout in SGD:
        steps = (f"run_name={layout}-sgd", f"max_duration={STEPS}ba")
        _keep(run_once(config_of(path, layout, *steps), "sgd"), folder, f"{layout}-sgd")
    for layout, source in [*RING.items(), ("fsdp2", "alone")]:
        name = f"{layout}-from-{source}"
        if rank == 0:
            resume_from(path, name, checkpoint_of(runs, f"{source}-adamw", SAVED_AT))
        dist.barrier()
        resumed = ("autoresume=true", f"run_name={name}", f"max_duration={RESUMED_TO}ba")
        _keep(run_once(config_of(path, layout, *resumed)), folder, name)
    for layout in MEASURED:
        for scorer in ("forward", "hook"):
            measured = (f"run_name={layout}-{scorer}", f"algorithms.online_mixing.influence.scorer={scorer}")
            run_once(config_of(measuring, layout, *measured))
    found = {"gradients": gradients(), "refusals": refusals(), "dtypes": dtypes(), "two dtypes": two_dtypes()}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def _keep(outcome: Any, folder: Path, name: str) -> None:
    if dist.get_rank() == 0:
        torch.save(vars(outcome), folder / f"{name}.pt")


def ragged_batch() -> Batch:
    """Four rows of two documents each, and of different numbers of tokens that count."""
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    labels, positions = ids.clone(), torch.arange(16).repeat(4, 1)
    positions[:, 7:] -= 7
    labels[:, [0, 7]] = -100
    labels[2, 5:] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def gradients() -> dict[str, list[float]]:
    """Of each model under each way: largest relative errors of a gradient, of the norm, and of the norm clipped to."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        whole = CausalLM(make())
        batch = ragged_batch()
        whole.loss(whole(batch), batch).backward()
        expected = {key: parameter.grad.clone() for key, parameter in whole.named_parameters()}
        norm = float(torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5))
        for way, settings in WAYS.items():
            tensor = 2 if settings.tp is not None else 1
            layout = Layout("fsdp2", 1, 2 // tensor, tensor)
            cut = build_spread(lambda whole=whole: copy.deepcopy(whole), layout, settings, "fp32", torch.device("cpu"))
            mine = batch if tensor == 2 else {key: value[dist.get_rank() :: 2] for key, value in batch.items()}
            share = (mine["labels"] != -100).sum() / (batch["labels"] != -100).sum() * layout.data
            (cut.loss(cut(mine), mine) * share).backward()
            errors = [gradient_error(cut, expected)]
            for wanted in (norm, 0.5):
                errors.append(abs(float(clip_gradient_norm(cut, 0.5)) / wanted - 1))
            found[f"{name}, {way}"] = errors
    return found


def two_dtypes() -> list[float]:
    """Largest relative errors of the gradients of two cut models of one shape in two dtypes, used in turns."""
    mesh = build_mesh(Layout("fsdp2", 1, 1, 2), "cpu")["tensor_parallel"]
    batch, pairs = ragged_batch(), []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        whole = CausalLM(MODELS["tied llama"]().to(dtype))
        whole.loss(whole(batch), batch).backward()
        expected = {key: parameter.grad.clone() for key, parameter in whole.named_parameters()}
        whole.zero_grad()
        apply_tensor_parallel(whole.model, mesh)
        whole.vocabulary_group = mesh.get_group()
        pairs.append((whole, expected))
    losses = [cut.loss(cut(batch), batch) for cut, _ in pairs]
    for loss in losses:
        loss.backward()
    return [gradient_error(cut, expected) for cut, expected in pairs]


def dtypes() -> dict[str, list[str]]:
    """Of a weight as it multiplies, and of its gradient, by the kind of mixed precision."""
    found = {}
    for kind in ("DEFAULT", "PURE", "FULL"):
        settings = ParallelismConfig(fsdp2=FSDP2Config(mixed_precision=kind))  # type: ignore[arg-type]
        cut = build_spread(
            lambda: CausalLM(MODELS["llama"]()), Layout("fsdp2", 1, 2, 1), settings, "amp_bf16", torch.device("cpu")
        )
        seen: list[str] = []
        projection = cut.get_submodule("model.model.layers.0.mlp.up_proj")
        projection.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(str(module.weight.dtype)))
        batch = ragged_batch()
        cut.loss(cut(batch), batch).backward()
        found[kind] = [*seen, str(projection.weight.grad.dtype)]
    return found


def gradient_error(cut: nn.Module, expected: Mapping[str, torch.Tensor]) -> float:
    errors = []
    for name, parameter in cut.named_parameters():
        gradient: Any = parameter.grad
        wanted = expected[name.replace("_checkpoint_wrapped_module.", "")]
        errors.append(float((gradient.full_tensor() - wanted).abs().max() / wanted.abs().max()))
    return max(errors)


def refusals() -> dict[str, str]:
    """Each ends on both ranks with the same words."""
    layout = Layout("fsdp2", 1, 1, 2)
    mesh = build_mesh(layout, "cpu")["tensor_parallel"]
    neox = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    odd = {**_SMALL, "vocab_size": 63}
    rank = dist.get_rank()

    def failing() -> CausalLM:
        raise UserError("rank 0 could not build it")

    def cut(model: nn.Module) -> Callable[[], object]:
        return lambda: apply_tensor_parallel(model, mesh)

    attempts: dict[str, Callable[[], object]] = {
        "plan": cut(GPTNeoXForCausalLM(neox)),
        "dropout": cut(GPT2LMHeadModel(GPT2Config(**_GPT2))),
        "vocabulary": cut(LlamaForCausalLM(LlamaConfig(**odd))),
        "build": lambda: build_spread(failing, layout, WAYS["tp"], "fp32", torch.device("cpu")),
        "config": lambda: check_alike({"config": f"seed: 1\noptimizer:\n  lr: {rank}\n"}),
        "versions": lambda: check_alike({"config": "seed: 1", "torch": f"2.{rank}"}),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except UserError as error:
            found[name] = str(error)
    return found
