"""What is about to run, said before anything heavy is imported.

for line in startup_lines(config, world_size=1): print(line)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cheapertraining.config import DataConfig, ModelConfig, RunConfig, planned_tokens
from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.data.shards import ShardMeta

__all__ = ["model_parameters", "startup_lines", "state_bytes"]

_ADAMW_BYTES = 16
"""A parameter: weight, gradient and AdamW's two moments, float32 each (mixed precision keeps all of them too)."""


def startup_lines(config: RunConfig, world_size: int = 1) -> Iterator[str]:
    """Model and memory, tokens and sources; what the shards on this machine tell, of remote ones nothing.

    Args:
        config: of the run.
        world_size: processes that train it.
    """
    metas = _metas(config.data)
    vocabulary = config.model.vocab_size or next((meta.vocab_size for meta in metas.values()), None)
    if config.model.name_or_path is not None:
        yield f"  model    {config.model.name_or_path}"
    elif vocabulary is not None:
        parameters = model_parameters(config.model, vocabulary)
        shards = config.parallelism.fsdp or config.parallelism.fsdp2 or config.parallelism.tp
        each = state_bytes(parameters) / (world_size if shards else 1)
        yield (
            f"  model    {parameters:,} parameters; weights, gradients and AdamW {_gib(each)} a process "
            f"(activations come on top)"
        )
    tokens = planned_tokens(config)
    batch = config.train_loader.global_batch_size
    batches = -(-tokens // (batch * config.data.seq_len))
    yield f"  tokens   {tokens:,} in {batches:,} batches of {batch} x {config.data.seq_len}"
    yield f"  sources  {', '.join(_sources(config.data, metas, tokens))}"
    if config.data.probes:
        yield f"  probes   {', '.join(config.data.probes)}"


def model_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of a Llama of these sizes (arXiv 2302.13971): attention, SwiGLU, two norms a layer, embeddings.

    Args:
        model: its sizes.
        vocab_size: rows of the embedding.
    """
    head = model.hidden_size // model.num_heads
    attention = 2 * model.hidden_size * head * (model.num_heads + model.num_kv_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size + 2 * model.hidden_size
    embeddings = vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer + embeddings + model.hidden_size


def state_bytes(parameters: int) -> int:
    """Bytes of weights, gradients and AdamW's moments."""
    return _ADAMW_BYTES * parameters


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


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
