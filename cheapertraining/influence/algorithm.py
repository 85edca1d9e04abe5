"""Influence of what a Composer trainer trains on, while it trains: scores fall out of the backward pass.

    Trainer(..., algorithms=[InfluenceScores(loader.probes, loader.mixture.source_names)])

Every sample of every batch is scored against the probes; the means by source and their standard errors are logged.
Nothing of the training changes: gradients, losses and random numbers are those without it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, Precision, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import GroupSums
from cheapertraining.influence.calculator import InfluenceCalculator
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.parameters import Directions, Layers
from cheapertraining.influence.preconditioners import EKFAC
from cheapertraining.influence.probes import ProbeBank
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.timing import TimeShare

__all__ = ["FUSED_ESTIMATORS", "InfluenceScores"]

FUSED_ESTIMATORS = ("dot", "adam", "datainf", "ekfac")
"""Estimators that need nothing but what the training backward shows."""
_DATAINF_SCALE = 0.1
_STATE_VERSION = 1


class InfluenceScores(Algorithm):
    """Scores each training sample along the probes' directions, which are made anew every so many batches.

    Metrics, every ``log_interval`` batches, over the batches since the last such log:
    ``influence/score/<probe>/<source>``, the token-weighted mean (positive: training on the source lowers the probe's
    loss), and ``influence/score_se/<probe>/<source>``. Over the whole run, ``influence/total/<probe>/<source>``: the
    fall of the probe's loss, in nats, that the source's samples have brought to first order, each weighted as it
    entered its step and times the learning rate (TracIn, 2002.08484, over every step instead of checkpoints). At each
    refresh ``influence/probe_loss/<probe>``. Of all steps' time, ``influence/overhead`` is the share of directions and
    of reading the scores; how much scoring slows the passes themselves, docs/influence.md measures.

    ``datainf`` takes each microbatch as its own Fisher set; ``ekfac`` keeps its factors up on a microbatch of every
    16th batch. It and ``adam`` begin with the second batch. Composer saves the state
    of rank 0 alone, which after a resume therefore has lost what the other ranks had added to the totals since the
    last log.

    Args:
        probes: a finite loader for each.
        source_names: what the batches' ``source`` int64 ``[B]`` counts in.
        estimator: one of :data:`FUSED_ESTIMATORS`.
        layers: which parameters count, see :data:`~cheapertraining.influence.parameters.Layers`.
        probe_samples: of each probe in a direction.
        refresh_every: batches that directions serve.
        log_interval: batches between two logs.

    Raises:
        UserError: another estimator, bad probes; when training starts, layers that match nothing, a compiled model.
    """

    def __init__(
        self,
        probes: Mapping[str, DataLoader[Any]],
        source_names: Sequence[str],
        estimator: str = "adam",
        *,
        layers: Layers = "all",
        probe_samples: int = 16,
        refresh_every: int = 25,
        log_interval: int = 10,
    ) -> None:
        if estimator not in FUSED_ESTIMATORS:
            raise UserError(
                f"algorithms.influence_scores.estimator: expected one of {', '.join(FUSED_ESTIMATORS)}, found "
                f"'{estimator}'. What needs more than the training pass, tools/score_influence.py gives."
            )
        ProbeBank(probes, samples=probe_samples, refresh_every=refresh_every)  # what is wrong with them is said now
        self.estimator = estimator
        self.sources = tuple(source_names)
        self.log_interval = log_interval
        self._probes = dict(probes)
        self._options: dict[str, Any] = {
            "layers": layers,
            "probe_samples": probe_samples,
            "refresh_every": refresh_every,
        }
        self._calculator: InfluenceCalculator | None = None
        self._restored: Mapping[str, Any] | None = None
        self._directions: Directions | None = None
        self._scorer: FusedScorer | None = None
        self._armed: contextlib.ExitStack | None = None
        self._factors: list[torch.Tensor] = []
        self._time = TimeShare()
        self._device = torch.device("cpu")
        self._observed = -1

    def __repr__(self) -> str:
        # Composer saves it; without an address it is the same on every rank and in every run.
        return f"{type(self).__name__}({self.estimator})"

    def match(self, event: Event, state: State) -> bool:
        del state
        return event in (
            Event.FIT_START,
            Event.BATCH_START,
            Event.BEFORE_FORWARD,
            Event.AFTER_LOSS,
            Event.AFTER_BACKWARD,
            Event.BATCH_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if self._calculator is None or self._calculator.model is not state.model:  # else fit goes on
                self._begin(state)
        elif event == Event.BATCH_START:
            self._whole = state.batch
            self._time.begin_step()
            with self._time.part(self._device):
                self._refresh(state, logger)
        elif event == Event.BEFORE_FORWARD:
            with self._time.part(self._device):
                self._arm(state)
        elif event == Event.AFTER_LOSS:
            loss = state.loss if torch.is_tensor(state.loss) else next(iter(state.loss))
            loss.register_hook(self._factors.append)
        elif event == Event.AFTER_BACKWARD:
            with self._time.part(self._device):
                self._read(state)
        else:
            self._time.end_step()
            if int(state.timestamp.batch) % self.log_interval == 0:
                self._log(logger)

    def state_dict(self) -> dict[str, Any]:
        if self._calculator is None:  # before training
            return {**super().state_dict(), "version": _STATE_VERSION, **(self._restored or {})}
        curvature = self._calculator.preconditioner
        return {
            **super().state_dict(),
            "version": _STATE_VERSION,
            "sources": list(self.sources),
            "probes": list(self._probes),
            "window": self._window.state_dict(),
            "total": self._total,
            "recent": self._recent,
            "directions": self._calculator.state_dict(),
            "curvature": curvature.state_dict() if isinstance(curvature, EKFAC) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Go on as :meth:`state_dict` left off; with other sources or probes, begin anew."""
        del strict
        same = state.get("sources") == list(self.sources) and state.get("probes") == list(self._probes)
        self._restored, self._calculator = (state if same else None), None

    def _begin(self, state: State) -> None:
        """Parameters are only now what they will be trained as (sharded, perhaps)."""
        optimizer = state.optimizers[0]
        # DataInf's correction comes from the microbatch at hand, not from a preconditioner of the directions.
        estimator = "dot" if self.estimator == "datainf" else self.estimator
        calculator = InfluenceCalculator(state.model, self._probes, estimator, optimizer=optimizer, **self._options)
        device = next(iter(calculator.parameters.values())).device
        self._device = state.device.tensor_to_device(torch.zeros(())).device
        shape = len(self.sources), len(self._probes)
        self._calculator = calculator
        self._window = GroupSums(*shape, device)
        # float64 [G, K]: of all ranks up to the last log; of this rank since.
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._recent = torch.zeros_like(self._total)
        restored, self._restored = self._restored, None
        if restored is not None and "directions" in restored:
            calculator.load_state_dict(restored["directions"])
            self._total.copy_(restored["total"])
            if isinstance(calculator.preconditioner, EKFAC) and restored["curvature"] is not None:
                calculator.preconditioner.load_state_dict(restored["curvature"], state.model)
            if dist.get_global_rank() == 0:
                self._window.load_state_dict(restored["window"])
                self._recent.copy_(restored["recent"])

    def _refresh(self, state: State, logger: Logger) -> None:
        """Make directions where they are due, and a scorer for them."""
        calculator, step = self._calculator, int(state.timestamp.batch)
        assert calculator is not None
        curvature = calculator.preconditioner
        if (self.estimator == "adam" and step == 0) or (isinstance(curvature, EKFAC) and not curvature.ready):
            return  # There are no moments, or no factors.
        size = state.device_train_microbatch_size
        # As coarse as training, whose kernels may exist in half precision only; float16 would underflow.
        coarse = state.precision == Precision.AMP_BF16
        with get_precision_context(state.precision, state.precision_config) if coarse else contextlib.nullcontext():
            directions = calculator.refresh(step, size if isinstance(size, int) else None)
        if directions is self._directions:
            return
        scale = _DATAINF_SCALE if self.estimator == "datainf" else None
        self._directions, self._scorer = directions, FusedScorer(state.model, directions, datainf=scale)
        losses = calculator.probe_losses
        logger.log_metrics({f"influence/probe_loss/{name}": found.mean for name, found in losses.items()})

    def _arm(self, state: State) -> None:
        """Watch the microbatch that comes; one that ran out of memory is tried again with fewer samples."""
        if self._armed is not None:
            failed = RuntimeError("this microbatch was not finished")
            self._armed.__exit__(RuntimeError, failed, None)
        self._factors.clear()
        self._armed = contextlib.ExitStack()
        assert self._calculator is not None
        curvature, step = self._calculator.preconditioner, int(state.timestamp.batch)
        if isinstance(curvature, EKFAC) and self._observed != step and (curvature.wants(step) or not curvature.ready):
            self._observed = step
            tokens = int((self._whole["labels"][:, 1:] != IGNORED).sum())
            scale = float(_loss_scaler(state, self._device)) / max(1, tokens)
            self._armed.enter_context(curvature.observing(state.model, state.batch, loss_scale=scale))
        if self._scorer is not None:
            self._armed.enter_context(self._scorer.armed(state.batch))

    def _read(self, state: State) -> None:
        """Add the scores of a microbatch to its sources'."""
        if self._armed is not None:
            self._armed.close()
            self._armed = None
        if self._scorer is None:
            return
        outputs: Any = state.outputs
        tokens = outputs["sample_tokens"].sum().clamp_min(1)
        # The gradient of the mean loss is the factor with which the trainer lets this microbatch into the step.
        factor = self._factors.pop().double() / tokens
        found = self._scorer.collect(factor)
        # A loss scaler that overflows skips its step, and a microbatch without a token has no scores: neither counts.
        finite = found.scores.isfinite().all(dim=1)
        scores = torch.where(finite[:, None], found.scores.double(), 0.0)
        source = state.batch["source"]
        self._window.add(scores, found.tokens * finite, source)
        rate = float(state.optimizers[0].param_groups[0]["lr"]) / dist.get_world_size()
        step = rate / _loss_scaler(state, self._device)
        self._recent.index_add_(0, source, scores * factor * step)

    def _log(self, logger: Logger) -> None:
        """Log by source what has come since the last log, over all ranks, and forget it."""
        overhead = self._time.read()
        if self._scorer is None:
            return
        means, errors = self._window.means(over_ranks=True)
        dist.all_reduce(self._recent)
        self._total += self._recent
        self._recent.zero_()
        self._window = GroupSums(len(self.sources), self._total.shape[1], self._total.device)
        values = {"score": means, "score_se": errors, "total": self._total}
        logger.log_metrics(
            {
                f"influence/{what}/{column}/{source}": float(table[row, place])
                for what, table in ((what, table.cpu()) for what, table in values.items())
                for row, source in enumerate(self.sources)
                for place, column in enumerate(self._probes)
                if not math.isnan(float(table[row, place]))
            }
            | {"influence/overhead": overhead}
        )


def _loss_scaler(state: State, device: torch.device) -> torch.Tensor:
    """What losses are multiplied by against underflow, a scalar on the device: ``get_scale`` would wait for it."""
    one = torch.ones((), dtype=torch.float64, device=device)
    if state.scaler is None or not state.scaler.is_enabled():
        return one
    scaled: torch.Tensor = state.scaler.scale(one)
    return scaled
