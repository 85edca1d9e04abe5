"""How a model is spread over processes: the device mesh, and what cannot be had together.

Sizes are those of :mod:`cheapertraining.distributed.layout`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cheapertraining.config import DistillationConfig, OnlineMixingConfig, ParallelismConfig, RunConfig
from cheapertraining.distributed.layout import Layout, plan_layout
from cheapertraining.errors import UserError
from cheapertraining.influence.preconditioners import FITTED
from cheapertraining.mixing.signals import GRAM, INFLUENCE, PROBE_LOSSES, REFERENCE

__all__ = ["MESH_NAMES", "Layout", "build_mesh", "check_together", "data_rank", "plan_layout"]

MESH_NAMES = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel")
"""Dimensions of the mesh, outermost first; the names are Composer's."""


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh ``[replicate, shard, tensor]``; a collective call on all ranks.

    Args:
        layout: of the run.
        device_type: ``"cuda"`` or ``"cpu"``.
    """
    return init_device_mesh(device_type, (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=MESH_NAMES)


def data_rank(layout: Layout, rank: int) -> int:
    """The rank among those that read samples of their own; the tensor dimension is the innermost of the mesh."""
    return rank // layout.copies


_CUT_APART: Mapping[str, str] = {
    INFLUENCE: "takes gradients of sources and probes on the side",
    GRAM: "takes gradients of sources on the side",
    PROBE_LOSSES: "reads losses of the probes",
    REFERENCE: "compares logits with those of a reference model",
}
"""Signals of strategies that need logits or layers in one piece."""


def check_together(
    config: RunConfig, layout: Layout, precision: str, *, needs: Collection[str] = (), on_gpu: bool = False
) -> None:
    """Refuse, before anything is built, what the layout cannot do. ``docs/parallelism.md`` has the matrix.

    Args:
        config: the run.
        layout: of its processes.
        precision: resolved: ``"fp32"``, ``"amp_bf16"`` or ``"amp_fp16"``.
        needs: signals that the mixing strategy asks for.
        on_gpu: whether it trains on CUDA.

    Raises:
        UserError: naming the key, the reason and what to use instead.
    """
    mixing, parallelism = config.algorithms.online_mixing, config.parallelism
    if layout.engine != "replicas" and on_gpu and config.train_loader.device_microbatch_size == "auto":
        raise UserError(
            "train_loader.device_microbatch_size: Composer finds it by itself (auto) only for whole models. Set a "
            "number of samples that fits into memory."
        )
    if layout.engine == "fsdp" and not on_gpu and parallelism.state_dict_type == "full":
        raise UserError(
            "parallelism.state_dict_type: FSDP1 of torch 2.7 on a CPU puts wrong moments of the optimizer into a full "
            "state dict. Use sharded, which loads under every layout, or compose.distributed=fsdp2."
        )
    if layout.engine == "fsdp" and config.algorithms.distillation is not None:
        raise UserError(
            "algorithms.distillation: needs the output head's weights beside the model's forward pass, after which "
            "FSDP1 has let go of them. Use compose.distributed=fsdp2, which goes on from FSDP1's checkpoints."
        )
    if layout.engine == "pipeline":
        _check_pipeline(config, layout, precision, needs)
    if layout.tensor > 1 or parallelism.tp is not None:
        _check_tensor_parallel(config, layout, needs)
    if layout.engine != "replicas" and mixing is not None and INFLUENCE in needs and mixing.influence.scorer == "loop":
        raise UserError(
            "algorithms.online_mixing.influence.scorer: loop takes gradients of parameters in one piece. Use forward, "
            "microbatch, or compose.distributed=ddp."
        )
    if (
        mixing is not None
        and _takes_differences(mixing, layout, needs)
        and precision != "fp32"
        and _casts_parameters(parallelism)
    ):
        raise UserError(
            f"algorithms.online_mixing.strategy: '{mixing.strategy}' takes differences of nearly equal losses, for "
            f"which parameters must stay float32, but FSDP casts them ({precision}). Set mixed_precision: FULL in "
            "parallelism.fsdp2 (or fsdp)"
            + (
                ", or influence.scorer=" + ("microbatch." if layout.tensor > 1 else "hook.")
                if INFLUENCE in needs
                else "."
            )
        )
    for key in ("activation_checkpointing", "compile_blocks"):
        if getattr(parallelism, key) and (why := _watches_backward(config)) is not None:
            raise UserError(
                f"parallelism.{key}: {why} watches what goes through single layers, which checkpointed blocks do twice "
                "and compiled ones do not show. Switch one of the two off."
            )


def _check_tensor_parallel(config: RunConfig, layout: Layout, needs: Collection[str]) -> None:
    if config.algorithms.online_mixing is not None:
        _check_measured_in_parts(config.algorithms.online_mixing, needs)
    if config.algorithms.influence_scores is not None:
        raise UserError(
            "algorithms.influence_scores: watches what goes through single layers while they train, which tensor "
            "parallelism cuts apart. Use compose.distributed=fsdp2, or measure sources: online_mixing with "
            "influence.scorer=microbatch."
        )
    if config.algorithms.distillation is not None:
        _check_distilled_in_parts(config.algorithms.distillation)
    if config.data.seq_len % layout.tensor:
        raise UserError(
            f"data.seq_len: expected a multiple of the tensor parallel degree ({layout.tensor}), since sequences are "
            f"cut too, found {config.data.seq_len}. Use another degree."
        )


def _check_distilled_in_parts(settings: DistillationConfig) -> None:
    """Ranks have whole hidden states behind the last layer alone, and a part of the vocabulary each."""
    key, remedy = "algorithms.distillation", "Use compose.distributed=fsdp2"
    for name in ("hidden", "relations", "on_policy"):
        if getattr(settings, name) is not None:
            why = "lets the student write from whole logits" if name == "on_policy" else "compares whole layers"
            raise UserError(f"{key}.{name}: {why}, while tensor parallelism cuts them. {remedy}, or leave it out.")
    if settings.teacher.kind == "adapters_off":
        raise UserError(
            f"{key}.teacher.kind: adapters_off needs a student with adapters, for which there is no tensor parallel "
            f"plan. {remedy}, or another kind."
        )
    if settings.teacher.quantization is not None and settings.teacher.placement in ("auto", "sharded"):
        raise UserError(
            f"{key}.teacher.placement: {settings.teacher.placement} cuts the teacher as the student, but weights of "
            f"few bits ({settings.teacher.quantization}) cannot be cut. Use replicated."
        )


def _check_measured_in_parts(mixing: OnlineMixingConfig, needs: Collection[str]) -> None:
    """Losses and whole gradients are to be had where layers are cut; what goes through a single layer is not."""
    key = "algorithms.online_mixing"
    remedy = "while tensor parallelism cuts layers apart. Use compose.distributed=fsdp2"
    if INFLUENCE in needs and mixing.influence.scorer == "hook":
        raise UserError(
            f"{key}.influence.scorer: hook watches what goes through single layers, {remedy}, or scorer forward or "
            "microbatch."
        )
    if INFLUENCE in needs and mixing.strategy == "influence" and mixing.influence.metric in FITTED:
        raise UserError(
            f"{key}.influence.metric: {mixing.influence.metric} is fitted to single layers, {remedy}, or metric raw "
            "or adam."
        )


def _check_pipeline(config: RunConfig, layout: Layout, precision: str, needs: Collection[str]) -> None:
    mixing, pp = config.algorithms.online_mixing, config.parallelism.pp
    assert pp is not None
    missing = [_CUT_APART[signal] for signal in needs if signal in _CUT_APART]
    if mixing is not None and missing:
        raise UserError(
            f"algorithms.online_mixing.strategy: '{mixing.strategy}' {missing[0]}, while no rank of a pipeline has the "
            "whole model. Use compose.distributed=fsdp2, or a strategy that needs only training losses (odm, ado) or "
            "none (static, proportional, unimax, schedule)."
        )
    if config.algorithms.influence_scores is not None:
        raise UserError(
            "algorithms.influence_scores: needs the layers and the head of a model in one place, which a pipeline "
            "spreads. Use compose.distributed=fsdp2, or leave it out."
        )
    if config.algorithms.distillation is not None:
        _check_distilled_pipeline(config.algorithms.distillation)
    if precision == "amp_fp16":
        raise UserError(
            "precision: amp_fp16 scales losses between the forward and the backward pass, which a pipeline runs as "
            "one. Use amp_bf16."
        )
    size, rows = config.train_loader.global_batch_size, config.train_loader.device_microbatch_size
    stages = layout.stages * pp.stages
    if rows == "auto" or size % rows or size // rows < stages:
        fitting = [n for n in range(1, size + 1) if size % n == 0 and size // n >= stages]
        what = f"one of {', '.join(map(str, fitting))}" if fitting else f"a global_batch_size of at least {stages}"
        raise UserError(
            f"train_loader.device_microbatch_size: a pipeline of {stages} stages needs at least as many micro-batches "
            f"of equal size in a global batch of {size}: expected {what}, found {rows}."
        )
    if pp.schedule == "interleaved" and size // rows % layout.stages:
        raise UserError(
            f"train_loader.device_microbatch_size: the interleaved schedule needs a multiple of {layout.stages} "
            f"micro-batches, found {size // rows} of {rows} rows. Use another size, or parallelism.pp.schedule=1f1b."
        )


def _check_distilled_pipeline(settings: DistillationConfig) -> None:
    """The last stage has hidden states behind the last layer, and all of the teacher."""
    key, remedy = "algorithms.distillation", "Use compose.distributed=fsdp2"
    for name, why in (
        ("hidden", "compares states of one layer of the whole student"),
        ("relations", "compares states of one layer of the whole student"),
        ("on_policy", "lets the student write, token by token"),
    ):
        if getattr(settings, name) is not None:
            raise UserError(f"{key}.{name}: {why}, while a pipeline spreads its layers. {remedy}, or leave it out.")
    if settings.teacher.kind != "model":
        raise UserError(
            f"{key}.teacher.kind: '{settings.teacher.kind}' is made of the whole student, while a pipeline spreads its "
            f"layers. {remedy}, or a teacher of kind model."
        )
    if settings.teacher.placement == "sharded":
        raise UserError(
            f"{key}.teacher.placement: sharded spreads the teacher over ranks that all ask it, while in a pipeline "
            f"that of the last stage does. {remedy}, or placement auto (whole there) or offloaded (in main memory)."
        )


def _takes_differences(mixing: OnlineMixingConfig, layout: Layout, needs: Collection[str]) -> bool:
    """Whether losses at slightly moved parameters are compared, as products of gradients are where layers are cut."""
    return (INFLUENCE in needs and mixing.influence.scorer == "forward") or (GRAM in needs and layout.tensor > 1)


def _casts_parameters(parallelism: ParallelismConfig) -> bool:
    settings = parallelism.fsdp2 or parallelism.fsdp
    return parallelism.tp is not None if settings is None else settings.mixed_precision != "FULL"


def _watches_backward(config: RunConfig) -> str | None:
    mixing = config.algorithms.online_mixing
    if config.algorithms.influence_scores is not None:
        return "algorithms.influence_scores"
    if mixing is not None and mixing.strategy == "influence" and mixing.influence.scorer == "hook":
        return "algorithms.online_mixing.influence.scorer=hook"
    return None
