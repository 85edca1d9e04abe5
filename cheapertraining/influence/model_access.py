"""How influence code touches a model: unwrap it, call it, and leave it as it was."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import token_losses

__all__ = ["full_precision", "no_trace", "sample_losses", "to_device", "trainable_parameters", "unwrap"]

_HF_INPUTS = ("input_ids", "position_ids")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a ``DistributedDataParallel`` wrapper, or the module itself.

    Raises:
        UserError: parameters are sharded over the ranks.
    """
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    # Told by name and by attribute, so that neither FSDP nor DTensor need be imported where nobody uses them.
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in inner.modules())
    if wrapped or any(hasattr(parameter, "device_mesh") for parameter in inner.parameters()):
        raise UserError(
            "influence: expected a model that is replicated on every rank, found sharded parameters. "
            "Train without sharding, or use a mixing strategy that needs no influence."
        )
    return inner


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training changes; a tied parameter comes once."""
    return [parameter for parameter in unwrap(model).parameters() if parameter.requires_grad]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch on ``device``."""
    return {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}


def sample_losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``model`` on ``batch`` and sum the loss of each sample.

    A model whose ``forward`` takes ``input_ids`` (Hugging Face) is called with ``input_ids`` and
    ``position_ids`` by name; restarting positions keep packed documents apart, so no attention mask is
    passed. Any other model is called with the batch itself (Composer). Both must return ``logits``, as a key
    or an attribute.

    Returns:
        ``(sums, tokens)``: nats, float64 ``[B]`` (differences of sums are taken, so no digit is given away),
        with gradient; loss-counting tokens, int64 ``[B]``.
    """
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" in accepted:
        inputs: dict[str, Any] = {name: batch[name] for name in _HF_INPUTS if name in accepted and name in batch}
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        outputs = model(**inputs)
    else:
        outputs = model(batch)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    losses, counted = token_losses(logits, batch["labels"])
    return losses.double().sum(dim=1), counted.sum(dim=1)


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode, and on leaving put back its modes and all random generators.

    Covers the train/eval flag of every submodule and the generators of torch (CPU and CUDA), NumPy and
    Python.
    """
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    has_cuda = torch.cuda.is_available() and next(model.parameters()).is_cuda
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else None
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off: differences of nearly equal losses drown in the rounding of either."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = False, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
