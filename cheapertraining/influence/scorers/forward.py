"""Forward-only look-ahead: the influence of every sample from two forward passes along a direction.

``<g_i, u>`` is the derivative of sample ``i``'s loss along ``u``, so

    <g_i, u> = (loss_i(theta + eps * u) - loss_i(theta - eps * u)) / (2 * eps) + O(eps**2)

gives it for all samples of a batch at once: no backward pass, no per-sample gradient, nothing stored, and
    exact for tied
weights, norms and any attention kernel (the idea is that of In-Run Data Shapley's first-order term, arXiv
2406.11011, read from the probe's side).

Precision: the two losses agree in all but their last digits, so the perturbed passes run in float32 with
autocast and TF32 off, whatever precision training uses. Parameters kept in bfloat16 or float16 cannot hold
the perturbation and are refused; parameters in float32 under bfloat16 autocast are fine. Attention kernels
that exist in half precision only cannot run these passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import (
    full_precision,
    no_trace,
    sample_losses,
    to_device,
    trainable_parameters,
    unwrap,
)
from cheapertraining.influence.probes import (
    Direction,
    ProbeBank,
    ProbeLosses,
    adam_direction,
    rank_rows,
    sum_over_ranks,
)
from cheapertraining.influence.scorers import COMBINED, SourceInfluence

__all__ = ["LookAheadEstimator", "SampleSource", "directional_derivatives"]

Batch = Mapping[str, torch.Tensor]
METRICS = ("raw", "adam")
_STATE_VERSION = 1
_SEEDS = 1 << 31  # Keys are 64 bits wide: the seed above, the update below.
_MODEL_INPUTS = ("input_ids", "labels", "position_ids")


class SampleSource(Protocol):
    """Where samples of each source are drawn from, off the training order; ``MixedDataset`` is one."""

    @property
    def source_names(self) -> tuple[str, ...]: ...

    def draw(self, source: str, n: int, key: int) -> dict[str, torch.Tensor]: ...


def directional_derivatives(
    model: nn.Module, direction: Direction, batches: Sequence[Batch], step_size: float = 1e-4
) -> torch.Tensor:
    """Derivative of each sample's summed loss along ``direction``, by a central difference.

    Runs without gradients in full precision; the parameters are restored bit for bit. The caller sets the
    model's mode.

    Args:
        model: unwrapped.
        direction: one tensor for each trainable parameter.
        batches: batch dicts on any device.
        step_size: distance of the two points from ``theta``, relative to the norm of ``theta``:
            ``eps = step_size * |theta| / |direction|``.

    Returns:
        float64 ``[N]`` over the samples of all batches, in nats per unit of ``direction``; zeros for a zero
        direction, NaN for one that is not finite.
    """
    parameters = trainable_parameters(model)
    device = parameters[0].device
    length, size = _norm(direction), _norm([parameter.detach() for parameter in parameters])
    count = sum(len(batch["labels"]) for batch in batches)
    if length == 0 or not math.isfinite(length):
        return torch.full((count,), 0.0 if length == 0 else math.nan, dtype=torch.float64, device=device)
    eps = step_size * (size or 1.0) / length
    difference = torch.zeros(count, dtype=torch.float64, device=device)
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad(), full_precision(device):
            for sign in (1.0, -1.0):
                for parameter, kept, part in zip(parameters, saved, direction, strict=True):
                    parameter.copy_(torch.add(kept, part, alpha=sign * eps))
                losses = [sample_losses(model, to_device(batch, device))[0] for batch in batches]
                difference += sign * torch.cat(losses)
    finally:
        with torch.no_grad():
            for parameter, kept in zip(parameters, saved, strict=True):
                parameter.copy_(kept)
    return difference / (2 * eps)


class LookAheadEstimator:
    """Measures, for each source, what training on it would do to each probe.

    One direction is made for each probe, so a measurement costs, for ``P`` probes and ``K`` sources, a
    forward and backward pass over ``P * probe_samples`` samples and a forward pass over ``2 * P * K *
    source_samples``. With ``combine`` there is one direction, the gradient of the weighted sum of the probes'
    losses, and the second term loses its ``P``. All of it is spread over the ranks. Memory: twice the
    trainable parameters.

    Args:
        mixture: gives ``source_names`` and ``draw``.
        probes: a finite loader for each probe.
        probe_weights: weight of each probe's loss in the objective, any scale; default equal.
        probe_samples: samples of each probe in a measurement.
        source_samples: samples of each source in a measurement, over all ranks; at least 2, or no error could
            be told.
        metric: ``raw``, the gradient itself (what a unit step of gradient descent does), or ``adam``,
            preconditioned by the optimizer's second moments. Not offered: ``cosine``, which needs the norm of
            each source's gradient, and forward passes do not give it.
        step_size: see :func:`directional_derivatives`.
        seed: of the samples drawn.
        combine: one direction for all probes together.

    Raises:
        UserError: an unknown metric, a bad count or step size, bad probes.
    """

    def __init__(
        self,
        mixture: SampleSource,
        probes: Mapping[str, DataLoader[Any]],
        probe_weights: Mapping[str, float] | None = None,
        *,
        probe_samples: int = 8,
        source_samples: int = 4,
        metric: str = "raw",
        step_size: float = 1e-4,
        seed: int = 0,
        combine: bool = False,
    ) -> None:
        _check_metric(metric)
        if source_samples < 2:
            raise UserError(f"source_samples: expected at least 2 (one has no standard error), found {source_samples}.")
        if not 0 < step_size < 1:
            raise UserError(f"step_size: expected a relative step between 0 and 1, such as 1e-4, found {step_size}.")
        self.bank = ProbeBank(probes, probe_weights, probe_samples)
        self.mixture = mixture
        self.source_samples = source_samples
        self.metric = metric
        self.step_size = step_size
        self.seed = seed
        self.combine = combine
        # Per probe: sample index -> (loss sum, tokens) at the last measurement.
        self._last: dict[str, dict[int, tuple[float, float]]] = {}

    def measure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        update_index: int,
        microbatch_size: int | None = None,
    ) -> SourceInfluence:
        """Measure now. Call it on all ranks with the same ``update_index``, between optimizer steps.

        Parameters, gradients, modes, random generators and the optimizer are afterwards as before, bit for
        bit.

        Args:
            model: any ``nn.Module`` that :func:`~cheapertraining.influence.model_access.sample_losses` can
                call; replicated (``DistributedDataParallel``) or on one rank.
            optimizer: needed by the ``adam`` metric.
            update_index: number of the measurement; says which samples are used.
            microbatch_size: samples in a pass; default all that fall to this rank.

        Raises:
            UserError: half-precision parameters, or ``adam`` without Adam's moments.
        """
        started = time.perf_counter()
        model = unwrap(model)
        _check_precision(model)
        losses: dict[str, ProbeLosses] = {}
        with no_trace(model):
            batches, places = self._source_rows(update_index, microbatch_size)
            directions = self._directions(model, optimizer, update_index, microbatch_size, losses)
            derivatives = [directional_derivatives(model, u, batches, self.step_size) for u in directions]
        scores, errors = self._per_source(torch.stack(derivatives), batches, places)
        return SourceInfluence(
            sources=tuple(self.mixture.source_names),
            directions=(COMBINED,) if self.combine else self.bank.names,
            scores=scores,
            errors=errors,
            samples=self.source_samples,
            probes=self.bank.names,
            probe_weights=np.array(list(self.bank.weights.values())),
            probe_losses=np.array([losses[name].mean for name in self.bank.names]),
            probe_changes=np.array([self._change(name, losses[name]) for name in self.bank.names]),
            seconds=time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: what the next measurement compares the probes' losses with."""
        last = {name: [[index, *pair] for index, pair in seen.items()] for name, seen in self._last.items()}
        return {"version": _STATE_VERSION, "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`; probes that no longer exist are forgotten."""
        self._last = {
            name: {int(index): (total, tokens) for index, total, tokens in seen}
            for name, seen in state["last"].items()
            if name in self.bank.names
        }

    def _source_rows(
        self, update_index: int, microbatch_size: int | None
    ) -> tuple[list[Batch], list[tuple[int, float]]]:
        """This rank's share of the samples, in passes, and each row's place in ``[K * source_samples]``."""
        names, per_source = self.mixture.source_names, self.source_samples
        places = rank_rows(len(names) * per_source)
        wanted: dict[int, list[int]] = {}
        for place, _ in places:
            wanted.setdefault(place // per_source, []).append(place % per_source)
        # rank_rows fills up with row 0 at the end, so group by source and put the rows back in the order of
        # ``places``.
        drawn = {k: self.mixture.draw(names[k], per_source, (self.seed % _SEEDS << 32) + update_index) for k in wanted}
        inputs = [name for name in _MODEL_INPUTS if all(name in batch for batch in drawn.values())]
        whole = {
            name: torch.stack([drawn[place // per_source][name][place % per_source] for place, _ in places])
            for name in inputs
        }
        size = microbatch_size or len(places)
        cuts = range(0, len(places), size)
        return [{name: rows[cut : cut + size] for name, rows in whole.items()} for cut in cuts], places

    def _directions(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        update_index: int,
        microbatch_size: int | None,
        losses: dict[str, ProbeLosses],
    ) -> Iterator[Direction]:
        """One direction after another, so that one is in memory at a time; fills ``losses`` on the way."""
        combined: Direction | None = None
        for name, weight in self.bank.weights.items():
            gradient, losses[name] = self.bank.gradient(model, name, update_index, microbatch_size)
            if not self.combine:
                yield self._precondition(model, gradient, optimizer)
                continue
            weighted = [part.mul_(weight) for part in gradient]
            combined = weighted if combined is None else [a.add_(b) for a, b in zip(combined, weighted, strict=True)]
        if combined is not None:
            yield self._precondition(model, combined, optimizer)

    def _precondition(
        self, model: nn.Module, gradient: Direction, optimizer: torch.optim.Optimizer | None
    ) -> Direction:
        if self.metric == "raw":
            return gradient
        if optimizer is None:
            raise UserError("metric 'adam': expected the optimizer, found none. Pass it to measure(), or use 'raw'.")
        return adam_direction(model, gradient, optimizer)

    def _per_source(
        self, derivatives: torch.Tensor, batches: Sequence[Batch], places: Sequence[tuple[int, float]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Token-weighted mean of each source and its standard error (a ratio of means), each ``[D, K]``."""
        device, n = derivatives.device, self.source_samples
        counted = torch.tensor([counts for _, counts in places], dtype=torch.float64, device=device)
        tokens = torch.cat([(batch["labels"][:, 1:] != IGNORED).sum(dim=1) for batch in batches]).to(device)
        table = torch.zeros(
            len(derivatives) + 1, len(self.mixture.source_names) * n, dtype=torch.float64, device=device
        )
        rows = torch.cat([derivatives, tokens.double()[None]]) * counted
        table.index_add_(1, torch.tensor([place for place, _ in places], device=device), rows)
        sum_over_ranks(table)
        by_sample = table.cpu().numpy().reshape(len(table), -1, n)
        slopes, lengths = by_sample[:-1], by_sample[-1]
        total = np.maximum(lengths.sum(axis=1), 1.0)
        scores = slopes.sum(axis=2) / total
        residuals = slopes - scores[:, :, None] * lengths
        return scores, np.sqrt(n / (n - 1) * (residuals**2).sum(axis=2)) / total

    def _change(self, name: str, losses: ProbeLosses) -> float:
        now = {
            index: (float(total), float(tokens))
            for index, total, tokens in zip(losses.indices, losses.sums, losses.tokens, strict=True)
        }
        before, self._last[name] = self._last.get(name, {}), now
        common = [index for index in now if index in before]
        tokens = sum(now[index][1] for index in common)
        if not tokens:
            return math.nan
        return sum(now[index][0] - before[index][0] for index in common) / tokens


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _check_metric(metric: str) -> None:
    if metric in METRICS:
        return
    if metric == "cosine":
        raise UserError(
            "algorithms.online_mixing.influence.metric: 'cosine' needs the norm of each source's gradient, "
            "which forward passes do not give. Use 'raw' or 'adam'."
        )
    raise UserError(
        f"algorithms.online_mixing.influence.metric: expected one of {', '.join(METRICS)}, found '{metric}'."
        f"{nearest(metric, METRICS)}"
    )


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"look-ahead influence: expected parameters in float32, found {name} in {parameter.dtype}, "
                "which cannot hold the perturbation. Keep them in float32 and train with precision amp_bf16."
            )
