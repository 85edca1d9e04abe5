"""Tensor parallelism of decoder-only models of transformers, with sequence parallelism between the layers.

Columns of the first matrices and rows of the second are cut across ranks (Megatron-LM, arXiv 1909.08053); between them,
where each rank would repeat the same norms and additions, the sequence is cut instead (arXiv 2205.05198). Embedding and
head are cut along the vocabulary. Every parameter becomes a DTensor on the tensor dimension of the mesh, replicated
where it is not cut, so that FSDP2 can cut each of them once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cheapertraining.errors import UserError

__all__ = ["PLANNED", "apply_tensor_parallel"]

Plan = dict[str, ParallelStyle]


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a model of transformers across the ranks of ``mesh``, in place; its logits are then cut by vocabulary.

    Afterwards the model takes the same inputs on all ranks of the mesh and returns logits ``[B, S, V / n]``, for
    :func:`~cheapertraining.distributed.vocabulary.vocabulary_parallel_token_losses`. On the meta device nothing is
    allocated.

    Args:
        model: with a language-modelling head, not wrapped in anything yet.
        mesh: of one dimension.

    Raises:
        UserError: there is no plan for the architecture, a size cannot be divided, or the model drops out activations.
    """
    config = cast(Any, model).config
    if config.model_type not in PLANNED:
        raise UserError(
            f"parallelism.tp: no tensor parallel plan for {type(model).__name__} (model_type '{config.model_type}'); "
            f"there are plans for {', '.join(sorted(PLANNED))}. Use compose.distributed=fsdp2."
        )
    _check_divisible(model, mesh.size())
    _check_no_dropout(model)
    tied = cast(Any, model).get_input_embeddings().weight is cast(Any, model).get_output_embeddings().weight
    parallelize_module(model, mesh, PLANNED[config.model_type](model, mesh), src_data_rank=None)
    if tied:
        # Each of the two modules has had it replaced by a DTensor of its own; both are cut along the vocabulary.
        cast(Any, model).get_output_embeddings().weight = cast(Any, model).get_input_embeddings().weight
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise UserError(
            f"parallelism.tp: the plan of model_type '{config.model_type}' does not say what to do with {left[0]} "
            f"({len(left)} such parameters). Use compose.distributed=fsdp2."
        )


def _check_divisible(model: nn.Module, ranks: int) -> None:
    config = cast(Any, model).config
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "intermediate_size": getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None),
        "vocab_size": cast(Any, model).get_input_embeddings().weight.shape[0],
    }
    for name, size in sizes.items():
        if size is not None and size % ranks:
            raise UserError(
                f"parallelism.tp.tensor_parallel_degree: {ranks} does not divide the model's {name} ({size}). Use "
                "another degree, or change the model."
            )


def _check_no_dropout(model: nn.Module) -> None:
    config = cast(Any, model).config
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0.0):
            raise UserError(
                f"parallelism.tp: the model's configuration has {name}={getattr(config, name)}; ranks would drop "
                "different parts of what they share. Set it to 0 in the model's config.json, or use "
                "compose.distributed=fsdp2."
            )


# ---- plans -------------------------------------------------------------------------------------------------
def _llama_plan(model: nn.Module, mesh: DeviceMesh) -> Plan:
    """Llama, Mistral, Qwen2 and Qwen3: ``model.layers.N.{self_attn,mlp}`` with separate projections."""
    del mesh
    plan: Plan = {
        "model.embed_tokens": _VocabularyEmbedding(),
        "model.layers.0": _cut_sequence(),
        "model.norm": SequenceParallel(),
        "lm_head": _vocabulary_columns(),
    }
    layers = cast(nn.ModuleList, model.get_submodule("model.layers"))
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{number}"
        plan |= {
            f"{prefix}.input_layernorm": SequenceParallel(),
            f"{prefix}.post_attention_layernorm": SequenceParallel(),
            f"{prefix}.self_attn": _gather_sequence(),
            f"{prefix}.mlp": _gather_sequence(),
        }
        plan |= {f"{prefix}.self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {f"{prefix}.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan |= {f"{prefix}.{name}": _rows() for name in ("self_attn.o_proj", "mlp.down_proj")}
        if hasattr(layer.self_attn, "q_norm"):  # Qwen3 norms each head: [B, S, heads, head size], cut along the heads.
            heads = SequenceParallel(sequence_dim=2, use_local_output=True)
            plan |= {f"{prefix}.self_attn.{name}": heads for name in ("q_norm", "k_norm")}
    return plan


def _gpt2_plan(model: nn.Module, mesh: DeviceMesh) -> Plan:
    """GPT-2: ``transformer.h.N`` with ``Conv1D`` (weights ``[in, out]``), one for queries, keys and values."""
    plan: Plan = {
        "transformer.wte": _VocabularyEmbedding(),
        "transformer.wpe": _ReplicatedEmbedding(),
        "transformer.h.0": _cut_sequence(),
        "transformer.ln_f": SequenceParallel(),
        "lm_head": _vocabulary_columns(),
    }
    for number, block in enumerate(cast(nn.ModuleList, model.get_submodule("transformer.h"))):
        prefix = f"transformer.h.{number}"
        block.attn.split_size //= mesh.size()  # Where the local part of the fused output is split into three.
        plan |= {
            f"{prefix}.ln_1": SequenceParallel(),
            f"{prefix}.ln_2": SequenceParallel(),
            f"{prefix}.attn": _gather_sequence(),
            f"{prefix}.mlp": _gather_sequence(),
            f"{prefix}.attn.c_attn": _Conv1DColumns(fused=3),
            f"{prefix}.attn.c_proj": _Conv1DRows(),
            f"{prefix}.mlp.c_fc": _Conv1DColumns(),
            f"{prefix}.mlp.c_proj": _Conv1DRows(),
        }
    return plan


PLANNED: dict[str, Callable[[nn.Module, DeviceMesh], Plan]] = {
    "llama": _llama_plan,
    "mistral": _llama_plan,
    "qwen2": _llama_plan,
    "qwen3": _llama_plan,
    "gpt2": _gpt2_plan,
}
"""Plans by the ``model_type`` of transformers."""


def _vocabulary_columns() -> ParallelStyle:
    return ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1))


def _rows() -> ParallelStyle:
    return RowwiseParallel(output_layouts=Shard(1))


def _cut_sequence() -> ParallelStyle:
    return _HiddenStates(Replicate(), Shard(1), local=True)


def _gather_sequence() -> ParallelStyle:
    return _HiddenStates(Shard(1), Replicate())


# ---- styles that torch does not have -----------------------------------------------------------------------
class _HiddenStates(ParallelStyle):
    """Redistributes what a module takes first, or as ``hidden_states``; torch's style wants every argument named."""

    def __init__(self, found: Placement, wanted: Placement, local: bool = False) -> None:
        self.found, self.wanted, self.local = found, wanted, local

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def move(hidden: Any) -> Any:
            if not isinstance(hidden, DTensor):
                hidden = DTensor.from_local(hidden, device_mesh, [self.found], run_check=False)
            hidden = hidden.redistribute(device_mesh, [self.wanted])
            return hidden.to_local() if self.local else hidden

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": move(kwargs["hidden_states"])}
            return (move(args[0]), *args[1:]), kwargs

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class _VocabularyEmbedding(ParallelStyle):
    """A lookup in a table whose rows are cut across the ranks; the whole sequence comes out on each, ``[B, S, H]``,
    since masks and rotary angles are made from its shape (the first layer cuts it).

    Torch 2.7's own keeps the mask of a lookup by the shape of the table, and fails where student and teacher have
    tables of one shape in two dtypes.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def forward(indices: torch.Tensor) -> torch.Tensor:
            rows = cast(DTensor, module.weight).to_local()
            local = indices - device_mesh.get_local_rank() * rows.shape[0]
            here = (local >= 0) & (local < rows.shape[0])
            found = nn.functional.embedding(torch.where(here, local, 0), rows) * here[..., None]
            part = DTensor.from_local(found, device_mesh, [Partial()], run_check=False)
            return part.redistribute(device_mesh, [Replicate()]).to_local()

        module.forward = forward
        return distribute_module(module, device_mesh, _cut({"weight": Shard(0)}))


class _ReplicatedEmbedding(ParallelStyle):
    """A lookup that every rank makes whole, on indices that every rank has.

    Its forward pass works on the local tensor: torch 2.7 remembers how it spreads an embedding's gradient without the
    number of rows, so that two tables, looked up at the same shape, would get gradients of one size.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def forward(indices: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(indices, cast(DTensor, module.weight).to_local())

        module.forward = forward
        return distribute_module(module, device_mesh, _cut({"weight": Replicate()}))


class _Conv1DColumns(ParallelStyle):
    """The columns of a ``Conv1D``, whose weight is ``[in, out]``, cut across the ranks; ``[B, S, out / n]`` comes out.

    With ``fused`` matrices side by side the plain cut would give a rank parts of different ones. The weight is cut
    plainly all the same, as every other, so that checkpoints hold it in one order; it is the output that is gathered,
    and of each matrix' part in it the rank keeps its share.
    """

    def __init__(self, fused: int = 1) -> None:
        self.fused = fused

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            if self.fused == 1:
                return output.to_local()
            whole = output.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            rank, ranks = mesh.get_local_rank(), mesh.size()
            parts = [part.chunk(ranks, dim=-1)[rank] for part in whole.chunk(self.fused, dim=-1)]
            return torch.cat(parts, dim=-1)

        return distribute_module(module, device_mesh, _cut({"weight": Shard(1), "bias": Shard(0)}), None, leave)


class _Conv1DRows(ParallelStyle):
    """The rows of a ``Conv1D`` cut across the ranks; what comes out is summed, and cut along the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return (DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False),)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(mesh, [Shard(1)]).to_local()

        cut = _cut({"weight": Shard(0), "bias": Replicate()})
        return distribute_module(module, device_mesh, cut, cast(Any, enter), leave)


def _cut(placements: dict[str, Placement]) -> Callable[[str, nn.Module, DeviceMesh], None]:
    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(parameter, mesh, [placements[key]], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(spread, parameter.requires_grad))

    return partition
