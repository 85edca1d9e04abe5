"""What the layouts of ``yamls/distributed`` cannot be had together with; ``docs/parallelism.md`` has the matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cheapertraining.config import DistillationConfig, OnlineMixingConfig, ParallelismConfig, RunConfig
from cheapertraining.distributed.layout import Layout
from cheapertraining.errors import UserError
from cheapertraining.influence.preconditioners import FITTED
from cheapertraining.mixing.signals import GRAM, INFLUENCE, PROBE_LOSSES, REFERENCE

__all__ = ["check_together"]

_BESIDE: Mapping[str, str] = {
    INFLUENCE: "takes gradients of sources and probes on the side",
    GRAM: "takes gradients of sources on the side",
    PROBE_LOSSES: "reads losses of the probes",
    REFERENCE: "compares logits with those of a reference model",
}
"""Signals of strategies that need the whole model."""
_WHOLE_STUDENT: Mapping[str, str] = {
    "hidden": "compares states of whole layers",
    "relations": "compares states of whole layers",
    "on_policy": "lets the student write, from whole logits",
}
"""Parts of distillation that need the whole student."""


def check_together(
    config: RunConfig, layout: Layout, precision: str, *, needs: Collection[str] = (), on_gpu: bool = False
) -> None:
    """Refuse, before anything is built, what the layout cannot do.

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
    if mixing is not None and precision != "fp32" and _casts_parameters(parallelism):
        _check_differences(mixing, layout, precision, needs)
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


def _check_whole_student(settings: DistillationConfig, who: str) -> None:
    """Ranks have whole hidden states behind the last layer alone."""
    for name, why in _WHOLE_STUDENT.items():
        if getattr(settings, name) is not None:
            raise UserError(
                f"algorithms.distillation.{name}: {why}, while {who} cuts the student apart. Use "
                "compose.distributed=fsdp2, or leave it out."
            )


def _check_distilled_in_parts(settings: DistillationConfig) -> None:
    key = "algorithms.distillation.teacher"
    _check_whole_student(settings, "tensor parallelism")
    if settings.teacher.kind == "adapters_off":
        raise UserError(
            f"{key}.kind: adapters_off needs a student with adapters, for which there is no tensor parallel plan. Use "
            "compose.distributed=fsdp2, or another kind."
        )
    if settings.teacher.quantization is not None and settings.teacher.placement in ("auto", "sharded"):
        raise UserError(
            f"{key}.placement: {settings.teacher.placement} cuts the teacher as the student, but weights of "
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
    missing = [_BESIDE[signal] for signal in needs if signal in _BESIDE]
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
    key, remedy = "algorithms.distillation.teacher", "Use compose.distributed=fsdp2"
    _check_whole_student(settings, "a pipeline")
    if settings.teacher.kind != "model":
        raise UserError(
            f"{key}.kind: '{settings.teacher.kind}' is made of the whole student, while a pipeline spreads its layers. "
            f"{remedy}, or a teacher of kind model."
        )
    if settings.teacher.placement == "sharded":
        raise UserError(
            f"{key}.placement: sharded spreads the teacher over ranks that all ask it, while in a pipeline that of the "
            f"last stage does. {remedy}, or placement auto (whole there) or offloaded (in main memory)."
        )


def _check_differences(mixing: OnlineMixingConfig, layout: Layout, precision: str, needs: Collection[str]) -> None:
    """Losses at slightly moved parameters are nearly equal, as products of gradients are where layers are cut."""
    by_influence = INFLUENCE in needs and mixing.influence.scorer == "forward"
    if not by_influence and not (GRAM in needs and layout.tensor > 1):
        return
    other = "microbatch" if layout.tensor > 1 else "hook"
    raise UserError(
        f"algorithms.online_mixing.strategy: '{mixing.strategy}' takes differences of nearly equal losses, for which "
        f"parameters must stay float32, but FSDP casts them ({precision}). Set mixed_precision: FULL in "
        f"parallelism.fsdp2 (or fsdp){f', or influence.scorer={other}' if by_influence else ''}."
    )


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
