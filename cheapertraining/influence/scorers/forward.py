"""Scores from forward passes alone: of data that is not trained on, in any model, in any wrapper.

``<g_i, u>`` is the derivative of unit ``i``'s loss along ``u``, so one derivative along ``u`` gives it for all units of
a batch at once: no backward pass, no per-sample gradient, nothing stored, and exact for tied weights, norms and any
attention kernel (the idea is that of In-Run Data Shapley's first-order term, arXiv 2406.11011, read from the probe's
side).

    difference  (loss_i(theta + eps u) - loss_i(theta)) / eps                 + O(eps)    one pass a direction
    central     (loss_i(theta + eps u) - loss_i(theta - eps u)) / (2 eps)     + O(eps**2) two
    jvp         forward-mode derivative, exact up to rounding                             two to three

Precision of the differences: the two losses agree in all but their last digits, so those passes run in float32 with
autocast and TF32 off, whatever precision training uses. Parameters kept in bfloat16 or float16 cannot hold the
perturbation and are refused; parameters in float32 under bfloat16 autocast are fine. Attention kernels that exist in
half precision only cannot run these passes. ``jvp`` subtracts nothing and takes any precision, but not shards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.aggregation import By
from cheapertraining.influence.model_access import (
    check_vocabulary,
    full_precision,
    no_trace,
    to_device,
    unit_losses,
    unwrap,
)
from cheapertraining.influence.parameters import Directions, canonical_name, select_parameters
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.sharding import Shards, local, low_precision, reshard

__all__ = ["Method", "check_precision", "forward_scores"]

Method = Literal["difference", "central", "jvp"]
METHODS = ("difference", "central", "jvp")
# Directions that go through a forward-mode pass at a time: they share the losses' own work, and each takes up as much
# memory as the largest activations.
_TOGETHER = 4
Batch = Mapping[str, torch.Tensor]
Losses = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def forward_scores(
    model: nn.Module,
    directions: Directions,
    batch: Batch,
    *,
    method: Method = "difference",
    step_size: float = 1e-4,
    base_losses: torch.Tensor | None = None,
    by: By = "sample",
) -> SampleScores:
    """Score the units of ``batch`` along each direction, by derivatives of their losses.

    Parameters are restored bit for bit; modes, generators and ``.grad`` are left as they were.

    Args:
        model: on one rank or replicated; for the differences also sharded by FSDP, where all ranks call at once, each
            with its own batch.
        directions: over parameters of ``model``, as
            :func:`~cheapertraining.influence.parameters.select_parameters` names them; not a score of NaN but NaN for
            all units comes from one that is not finite, 0 from one of length 0.
        batch: on any device.
        method: see the module.
        step_size: of the differences, relative to the norm of the parameters that ``directions`` are over:
            ``eps = step_size * |theta| / |u|``.
        base_losses: ``[N]`` summed losses of the units at the present parameters, in evaluation mode and full
            precision, as :attr:`SampleScores.losses` of an earlier call gives them; they save ``difference`` a pass.
        by: see :data:`~cheapertraining.influence.aggregation.By`.

    Raises:
        UserError: an unknown method; tokens outside the vocabulary; half precision where differences are taken; a
            sharded model or a kernel without forward-mode derivative with ``jvp``; directions over parameters that the
            model does not have.
    """
    if method not in METHODS:
        raise UserError(
            f"forward scorer: expected method {', '.join(METHODS)}, found '{method}'.{nearest(method, METHODS)}"
        )
    model = unwrap(model)
    parameters = _covered(model, directions)
    device = next(iter(parameters.values())).device
    check_vocabulary(model, batch, "influence")
    placed = to_device(batch, device)
    with no_trace(model), torch.no_grad():
        if method == "jvp":
            return _jvp(model, parameters, directions, placed, by)
        check_precision(model)

        def losses() -> tuple[torch.Tensor, torch.Tensor]:
            reshard(model)  # Else FSDP would use what it has gathered before the step.
            return unit_losses(model, placed, by)

        with full_precision(device):
            return _differences(_Perturbation(model, parameters, directions), losses, method, step_size, base_losses)


def check_precision(model: nn.Module) -> None:
    """Refuse parameters, or passes, in half precision, in which differences of losses drown.

    Raises:
        UserError: naming the first such parameter, or FSDP's mixed precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"look-ahead influence: expected parameters in float32, found {canonical_name(name)} in "
                f"{parameter.dtype}, which cannot hold the perturbation. Keep them in float32 and train with precision "
                "amp_bf16, or use method 'jvp'."
            )
    if (half := low_precision(model)) is not None:
        raise UserError(
            f"look-ahead influence: expected FSDP to gather parameters in float32, found mixed precision {half}, in "
            "which the perturbation is lost. Set param_dtype to float32."
        )


def _covered(model: nn.Module, directions: Directions) -> dict[str, nn.Parameter]:
    parameters = select_parameters(model)
    for name, tensor in directions.tensors.items():
        if name not in parameters or local(parameters[name]).shape != tensor.shape[1:]:
            found = tuple(local(parameters[name]).shape) if name in parameters else "no such trainable parameter"
            raise UserError(
                f"influence directions: expected the model's parameters, found '{name}' of shape "
                f"{tuple(tensor.shape[1:])}, where the model has {found}. Make the directions from this model."
            )
    return {name: parameters[name] for name in directions.tensors}


class _Perturbation:
    """Moves a model's parameters along directions, and back."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], directions: Directions) -> None:
        self.model = model
        self.held = {name: local(parameter) for name, parameter in parameters.items()}
        self.directions = directions
        shards = Shards(model, parameters)
        self.size = shards.norm(self.held) or 1.0
        self.lengths = [
            shards.norm({name: tensor[row] for name, tensor in directions.tensors.items()})
            for row in range(len(directions.names))
        ]

    @contextlib.contextmanager
    def restored(self) -> Iterator[Callable[[int, float], None]]:
        """Within, ``move(row, eps)`` puts the parameters at ``theta + eps * u_row``; on leaving they are ``theta``."""
        saved = {name: tensor.clone() for name, tensor in self.held.items()}

        def move(row: int, eps: float) -> None:
            for name, tensor in self.held.items():
                torch.add(saved[name], self.directions.tensors[name][row].to(tensor.dtype), alpha=eps, out=tensor)

        try:
            yield move
        finally:
            for name, tensor in self.held.items():
                tensor.copy_(saved[name])
            reshard(self.model)


def _differences(
    perturbation: _Perturbation, losses: Losses, method: Method, step_size: float, base: torch.Tensor | None
) -> SampleScores:
    tokens: torch.Tensor | None = None
    if method == "difference" and base is None:
        base, tokens = losses()
    columns: list[torch.Tensor | float] = []
    with perturbation.restored() as move:
        for row, length in enumerate(perturbation.lengths):
            if length == 0 or not math.isfinite(length):
                columns.append(0.0 if length == 0 else math.nan)
                continue
            eps = step_size * perturbation.size / length
            move(row, eps)
            ahead, tokens = losses()
            if method == "central":
                move(row, -eps)
                columns.append((ahead - losses()[0]) / (2 * eps))
            else:
                assert base is not None
                columns.append((ahead - base.to(ahead)) / eps)
    if tokens is None:  # No direction asked for a pass.
        base, tokens = losses()
    if base is None:
        base = torch.full(tokens.shape, math.nan, dtype=torch.float64, device=tokens.device)
    return SampleScores(scores=_stack(columns, tokens), tokens=tokens, losses=base.to(tokens.device).double())


def _stack(columns: list[torch.Tensor | float], tokens: torch.Tensor) -> torch.Tensor:
    """float64 ``[N, K]`` of one column a direction; a number stands for a column of it."""
    zeros = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    return torch.stack([zeros + column for column in columns], dim=1)


def _jvp(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], directions: Directions, batch: Batch, by: By
) -> SampleScores:
    shards = Shards(model, parameters)
    if shards.sharded:
        raise UserError(
            "influence method 'jvp': expected whole parameters on each rank, found them sharded by FSDP, whose "
            "gathering has no forward-mode derivative. Use method 'difference'."
        )
    model = getattr(model, "_orig_mod", model)  # A compiled graph has no forward-mode derivative either.
    size = shards.norm({name: parameter.detach() for name, parameter in parameters.items()}) or 1.0
    tensors = directions.tensors
    lengths = torch.tensor(
        [shards.norm({name: part[row] for name, part in tensors.items()}) for row in range(len(directions.names))],
        dtype=torch.float64,
        device=next(iter(parameters.values())).device,
    )
    # Tangents of the parameters' own size: half precision rounds them as it rounds the parameters.
    factors = torch.where((lengths > 0) & lengths.isfinite(), size / lengths, 1.0)
    found = []
    for first in range(0, len(factors), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        tangents = {name: _scaled(part[rows], factors[rows], parameters[name]) for name, part in tensors.items()}
        losses, slopes, tokens = _dual_pass(model, parameters, tangents, batch, by)
        found.append(slopes)
    return SampleScores(scores=(torch.cat(found) / factors[:, None]).T.contiguous(), tokens=tokens, losses=losses)


def _scaled(part: torch.Tensor, factors: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    shape = (-1, *(1 for _ in parameter.shape))
    return (part * factors.to(part.dtype).view(shape)).to(parameter.dtype)


def _dual_pass(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    tangents: Mapping[str, torch.Tensor],
    batch: Batch,
    by: By,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of the units ``[N]``, their derivatives along each tangent ``[K, N]``, and their tokens ``[N]``."""
    raw = {canonical_name(name): name for name, _ in model.named_parameters()}
    theta = {raw[name]: parameter.detach() for name, parameter in parameters.items()}

    def losses(moved: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return unit_losses(model, batch, by, moved)

    def along(tangent: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, slopes, tokens = jvp(losses, (theta,), (tangent,), has_aux=True)
        return values, slopes, tokens

    by_raw = {raw[name]: tangent for name, tangent in tangents.items()}
    out: Any = (None, 0, None)  # Losses and tokens are the same along every direction; torch's types forbid None.
    with sdpa_kernel(SDPBackend.MATH):  # The others have no forward-mode derivative.
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = vmap(along, out_dims=out)(by_raw)
    return found
