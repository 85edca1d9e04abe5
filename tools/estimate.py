"""Will it fit, and how long will it take? Memory per GPU and tokens per second of a run that was not started.

    python tools/estimate.py llama_7b --gpu h100 --gpus 8 data.seq_len=4096 train_loader.global_batch_size=512 \\
        train_loader.device_microbatch_size=1 compose.distributed=fsdp2 model.vocab_size=32000
    python tools/estimate.py yamls/mixed_pretrain.yaml --gpu a100 --gpus 8 --nodes 4 compose.distributed=hsdp

The first argument is a run yaml or the name or path of a model yaml; keys are overridden as for train.py. Formulas and
what they were checked against are in docs/planning.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cheapertraining.errors import UserError, nearest

if TYPE_CHECKING:
    from cheapertraining.config import RunConfig
    from cheapertraining.distributed.estimate import Memory, Plan, Shape
    from cheapertraining.distributed.throughput import GPU, Speed

ROOM = 0.9
"""Share of a GPU's memory to plan for: the allocator's fragments and the libraries' workspaces have the rest."""


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


def read_teacher(run: RunConfig) -> Shape | None:
    """Sizes of a live teacher that is another model.

    Raises:
        UserError: it is no Hugging Face folder of a Llama-like model.
    """
    from cheapertraining.config import ModelConfig
    from cheapertraining.distributed.estimate import shape_of_model

    settings = run.algorithms.distillation
    if settings is None or settings.cache is not None or settings.teacher.kind != "model":
        return None
    return shape_of_model(ModelConfig(name_or_path=settings.teacher.path))


def report(shape: Shape, plan: Plan, gpu: GPU, memory: Memory, speed: Speed, tokens: float | None) -> str:
    """A table, and a line on time."""
    sizes = f"replicate {plan.replicate}, shard {plan.shard}, tensor {plan.tensor}, stages {plan.stages}"
    batches = f"{plan.microbatches} micro-batches of {plan.rows} x {plan.length}"
    lines = [f"{shape.parameters / 1e9:.2f}G parameters on {plan.ranks} GPUs: {sizes}; {batches}"]
    for name, value in vars(memory).items():
        lines.append(f"  {name:<12}{value / 1e9:9.2f} GB")
    room = ROOM * gpu.memory
    verdict = "fits" if memory.total <= room else "does not fit"
    lines.append(
        f"  {'total':<12}{memory.total / 1e9:9.2f} GB of {gpu.memory / 1e9:.0f} ({verdict} into {ROOM:.0%} of it)"
    )
    bound = "communication" if speed.communication > speed.compute else "arithmetic"
    lines.append(
        f"  {speed.tokens_per_second:,.0f} tokens/s ({speed.tokens_per_second / plan.ranks:,.0f} a GPU), MFU "
        f"{speed.mfu:.0%}, bound by {bound}, pipeline bubble {speed.bubble:.0%}"
    )
    if tokens is not None:
        days = tokens / speed.tokens_per_second / 86400
        lines.append(f"  {tokens:.3g} tokens: {days:,.2f} days, {days * 24 * plan.ranks:,.0f} GPU hours")
    return "\n".join(lines)


def estimate(options: argparse.Namespace) -> str:
    """What the command line asks for, as :func:`report` puts it.

    Raises:
        UserError: an option or key, or a layout or batch that this number of GPUs cannot have.
    """
    from cheapertraining.distributed.estimate import estimate_memory, plan_of_run, shape_of_model
    from cheapertraining.distributed.layout import plan_layout
    from cheapertraining.distributed.throughput import GPUS, estimate_speed
    from cheapertraining.distributed.together import check_together

    if options.gpu not in GPUS:
        near = nearest(options.gpu, GPUS)
        raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, found '{options.gpu}'.{near}")
    for name in ("gpus", "nodes", "network", "utilization"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UserError(f"--{name}: expected a number above 0, found {getattr(options, name)}.")
    run, gpu, ranks = read_run(options.yaml, options.overrides), GPUS[options.gpu], options.gpus * options.nodes
    shape = shape_of_model(run.model)
    plan = plan_of_run(run, shape, ranks, on_gpu=True, teacher=read_teacher(run))
    # What training would refuse is not worth planning.
    check_together(run, plan_layout(run.parallelism, ranks), "amp_bf16" if plan.half else "fp32", on_gpu=True)
    plan = replace(plan, ranks_per_node=options.gpus)
    speed = estimate_speed(shape, plan, gpu, utilization=options.utilization, network=options.network * 1e9)
    return report(shape, plan, gpu, estimate_memory(shape, plan), speed, options.tokens)


def main(arguments: list[str]) -> int:
    """Estimate and return the exit code: 0, or 2 where the user can put something right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("yaml", help="a run yaml, or a model yaml (llama_7b)")
    add("overrides", nargs="*", metavar="key=value", help="as for train.py")
    add("--gpu", default="h100", help="b200, h200, h100, a100, a100-40gb, l40s, rtx4090 (default: %(default)s)")
    add("--gpus", type=int, default=8, help="in a node (default: %(default)s)")
    add("--nodes", type=int, default=1, help="default: %(default)s")
    add("--utilization", type=float, help="share of the peak that arithmetic reaches (default: the GPU's, 0.4 or 0.6)")
    add("--network", type=float, default=50.0, metavar="GB/S", help="between nodes, a GPU (default: %(default)s)")
    add("--tokens", type=float, help="to train on, e.g. 1e12: how long it takes")
    try:
        print(estimate(parser.parse_intermixed_args(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
