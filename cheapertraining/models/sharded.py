"""A causal language model spread over the ranks, whose weights no rank but the first ever holds whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from cheapertraining.config import ParallelismConfig
from cheapertraining.distributed.fsdp import shard_with_fsdp
from cheapertraining.distributed.fsdp2 import checkpoint_blocks, compile_blocks, shard_with_fsdp2
from cheapertraining.distributed.gloo import mend_fsdp2_on_gloo
from cheapertraining.distributed.parallelism import Layout, build_mesh
from cheapertraining.distributed.tensor_parallel import apply_tensor_parallel
from cheapertraining.errors import UserError
from cheapertraining.models.causal_lm import CausalLM

__all__ = ["build_shell", "build_spread", "fill_buffers", "spread_on_meta"]


def build_spread(
    build: Callable[[], CausalLM], layout: Layout, settings: ParallelismConfig, precision: str, device: torch.device
) -> CausalLM:
    """Build a model as ``settings`` say, the same numbers as ``build`` gives; a collective call where ranks share it.

    Under FSDP2 and tensor parallelism ``build`` is called on rank 0 alone; all ranks make the model on the meta device,
    cut it, allocate their parts, and get rank 0's numbers, parameter by parameter.

    Args:
        build: makes the whole model on the CPU; the same on every rank.
        layout: sizes of the mesh; the process group exists already unless there is one process and nothing to cut.
        settings: of the run.
        precision: resolved: ``"fp32"``, ``"amp_bf16"`` or ``"amp_fp16"``.
        device: of this rank.

    Raises:
        UserError: on every rank: ``build``'s own, or the layout does not suit the model.
    """
    if layout.engine != "fsdp2":
        model = build()
        _prepare_blocks(model, settings)
        if layout.engine == "fsdp":
            options = settings.fsdp
            assert options is not None
            mesh = _data_mesh(build_mesh(layout, device.type), layout)
            model.model = shard_with_fsdp(
                model.model,
                model.blocks,
                mesh,
                device,
                precision=precision,
                mixed=options.mixed_precision,
                cpu_offload=options.cpu_offload,
            )
        return model
    mend_fsdp2_on_gloo()
    source, shell = build_shell(build)
    model = spread_on_meta(shell, layout, build_mesh(layout, device.type), settings, precision)
    offloaded = settings.fsdp2 is not None and settings.fsdp2.cpu_offload
    _fill(model.model, None if source is None else source.model, torch.device("cpu") if offloaded else device, device)
    return model


def spread_on_meta(
    model: CausalLM, layout: Layout, mesh: DeviceMesh, settings: ParallelismConfig, precision: str
) -> CausalLM:
    """Cut a model on the meta device, in place; what a rank would allocate is ``parameter.to_local()``.

    Raises:
        UserError: the layout does not suit the model.
    """
    model.mesh = mesh
    if settings.tp is not None:
        apply_tensor_parallel(model.model, mesh["tensor_parallel"])
        model.vocabulary_group = mesh["tensor_parallel"].get_group()
    _prepare_blocks(model, settings)
    options = settings.fsdp2
    shard_with_fsdp2(
        model.model,
        model.blocks,
        _data_mesh(mesh, layout),
        precision=precision,
        mixed="DEFAULT" if options is None else options.mixed_precision,
        reshard_after_forward=options is None or options.reshard_after_forward,
        cpu_offload=options is not None and options.cpu_offload,
    )
    return model


def _prepare_blocks(model: CausalLM, settings: ParallelismConfig) -> None:
    if not model.blocks and (settings.activation_checkpointing or settings.compile_blocks or settings.fsdp2):
        raise UserError(
            f"parallelism: {type(model.model).__name__} has no list of decoder blocks to cut by. Use "
            "compose.distributed=ddp."
        )
    if settings.activation_checkpointing:
        checkpoint_blocks(model.model, model.blocks)
    if settings.compile_blocks:
        compile_blocks(model.blocks)


def _data_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The dimensions that data parallelism cuts by: shards, and replicas of them where there are several."""
    if layout.replicate > 1:
        return mesh["data_parallel_replicate", "data_parallel_shard"]
    return mesh["data_parallel_shard"]


def build_shell(build: Callable[[], CausalLM]) -> tuple[CausalLM | None, CausalLM]:
    """The model with its numbers (rank 0 only), and one of the same kind on the meta device; a collective call.

    Raises:
        UserError: ``build``'s, on every rank, so that none waits for the first.
    """
    told: list[Any] = [None]
    source = None
    if dist.get_rank() == 0:
        try:
            source = build()
            told = [(type(source.model), source.model.config, source.isolation)]
        except UserError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], UserError):
        raise told[0]
    kind, config, isolation = told[0]
    with torch.device("meta"):
        return source, CausalLM(kind(config), isolation)


def _fill(model: nn.Module, source: nn.Module | None, held_on: torch.device, device: torch.device) -> None:
    """Allocate a cut model's parts and give them, and its buffers, the numbers of rank 0's ``source``."""
    model.to_empty(device=held_on)
    full = {} if source is None else source.state_dict()
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    fill_buffers(model, source, device)


def fill_buffers(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Give the buffers of a model the numbers that rank 0's ``source`` has; a collective call.

    Args:
        model: with the same buffers on all ranks, of the right shapes.
        source: the model on rank 0, None on the others.
        device: where the buffers go.
    """
    found = {} if source is None else dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        sent = buffer if source is None else found[_plain(name)].to(device)
        sent = sent.to(device)
        dist.broadcast(sent, src=0)
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], sent)
        # Rotary embeddings of transformers keep a second reference to the buffer they began with.
        if isinstance(getattr(owner, f"original_{name.rpartition('.')[2]}", None), torch.Tensor):
            setattr(owner, f"original_{name.rpartition('.')[2]}", sent)


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")
