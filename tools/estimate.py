"""Will it fit, and how long will it take? Memory per GPU and tokens per second of a run that was not started.

    python tools/estimate.py llama_7b --gpu h100 --gpus 8 data.seq_len=4096 train_loader.global_batch_size=512 \\
        train_loader.device_microbatch_size=1 compose.distributed=fsdp2 model.vocab_size=32000
    python tools/estimate.py yamls/mixed_pretrain.yaml --gpu a100 --gpus 8 --nodes 4 compose.distributed=hsdp

The first argument is a run yaml or the name or path of a model yaml; keys are overridden as for train.py. Formulas and
what they were checked against are in docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.config import ModelConfig, RunConfig
    from cheapertraining.distributed.estimate import GPU, Memory, Plan, Shape, Speed


def read_run(name: str, overrides: list[str]) -> RunConfig:
    """The run of a run yaml; of a model yaml, that of the package's mixed_pretrain with this model."""
    from cheapertraining.config import load_run_config

    path = Path(name)
    if path.is_file():
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.keys() - {"model", "variables"}:
            return load_run_config(name, overrides)
    else:
        try:
            return load_run_config(name, overrides)
        except UserError as error:
            if f"{name}: no such yaml" not in str(error):
                raise
    return load_run_config("mixed_pretrain", [f"compose.model={name}", *overrides])


def read_shape(model: ModelConfig) -> Shape:
    """Sizes from a yaml, or from the config.json of a Hugging Face folder.

    Raises:
        UserError: there is no such folder, it lacks a size, or the vocabulary is not known.
    """
    from cheapertraining.distributed.estimate import Shape

    if model.name_or_path is None:
        if model.vocab_size is None:
            raise UserError("model.vocab_size: needs a number here, e.g. model.vocab_size=32000.")
        head = model.hidden_size // model.num_heads
        sizes = (model.vocab_size, model.hidden_size, model.intermediate_size, model.num_layers, model.num_heads)
        return Shape(*sizes, model.num_kv_heads, head, model.tie_embeddings)
    file = Path(model.name_or_path) / "config.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        heads = found["num_attention_heads"]
        return Shape(
            found["vocab_size"],
            found["hidden_size"],
            found["intermediate_size"],
            found["num_hidden_layers"],
            heads,
            found.get("num_key_value_heads") or heads,
            found.get("head_dim") or found["hidden_size"] // heads,
            bool(found.get("tie_word_embeddings")),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: expected the sizes of a Llama-like model, found none ({error}).") from error


def read_plan(run: RunConfig, options: argparse.Namespace) -> Plan:
    """What the run's layout and batch come to on so many GPUs."""
    from cheapertraining.distributed.estimate import Plan
    from cheapertraining.distributed.parallelism import plan_layout

    parts = run.parallelism
    layout = plan_layout(parts, options.gpus * options.nodes)
    size, rows = run.train_loader.global_batch_size, run.train_loader.device_microbatch_size
    if size % layout.data:
        raise UserError(f"train_loader.global_batch_size: expected a multiple of {layout.data}, found {size}.")
    each = size // layout.data if rows == "auto" else min(rows, size // layout.data)
    distillation = run.algorithms.distillation
    live = distillation is not None and distillation.cache is None and distillation.teacher.path is not None
    teacher = 0
    if live and distillation is not None:
        from cheapertraining.config import ModelConfig

        teacher = read_shape(ModelConfig(name_or_path=distillation.teacher.path)).parameters
    return Plan(
        length=run.data.seq_len,
        rows=each,
        batch=size,
        half=run.precision != "fp32",
        flash=run.model.attention == "flash_attention_2" or (run.model.attention == "auto" and run.precision != "fp32"),
        replicate=layout.replicate,
        shard=layout.shard,
        tensor=layout.tensor,
        stages=layout.stages,
        schedule="1f1b" if parts.pp is None else parts.pp.schedule,
        stages_per_rank=1 if parts.pp is None else parts.pp.stages,
        checkpointing=parts.activation_checkpointing,
        gathered_whole=parts.fsdp2 is not None and not parts.fsdp2.reshard_after_forward,
        chunk=None if distillation is None else options.chunk,
        teacher=teacher,
        teacher_sharded=layout.shard > 1,
        ranks_per_node=options.gpus,
    )


def report(shape: Shape, plan: Plan, gpu: GPU, memory: Memory, speed: Speed, tokens: float | None) -> str:
    """A table, and a line on time."""
    sizes = f"replicate {plan.replicate}, shard {plan.shard}, tensor {plan.tensor}, stages {plan.stages}"
    batches = f"{plan.microbatches} micro-batches of {plan.rows} x {plan.length}"
    lines = [f"{shape.parameters / 1e9:.2f}G parameters on {plan.ranks} GPUs: {sizes}; {batches}"]
    for name, value in vars(memory).items():
        lines.append(f"  {name:<12}{value / 1e9:9.2f} GB")
    room = 0.9 * gpu.memory  # the allocator's fragments and the libraries' workspaces have the rest
    verdict = "fits" if memory.total <= room else "does not fit"
    lines.append(f"  {'total':<12}{memory.total / 1e9:9.2f} GB of {gpu.memory / 1e9:.0f} ({verdict} into 90% of it)")
    bound = "communication" if speed.communication > speed.compute else "arithmetic"
    lines.append(
        f"  {speed.tokens_per_second:,.0f} tokens/s ({speed.tokens_per_second / plan.ranks:,.0f} a GPU), MFU "
        f"{speed.mfu:.0%}, bound by {bound}, pipeline bubble {speed.bubble:.0%}"
    )
    if tokens is not None:
        days = tokens / speed.tokens_per_second / 86400
        lines.append(f"  {tokens:.3g} tokens: {days:,.2f} days, {days * 24 * plan.ranks:,.0f} GPU hours")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Estimate and return the exit code: 0, or 2 where the user can put something right."""
    from cheapertraining.distributed.estimate import GPUS, estimate_memory, estimate_speed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("yaml", help="a run yaml, or a model yaml (llama_7b)")
    add("overrides", nargs="*", metavar="key=value", help="as for train.py")
    add("--gpu", choices=sorted(GPUS), default="h100", help="default: %(default)s")
    add("--gpus", type=int, default=8, help="in a node (default: %(default)s)")
    add("--nodes", type=int, default=1, help="default: %(default)s")
    add("--mfu", type=float, default=0.35, help="share of the peak that a GPU's arithmetic reaches (%(default)s)")
    add("--network", type=float, default=50.0, metavar="GB/S", help="between nodes, a GPU (default: %(default)s)")
    add("--tokens", type=float, help="to train on, e.g. 1e12: how long it takes")
    add("--chunk", type=int, default=1024, help="tokens of distillation's chunked loss (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    try:
        run = read_run(options.yaml, options.overrides)
        shape, plan, gpu = read_shape(run.model), read_plan(run, options), GPUS[options.gpu]
        speed = estimate_speed(shape, plan, gpu, mfu=options.mfu, network=options.network * 1e9)
        print(report(shape, plan, gpu, estimate_memory(shape, plan), speed, options.tokens))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
