"""Is anything wrong? Norms, time lost to waiting for data, loss spikes, numbers that are not finite.

RunHealth(interval=10)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

import math
import resource
import sys
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
from cheapertraining.observe.events import EVENTS, NONFINITE, SPIKES

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
    """Log ``gradient/norm``, ``weight/norm``, ``time/data_wait``, ``memory/host_peak`` and the counts ``event/*``.

    All of it every ``interval`` batches; a loss spike or a loss that is not finite at once, with a line on the console
    (of several in a row, one). Between two lines nothing waits for the device. The norm is that of gradient clipping
    where it is on; without, gradients that are not finite are seen at the lines alone.

    Args:
        interval: batches between lines.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._spike = SpikeDetector()
        self._spikes = 0
        self._nonfinite = 0
        # On the device: whether the gradient of the batch at hand is bad, and in how many batches it was that are not
        # counted yet.
        self._bad: torch.Tensor | None = None
        self._unread: torch.Tensor | None = None
        self._infinite = self._streak = 0  # batches in a row without a finite loss, and spikes: the first is told
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
        # Without clipping it is looked at now and then alone.
        self._bad = None if self._norm is None else (~self._norm.isfinite()).long()

    def batch_end(self, state: State, logger: Logger) -> None:
        batch, before = state.timestamp.batch.value, (self._spikes, self._nonfinite)
        loss = state.total_loss_dict.get("loss/train/total")
        words = None if loss is None else self._look_at(loss)
        if words is not None:
            self._say(batch, words)
        if batch % self.interval == 0:
            self._log(state, logger)
        elif before != (self._spikes, self._nonfinite):
            logger.log_metrics(self._counts(batch))

    def _look_at(self, loss: float) -> str | None:
        """Count what is wrong with a batch, and put it in words where they are news."""
        if not math.isfinite(loss):
            self._nonfinite += 1
            self._infinite += 1
            self._bad = None  # the same batch is not counted twice
            return f"the loss is not finite ({loss}). {EVENTS[NONFINITE].advice}" if self._infinite == 1 else None
        self._infinite = 0
        if self._bad is not None:
            self._unread = self._bad if self._unread is None else self._unread + self._bad
            self._bad = None
        if not self._spike(loss):
            self._streak = 0
            return None
        self._spikes += 1
        self._streak += 1
        words = f"loss spike: {loss:.3f}, where the mean of late was {self._spike.mean:.3f}. {EVENTS[SPIKES].advice}"
        return words if self._streak == 1 else None

    def _say(self, batch: int, words: str) -> None:
        if dist.get_global_rank() == 0:
            say(f"batch {batch}: {words}")

    def _log(self, state: State, logger: Logger) -> None:
        now = time.perf_counter()
        metrics = self._counts(state.timestamp.batch.value)
        metrics["memory/host_peak"] = _host_peak()
        metrics["time/data_wait"] = self._waited / max(now - self._since, 1e-9)
        self._since, self._waited = now, 0.0
        if (norm := parameter_norm(state.model)) is not None:
            metrics["weight/norm"] = norm
        if self._norm is not None:
            metrics["gradient/norm"] = float(self._norm)
            self._norm = None
        logger.log_metrics(metrics)

    def _counts(self, batch: int) -> dict[str, float]:
        bad = self._read()
        if bad and not self._infinite:  # of a loss that is not finite either, it was said
            self._say(batch, f"gradients were not finite, batches of late: {bad}. {EVENTS[NONFINITE].advice}")
        return {SPIKES: float(self._spikes), NONFINITE: float(self._nonfinite)}

    def _read(self) -> int:
        """Count the batches that the device knows of; returns how many."""
        bad = 0 if self._unread is None else int(self._unread)
        self._nonfinite += bad
        self._unread = None
        return bad


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


def _host_peak() -> float:
    """GB; Linux counts it in KiB, macOS in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def _square_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    tensors = [parameter.detach() for parameter in parameters]
    norm: torch.Tensor = torch.nn.utils.get_total_norm(tensors).double()
    return norm**2
