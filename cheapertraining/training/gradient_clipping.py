"""Clips gradients whose norm stands out from those of the steps before (ZClip, arXiv 2504.02507).

With ``mu`` and ``sigma`` the moving mean and standard deviation of the norms *before* this step, a norm ``g`` scores
``z = (g - mu) / sigma``. Beyond the threshold ``z_max`` the gradient is scaled to the norm

    mu + z_max**2 / z * sigma,

the less the further it stands out, and never above ``mu + z_max * sigma``. The moments then take in the norm as it is
after clipping, so that a spike moves neither itself nor the limit of the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from cheapertraining.errors import UserError

__all__ = ["ZClip", "ZClipStats"]

# Norms that hardly differ have no spread to speak of: a deviation of less than this share of the mean is none.
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class ZClipStats:
    """What happened at one step.

    Attributes:
        raw_norm: norm of all gradients together before clipping, over all shards.
        clipped_norm: the same after it.
        was_clipped: whether they differ.
        z_score: of the norm; None during warm-up and for a norm that is not finite.
        ema_mean, ema_std: moments that it was scored with; None during warm-up.
    """

    raw_norm: float
    clipped_norm: float
    was_clipped: bool
    z_score: float | None = None
    ema_mean: float | None = None
    ema_std: float | None = None


class ZClip:
    """Call :meth:`clip` between the backward pass and the optimizer's step.

    Args:
        z_threshold: standard deviations above the mean from which on a norm is clipped.
        ema_decay: share of the moments that is kept at each step.
        warmup_steps: steps whose norms make the first moments; nothing is clipped during them.

    Attributes:
        ema_mean, ema_var: mean and variance of the norms; None during warm-up.

    Raises:
        UserError: a setting out of range.
    """

    def __init__(self, z_threshold: float = 3.0, ema_decay: float = 0.99, warmup_steps: int = 25) -> None:
        if not z_threshold > 0:
            raise UserError(f"ZClip: z_threshold: expected a positive number, found {z_threshold}.")
        if not 0 < ema_decay < 1:
            raise UserError(f"ZClip: ema_decay: expected a number between 0 and 1, found {ema_decay}.")
        if warmup_steps < 2:
            raise UserError(f"ZClip: warmup_steps: expected at least 2 (one has no variance), found {warmup_steps}.")
        self.z_threshold = z_threshold
        self.ema_decay = ema_decay
        self.warmup_steps = warmup_steps
        self.ema_mean: float | None = None
        self.ema_var: float | None = None
        self._warmup: list[float] = []

    def clip(self, model: nn.Module) -> ZClipStats:
        """Clip the gradients of ``model`` in place. Call it on all ranks; all of them do the same.

        Gradients whose norm is not finite are left alone and not remembered.

        Args:
            model: plain, in DDP, in FSDP, or with DTensor parameters (FSDP2, tensor parallelism).
        """
        norm = _global_norm(model)
        if not math.isfinite(norm):
            return ZClipStats(norm, norm, False, None, self.ema_mean, self._std())
        if self.ema_mean is None:
            self._warm_up(norm)
            return ZClipStats(norm, norm, False)
        mean, std = self.ema_mean, cast(float, self._std())
        score = (norm - mean) / max(std, _LEAST_SPREAD * mean, 1e-30)
        limit = norm
        if score > self.z_threshold:
            limit = mean + self.z_threshold**2 / score * std
            for gradient in _gradients(model):
                gradient.mul_(limit / norm)
        self._remember(limit)
        return ZClipStats(norm, limit, limit < norm, score, mean, std)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"ema_mean": self.ema_mean, "ema_var": self.ema_var, "warmup": list(self._warmup)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off."""
        self.ema_mean, self.ema_var = state["ema_mean"], state["ema_var"]
        self._warmup = list(state["warmup"])

    def _std(self) -> float | None:
        return None if self.ema_var is None else math.sqrt(self.ema_var)

    def _warm_up(self, norm: float) -> None:
        self._warmup.append(norm)
        if len(self._warmup) < self.warmup_steps:
            return
        mean = math.fsum(self._warmup) / len(self._warmup)
        self.ema_mean = mean
        self.ema_var = math.fsum((each - mean) ** 2 for each in self._warmup) / len(self._warmup)
        self._warmup = []

    def _remember(self, norm: float) -> None:
        keep, take = self.ema_decay, 1 - self.ema_decay
        self.ema_mean = keep * cast(float, self.ema_mean) + take * norm
        self.ema_var = keep * cast(float, self.ema_var) + take * (norm - self.ema_mean) ** 2


def _gradients(model: nn.Module) -> Iterable[torch.Tensor]:
    return (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def _global_norm(model: nn.Module) -> float:
    """Norm of all gradients together, the same on all ranks, sharded or not."""
    if type(model).__name__ == "FullyShardedDataParallel":
        # Its own method alone knows which shards are replicas; an infinite limit clips nothing.
        return float(cast(Any, model).clip_grad_norm_(math.inf))
    squares = 0.0
    plain: list[torch.Tensor] = []
    sharded: dict[Any, list[torch.Tensor]] = {}
    for gradient in _gradients(model):
        mesh = getattr(gradient, "device_mesh", None)
        (plain if mesh is None else sharded.setdefault(mesh, [])).append(gradient)
    for group in [plain, *sharded.values()]:
        norm: Any = torch.nn.utils.get_total_norm(group)
        squares += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
    return math.sqrt(squares)
