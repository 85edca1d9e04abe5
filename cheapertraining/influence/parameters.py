"""Which parameters influence is measured over, and directions in the space that they span."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.sharding import local, reshard

__all__ = ["Directions", "Layers", "canonical_name", "select_parameters", "wide", "zeros_like"]

Layers = str | Sequence[str]
"""``"all"``, ``"embedding_and_output"``, ``"last_<k>"`` (the last k decoder blocks), or glob patterns of names."""

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Directions:
    """``K`` directions, each with a part for every selected parameter.

    Attributes:
        names: of the directions, ``[K]`` (the probes' names, as a rule).
        tensors: by canonical parameter name: ``[K, *shape]``, the shape that of the parameter on this rank (of its
            local shard, where the parameters are sharded).
    """

    names: tuple[str, ...]
    tensors: dict[str, torch.Tensor]


def canonical_name(name: str) -> str:
    """A parameter's or module's name without the parts that wrappers (DDP, FSDP, compile, checkpointing) put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def select_parameters(model: nn.Module, layers: Layers = "all") -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, in the model's order; a tied parameter comes once.

    Args:
        model: wrapped or not.
        layers: see :data:`Layers`. A pattern is matched against the whole name of each parameter, tied ones by each
            of their names.

    Raises:
        UserError: nothing is trainable, or the layers match nothing.
    """
    reshard(model)  # A root that FSDP left gathered would show parameters that are not trained.
    trainable: dict[str, nn.Parameter] = {}
    aliases: dict[int, list[str]] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            if id(parameter) not in aliases:
                trainable[canonical_name(raw)] = parameter
            aliases.setdefault(id(parameter), []).append(canonical_name(raw))
    if not trainable:
        raise UserError(
            "influence: expected a model with trainable parameters, found none with requires_grad. Unfreeze the layers "
            "that training changes."
        )
    if layers == "all":
        return trainable
    wanted = _matcher(model, layers, [name for names in aliases.values() for name in names])
    chosen = {name: p for name, p in trainable.items() if any(wanted(alias) for alias in aliases[id(p)])}
    if not chosen:
        raise UserError(
            f"influence layers: expected a selection that matches a trainable parameter, found {layers!r}, which "
            f"matches none of {len(trainable)} (such as {', '.join(list(trainable)[:3])})."
            f"{nearest(str(layers), tuple(trainable))}"
        )
    return chosen


class _Matcher:
    """Whether a parameter's name is wanted."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(patterns)

    def __call__(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)


def _matcher(model: nn.Module, layers: Layers, names: Sequence[str]) -> _Matcher:
    if layers == "embedding_and_output":
        return _Matcher([f"{module}.*" for module in _embedding_and_output(model)])
    if isinstance(layers, str) and (last := re.fullmatch(r"last_(\d+)", layers)):
        blocks = sorted({int(found.group(1)) for name in names if (found := _BLOCK.search(name))})
        kept = blocks[max(0, len(blocks) - int(last.group(1))) :]
        return _Matcher([f"{prefix}{block}.*" for block in kept for prefix in _block_prefixes(names)])
    return _Matcher([layers] if isinstance(layers, str) else layers)


def _block_prefixes(names: Sequence[str]) -> set[str]:
    return {name[: found.start(1)] for name in names if (found := _BLOCK.search(name))}


def _embedding_and_output(model: nn.Module) -> list[str]:
    """Names of the token embedding and of the output layer: Hugging Face's own answer, else all embeddings."""
    for prefix, module in model.named_modules():
        if hasattr(module, "get_input_embeddings") and hasattr(module, "get_output_embeddings"):
            found = {id(module.get_input_embeddings()), id(module.get_output_embeddings())}
            inner = [name for name, child in module.named_modules() if id(child) in found]
            return [canonical_name(f"{prefix}.{name}" if prefix else name) for name in inner]
    return [canonical_name(name) for name, child in model.named_modules() if isinstance(child, nn.Embedding)]


def zeros_like(parameters: Mapping[str, torch.Tensor], names: Sequence[str]) -> Directions:
    """Zero directions over ``parameters``, float32 (float64 for float64 parameters), on their devices.

    Of sharded parameters, over what this rank holds.
    """
    held = {name: local(parameter) for name, parameter in parameters.items()}
    tensors = {name: tensor.new_zeros((len(names), *tensor.shape), dtype=wide(tensor)) for name, tensor in held.items()}
    return Directions(tuple(names), tensors)


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that directions over a parameter have: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
