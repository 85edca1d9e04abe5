"""Bytes that steps of small models take of each rank, as torch's allocator and autograd tell them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from cheapertraining.builders import build_optimizer
from cheapertraining.config import RunConfig, load_run_config
from cheapertraining.distillation.chunked import chunked_distillation_loss
from cheapertraining.distillation.teacher import TeacherWrapper, head_of
from cheapertraining.distributed.estimate import Memory, kept_bytes, memory_by_stage, plan_of_run, shape_of_model
from cheapertraining.distributed.parallelism import Layout, plan_layout
from cheapertraining.models import CausalLM, build_causal_lm
from cheapertraining.models.causal_lm import HeadInputs
from cheapertraining.models.sharded import build_spread
from cheapertraining.models.stages import build_pipelined

__all__ = ["config_of_case", "measure", "predicted", "predicted_kept"]

VOCABULARY, LENGTH, ROWS = 2048, 128, 2
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 352, "num_layers": 8, "num_heads": 8,
    "num_kv_heads": 4, "max_position_embeddings": LENGTH, "tie_embeddings": "false",
}  # fmt: skip
CPU = torch.device("cpu")


def config_of_case(layout: str, ranks: int, *overrides: str) -> RunConfig:
    """A run of two micro-batches a rank, or of as many as two for each stage, under a layout."""
    settings = [f"compose.distributed={layout}", f"data.seq_len={LENGTH}", "device=cpu", *overrides]
    settings += [f"model.{key}={value}" for key, value in MODEL.items()]
    # Settings of the sample's run that only concern what is measured on the side.
    settings += ["algorithms.online_mixing=null", "algorithms.influence_scores=null"]
    parallelism = load_run_config("mixed_pretrain", settings).parallelism
    data = plan_layout(parallelism, ranks).data
    microbatches = 2 * ranks if parallelism.pp is not None else 2 * data
    sizes = [f"train_loader.global_batch_size={microbatches * ROWS}", f"train_loader.device_microbatch_size={ROWS}"]
    return load_run_config("mixed_pretrain", [*settings, *sizes])


def predicted(config: RunConfig, ranks: int) -> list[Memory]:
    """What the formulas say of each rank of a case; its teacher is a model like the student."""
    shape = shape_of_model(config.model)
    plan = plan_of_run(config, shape, ranks, on_gpu=False, teacher=shape)
    stages = memory_by_stage(shape, plan)
    return stages if len(stages) == ranks else stages * ranks


def predicted_kept(config: RunConfig, ranks: int) -> float:
    """What they say that autograd keeps of a micro-batch of it."""
    shape = shape_of_model(config.model)
    plan = plan_of_run(config, shape, ranks, on_gpu=False, teacher=shape)
    log_softmax = 0 if plan.chunk is not None else VOCABULARY // plan.tensor
    return kept_bytes(shape, plan) + 4 * ROWS * LENGTH * log_softmax


def measure(config: RunConfig) -> dict[str, float]:
    """Bytes of this rank: parameters, gradients, moments; what autograd keeps of a micro-batch; and the peak of a step.

    Args:
        config: of :func:`config_of_case`, of as many processes as the group has.

    Returns:
        ``parameters``, ``gradients``, ``optimizer``; ``kept``, what the backward pass finds of one micro-batch without
        parameters (not under a pipeline); ``peak``, most bytes that torch's CPU allocator had given out at a time.
    """
    layout = plan_layout(config.parallelism, dist.get_world_size())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run = _Run(config, layout)
        run.step()
        run.step()  # the first makes moments and buckets
        with record_function("measured"):
            run.step()
    result = run.held | {"peak": float(_peak(found))}
    if layout.engine != "pipeline":
        result["kept"] = float(run.kept())
    return result


class _Run:
    """A model, its optimizer and its batches, stepped as the trainer does it."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.half = config.precision == "amp_bf16"
        precision = "amp_bf16" if self.half else "fp32"
        build = partial(build_causal_lm, config.model, VOCABULARY)
        loader = config.train_loader
        if layout.engine == "pipeline":
            rows = [loader.global_batch_size]
            self.model: CausalLM = build_pipelined(
                build, config.parallelism, CPU, batch_size=rows[0], microbatch_size=ROWS, seq_len=LENGTH
            )
        else:
            self.model = build_spread(build, layout, config.parallelism, precision, CPU)
            rows = [ROWS] * (loader.global_batch_size // layout.data // ROWS)
        ddp = layout.engine == "replicas" and layout.replicate > 1
        self.called: nn.Module = DistributedDataParallel(self.model) if ddp else self.model
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.batches = [_batch(count, seed) for seed, count in enumerate(rows)]
        self.teacher: TeacherWrapper | None = None
        if config.algorithms.distillation is not None:
            self.teacher = TeacherWrapper(build())
            if layout.engine == "fsdp2":
                self.teacher.shard(next(self.model.parameters()).device_mesh)  # type: ignore[attr-defined]
        self.held: dict[str, float] = {}

    def step(self) -> None:
        """Forward and backward passes of all micro-batches, and the optimizer's step."""
        for number, batch in enumerate(self.batches):
            last = number == len(self.batches) - 1
            alone = isinstance(self.called, DistributedDataParallel) and not last
            with self.called.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                outputs, loss = self.forward(batch)
                loss.backward()
            del outputs, loss
        parameters = list(self.model.parameters())
        self.held = {"parameters": _bytes(parameters), "gradients": _bytes([p.grad for p in parameters])}
        self.optimizer.step()
        moments = [state[key] for state in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        self.held["optimizer"] = _bytes(moments)
        self.optimizer.zero_grad()

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        """Outputs, which live as long as a trainer's, and the loss."""
        gc.collect()  # DTensors are in cycles, which keep what they hold until the collector comes round
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            if self.teacher is not None:
                self.model.objective = _Towards(self.teacher, batch)
            outputs = self.called(batch)
            loss = self.model.loss(outputs, batch)
        if self.teacher is not None:
            self.model.objective = None
            self.teacher.reshard()
        return outputs, loss

    def kept(self) -> int:
        """What autograd keeps of a micro-batch, each storage once, but for matrices of the model and their copies."""
        parameters = [each for p in self.model.parameters() for each in (p, _local(p)) if p.dim() > 1]
        shapes = {tuple(p.shape) for p in parameters} | {tuple(p.T.shape) for p in parameters}
        found: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = _local(tensor).untyped_storage()
            if tuple(tensor.shape) not in shapes:
                found[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs, loss = self.forward(self.batches[0])
        total = sum(storage.nbytes() for storage in found.values())
        loss.backward()
        del outputs
        return total


class _Towards:
    """The distillation loss, as its algorithm has it computed."""

    layers = False

    def __init__(self, teacher: TeacherWrapper, batch: Mapping[str, Tensor]) -> None:
        self.targets = teacher(batch)

    def __call__(self, inputs: HeadInputs, batch: Mapping[str, Any], outputs: Any) -> Tensor:
        del outputs
        return chunked_distillation_loss(inputs.hidden, head_of(inputs), self.targets, batch["labels"]).total


def _batch(rows: int, seed: int) -> dict[str, Tensor]:
    """Rows of two documents each."""
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels, positions, cut = ids.clone(), torch.arange(LENGTH).repeat(rows, 1), LENGTH // 3
    positions[:, cut:] -= cut
    labels[:, [0, cut]] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _local(tensor: Any) -> Any:
    """What this rank has of a tensor, when it has arrived."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def _bytes(tensors: list[Any]) -> float:
    return float(sum(_local(tensor).nbytes for tensor in tensors if tensor is not None))


def _peak(found: Any) -> int:
    """Most bytes that were given out at a time during ``measured``, of all since the profile began."""
    events = found.profiler.kineto_results.events()
    window = next(event for event in events if event.name() == "measured")
    start, end = window.start_ns(), window.start_ns() + window.duration_ns()
    total = peak = 0
    for at, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        total += size
        if start <= at <= end:
            peak = max(peak, total)
    return peak
