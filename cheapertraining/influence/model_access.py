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
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By, check_rows, unit_index
from cheapertraining.influence.losses import token_losses
from cheapertraining.influence.sharding import is_sharded

__all__ = [
    "check_vocabulary",
    "full_precision",
    "losses_of_logits",
    "model_logits",
    "model_losses",
    "no_trace",
    "sample_losses",
    "to_device",
    "unit_losses",
    "unwrap",
]

_HF_INPUTS = ("input_ids", "position_ids")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a ``DistributedDataParallel`` wrapper, or the module itself, FSDP's wrappers on.

    A sharded model can only be called through its wrappers.

    Raises:
        UserError: parameters are spread over the ranks in a way that is not known (see
            :func:`~cheapertraining.influence.sharding.is_sharded`).
    """
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    is_sharded(inner)
    return inner


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch on ``device``."""
    return {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}


def model_logits(
    model: nn.Module, batch: Mapping[str, torch.Tensor], replaced: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Run ``model`` on ``batch``: ``[B, S, V]``.

    A model whose ``forward`` takes ``input_ids`` (Hugging Face) is called with ``input_ids`` and
    ``position_ids`` by name; restarting positions keep packed documents apart, so no attention mask is
    passed. Any other model is called with the batch itself (Composer). Both must return ``logits``, as a key
    or an attribute.

    Args:
        model: wrapped or not.
        batch: on the model's device.
        replaced: tensors that stand for the parameters of these names, as ``model.named_parameters()`` gives them.
    """
    args: tuple[Any, ...]
    accepted = inspect.signature(_bare(model).forward).parameters
    if "input_ids" in accepted:
        # PEFT's wrappers name some inputs and hand on the rest.
        hands_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values())
        inputs: dict[str, Any] = {name: batch[name] for name in _HF_INPUTS if name in batch}
        inputs["use_cache"] = False
        inputs = {name: value for name, value in inputs.items() if hands_on or name in accepted}
        args, kwargs = (), inputs
    else:
        args, kwargs = (batch,), {}
    outputs = functional_call(model, dict(replaced), args, kwargs) if replaced else model(*args, **kwargs)
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return logits


def model_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], replaced: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``model`` on ``batch`` as :func:`model_logits` does, and compute the loss of each token.

    Returns:
        As :func:`~cheapertraining.influence.losses.token_losses`.
    """
    return losses_of_logits(model, model_logits(model, batch, replaced), batch["labels"])


def losses_of_logits(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~cheapertraining.influence.losses.token_losses`, or the model's own method of that name, where ranks hold
    parts of the vocabulary (:class:`~cheapertraining.models.CausalLM`)."""
    own = getattr(_bare(model), "token_losses", None)
    found: tuple[torch.Tensor, torch.Tensor] = (token_losses if own is None else own)(logits, labels)
    return found


def sample_losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``model`` on ``batch`` as :func:`model_losses` does, and sum the loss of each sample.

    Returns:
        ``(sums, tokens)``: nats, float64 ``[B]`` (differences of sums are taken, so no digit is given away),
        with gradient; loss-counting tokens, int64 ``[B]``.
    """
    return unit_losses(model, batch, "sample")


def unit_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], by: By, replaced: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sample_losses` for units: samples, or the documents packed into them, ``[N]``."""
    check_rows(batch)
    losses, counted = model_losses(model, batch, replaced)
    if by == "sample":
        return losses.double().sum(dim=1), counted.sum(dim=1)
    index, count = unit_index(batch, by)
    index = index.reshape(-1).to(losses.device)
    sums = losses.new_zeros(count, dtype=torch.float64).index_add(0, index, losses.double().reshape(-1))
    tokens = torch.zeros(count, dtype=torch.int64, device=index.device)
    return sums, tokens.index_add_(0, index, counted.reshape(-1).long())


def check_vocabulary(model: nn.Module, batch: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse token ids that the model has no embedding for: on CUDA they would end the process.

    Raises:
        UserError: naming ``what``.
    """
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            embedding: Any = module.get_input_embeddings()  # type: ignore[operator]  # Hugging Face's
            size = getattr(embedding, "num_embeddings", None)
            ids = batch["input_ids"]
            if size is None or not ids.numel():
                return
            smallest, largest = (int(each) for each in ids.aminmax())
            if smallest < 0 or largest >= size:
                raise UserError(
                    f"{what}: expected token ids from 0 to below the model's vocabulary of {size}, found "
                    f"{smallest if smallest < 0 else largest}. Convert it with the tokenizer that the model is trained "
                    "with."
                )
            return


def _bare(model: nn.Module) -> nn.Module:
    """The module that wrappers at the top (FSDP1, compile, LoRA) hand their inputs to."""
    while True:  # One wrapper off at each turn.
        kinds = {kind.__name__ for kind in type(model).__mro__}
        if "FullyShardedDataParallel" in kinds or isinstance(model, DistributedDataParallel):
            model = model.module  # type: ignore[assignment]
        elif "OptimizedModule" in kinds:
            model = model._orig_mod  # type: ignore[assignment]
        elif "PeftModel" in kinds:
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


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
