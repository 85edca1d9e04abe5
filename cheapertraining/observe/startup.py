"""What is about to run, said before anything heavy is imported.

for line in startup_lines(config, world_size=1): print(line)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cheapertraining.config import DataConfig, ModelConfig, RunConfig, planned_tokens
from cheapertraining.distributed.estimate import Memory, Shape, memory_of_run, shape_of_model
from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.data.shards import ShardMeta

__all__ = ["startup_lines"]


def startup_lines(config: RunConfig, world_size: int = 1) -> Iterator[str]:
    """Tokens, model, memory and sources; what the shards on this machine tell, of remote ones nothing.

    Args:
        config: of the run.
        world_size: processes that train it.
    """
    tokens = planned_tokens(config)
    batch = config.train_loader.global_batch_size
    batches = -(-tokens // (batch * config.data.seq_len))
    yield f"  tokens   {tokens:,} in {batches:,} batches of {batch} x {config.data.seq_len}"
    metas = _metas(config.data)  # imports torch
    yield from _model(config, next((meta.vocab_size for meta in metas.values()), None), world_size)
    yield f"  sources  {', '.join(_sources(config.data, metas, tokens))}"
    if config.data.probes:
        yield f"  probes   {', '.join(config.data.probes)}"


def _model(config: RunConfig, vocabulary: int | None, world_size: int) -> Iterator[str]:
    """Size and memory, as far as they can be told; what is wrong with either, training will say."""
    try:
        shape = shape_of_model(config.model, vocabulary)
        yield f"  model    {shape.parameters:,} parameters"
        memory = memory_of_run(config, shape, world_size, on_gpu=_on_gpu(config), teacher=_teacher(config))
        yield f"  memory   {_in_words(memory)}"
    except UserError:
        if config.model.name_or_path is not None:
            yield f"  model    {config.model.name_or_path}"


def _on_gpu(config: RunConfig) -> bool:
    if config.device != "auto":
        return config.device == "gpu"
    import torch

    return torch.cuda.is_available()


def _teacher(config: RunConfig) -> Shape | None:
    """Sizes of a live teacher that is another model."""
    distillation = config.algorithms.distillation
    if distillation is None or distillation.cache is not None or distillation.teacher.kind != "model":
        return None
    return shape_of_model(ModelConfig(name_or_path=distillation.teacher.path))


def _in_words(memory: Memory) -> str:
    """``about 310 MiB a rank: parameters 21, gradients 21, …``; parts below half a unit's last digit are left out."""
    unit, size, digits = ("GiB", 2**30, 1) if memory.total >= 2**30 else ("MiB", 2**20, 0)
    parts = {field.name: round(getattr(memory, field.name) / size, digits) for field in fields(memory)}
    shown = ", ".join(f"{name} {part:.{digits}f}" for name, part in parts.items() if part)
    return f"about {memory.total / size:.{digits}f} {unit} a rank: {shown}"


def _sources(data: DataConfig, metas: dict[str, ShardMeta], tokens: int) -> Iterator[str]:
    """Each source with the passes over it, if its weight stayed as it is at the start."""
    whole = sum(source.weight for source in data.sources.values())
    for name, source in data.sources.items():
        share = source.weight / whole
        if name not in metas:
            yield f"{name} {share:.0%}"
            continue
        size = metas[name].samples * data.seq_len
        cap = "" if source.max_epochs is None else f" of at most {source.max_epochs:g}"
        yield f"{name} {share:.0%} ({share * tokens / max(1, size):.2g} passes{cap})"


def _metas(data: DataConfig) -> dict[str, ShardMeta]:
    from cheapertraining.data.shards import read_meta

    found: dict[str, ShardMeta] = {}
    for name, source in data.sources.items():
        folder = (Path(source.local) if source.local else Path(data.local) / name) / "train"
        try:
            found[name] = read_meta(folder)
        except (UserError, OSError):  # not there yet, or not readable: the loader says so, where it matters
            continue
    return found
