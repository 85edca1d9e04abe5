"""Is anything wrong? Norms, time lost to waiting for data, loss spikes, numbers that are not finite.

RunHealth(interval=10)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from cheapertraining.distributed.algorithm import GradientClipping
from cheapertraining.distributed.clipping import clip_gradient_norm
from cheapertraining.observe.console import say

__all__ = ["RunHealth", "SpikeDetector", "parameter_norm"]


class SpikeDetector:
    """Tells losses that stand out from those of the batches before.

    A loss is a spike where it lies more than ``threshold`` standard deviations above the moving mean, both of which
    forget at ``decay`` a batch. A spike itself counts for neither.

    Args:
        threshold: standard deviations.
        decay: share of mean and variance kept at each batch.
        warmup: batches before the first can be a spike.
    """

    def __init__(self, threshold: float = 6.0, decay: float = 0.95, warmup: int = 20) -> None:
        self.threshold, self.decay, self.warmup = threshold, decay, warmup
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def __call__(self, loss: float) -> bool:
        """Take in a finite loss, nats per token; whether it is a spike."""
        # Below a thousandth of the mean a loss has no spread to speak of.
        spread = max(math.sqrt(self.variance), 1e-3 * abs(self.mean))
        if self.seen >= self.warmup and loss > self.mean + self.threshold * spread:
            return True
        keep = min(
            self.decay, self.seen / (self.seen + 1)
        )  # the plain mean and variance until there is enough to forget
        difference = loss - self.mean
        self.mean += (1 - keep) * difference
        self.variance = keep * (self.variance + (1 - keep) * difference**2)
        self.seen += 1
        return False


class RunHealth(Callback):
    """Log ``gradient/norm``, ``weight/norm``, ``time/data_wait`` and the counts ``event/*``.

    All of it every ``interval`` batches; a loss spike or a loss that is not finite at once, with a line on the console.
    Between two lines nothing waits for the device. The norm is that of gradient clipping where it is on.

    Args:
        interval: batches between lines.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._spike = SpikeDetector()
        self._spikes = 0
        self._nonfinite = 0
        self._unread: torch.Tensor | None = None  # gradients that were not finite, counted on the device
        self._norm: torch.Tensor | None = None
        self._wait_started = 0.0
        self._waited = 0.0
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Counts and moments; JSON-able."""
        self._read()
        detector = self._spike
        moments = [detector.seen, detector.mean, detector.variance]
        return {"spikes": self._spikes, "nonfinite": self._nonfinite, "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off."""
        self._spikes, self._nonfinite = int(state["spikes"]), int(state["nonfinite"])
        seen, self._spike.mean, self._spike.variance = state["moments"]
        self._spike.seen = int(seen)

    def fit_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._since, self._waited = time.perf_counter(), 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        del state, logger
        self._wait_started = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        del state, logger
        self._waited += time.perf_counter() - self._wait_started

    def after_train_batch(self, state: State, logger: Logger) -> None:
        del logger
        clipping = next((each for each in state.algorithms if isinstance(each, GradientClipping)), None)
        if clipping is not None:
            self._norm = clipping.norm
        elif (state.timestamp.batch.value + 1) % self.interval == 0:
            self._norm = clip_gradient_norm(state.model, math.inf)
        if self._norm is not None:
            bad = (~self._norm.isfinite()).long()
            self._unread = bad if self._unread is None else self._unread + bad

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        event = self._look_at(state.total_loss_dict.get("loss/train/total"))
        if event is not None and dist.get_global_rank() == 0:
            say(f"batch {batch}: {event}")
        if batch % self.interval == 0:
            self._log(state, logger)
        elif event is not None:
            logger.log_metrics(self._counts())

    def _look_at(self, loss: float | None) -> str | None:
        """Count what is wrong with a batch's loss, and put it in words."""
        if loss is None:
            return None
        if not math.isfinite(loss):
            self._nonfinite += 1
            return (
                f"the loss is not finite ({loss}). If that stays so, resume from a checkpoint with a lower optimizer.lr"
            )
        if self._spike(loss):
            self._spikes += 1
            return f"loss spike: {loss:.3f}, where the mean of late was {self._spike.mean:.3f}"
        return None

    def _log(self, state: State, logger: Logger) -> None:
        now = time.perf_counter()
        metrics = self._counts()
        metrics["time/data_wait"] = self._waited / max(now - self._since, 1e-9)
        self._since, self._waited = now, 0.0
        if (norm := parameter_norm(state.model)) is not None:
            metrics["weight/norm"] = norm
        if self._norm is not None:
            metrics["gradient/norm"] = float(self._norm)
            self._norm = None
        logger.log_metrics(metrics)

    def _counts(self) -> dict[str, float]:
        self._read()
        return {"event/loss_spikes": float(self._spikes), "event/nonfinite": float(self._nonfinite)}

    def _read(self) -> None:
        if self._unread is not None:
            self._nonfinite += int(self._unread)
            self._unread = None


def parameter_norm(model: nn.Module) -> float | None:
    """Euclidean norm of all parameters together, the same on all ranks; call it on all of them.

    None for a model whose ranks hold different layers (a pipeline), which no rank can tell for all.

    Args:
        model: plain, in DDP, with FSDP1 inside, or with DTensor parameters (FSDP2, tensor parallelism).
    """
    if hasattr(model, "clip_gradients"):
        return None
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" and cast(Any, module).check_is_root():
            own = _square_norm(module.parameters())  # of this rank's shard
            torch.distributed.all_reduce(own, group=cast(Any, module).process_group)
            return math.sqrt(float(own))
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter.detach())
    total = 0.0
    for tensors in by_mesh.values():
        norm: Any = torch.nn.utils.get_total_norm(tensors)
        total += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
    return math.sqrt(total)


def _square_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    tensors = [parameter.detach() for parameter in parameters]
    norm: torch.Tensor = torch.nn.utils.get_total_norm(tensors).double()
    return norm**2
