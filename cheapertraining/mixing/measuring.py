"""What a strategy needs to have measured, in a plain loop: made for its needs, and asked when an update is due."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence.probes import ProbeBank
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.forward import check_precision
from cheapertraining.influence.scorers.gram import GradientEstimator, SourceGradients
from cheapertraining.influence.scorers.sources import SourceEstimator
from cheapertraining.influence.settings import InfluenceConfig
from cheapertraining.mixing.signals import GRAM, INFLUENCE, PROBE_LOSSES, PROBE_PRODUCTS, ProbeReading

__all__ = ["Measured", "Measuring", "check_forward", "read_probes"]


@dataclass(frozen=True)
class Measured:
    """Signals of one decision; None where the strategy has no need of them."""

    influence: SourceInfluence | None
    gradients: SourceGradients | None
    probe_losses: ProbeReading | None


@dataclass(frozen=True)
class Measuring:
    """What measures; None likewise."""

    estimator: SourceEstimator | None
    gradients: GradientEstimator | None
    bank: ProbeBank | None

    @classmethod
    def of(
        cls,
        config: InfluenceConfig,
        needs: Set[str],
        mixture: Any,
        probes: Mapping[str, DataLoader[Any]],
        probe_weights: Mapping[str, float] | None,
    ) -> Measuring:
        """Make what ``needs`` names.

        Raises:
            UserError: settings that do not go together, bad probes.
        """
        estimator = gradients = bank = None
        if INFLUENCE in needs:
            estimator = SourceEstimator(
                mixture,
                probes,
                probe_weights,
                probe_samples=config.probe_samples,
                source_samples=config.source_samples,
                metric=config.metric,
                scorer=config.scorer,
                damping=config.lambda_reg,
                step_size=config.step_size,
                seed=config.seed,
                combine=config.combine,
                layers=config.layers,
            )
        if needs & {PROBE_LOSSES, PROBE_PRODUCTS}:
            bank = ProbeBank(probes, probe_weights, config.probe_samples)
        if GRAM in needs:
            probed = bank if PROBE_PRODUCTS in needs else None
            gradients = GradientEstimator(mixture, config.source_samples, config.seed, config.layers, probed)
        return cls(estimator, gradients, bank if PROBE_LOSSES in needs else None)

    def measure(
        self, model: nn.Module, optimizer: Optimizer | None, update_index: int, microbatch_size: int | None
    ) -> Measured:
        """Measure now, on all ranks, between optimizer steps.

        Raises:
            UserError: what is measured is not finite, or cannot be measured.
        """
        influence = gradients = reading = None
        if self.estimator is not None:
            influence = self.estimator.measure(
                model, optimizer, update_index=update_index, microbatch_size=microbatch_size
            )
            _check_finite(influence)
        if self.gradients is not None:
            gradients = self.gradients.measure(model, update_index=update_index, microbatch_size=microbatch_size)
        if self.bank is not None:
            reading = read_probes(self.bank, model, microbatch_size)
        return Measured(influence, gradients, reading)


def read_probes(bank: ProbeBank, model: nn.Module, microbatch_size: int | None) -> ProbeReading:
    """The probes' losses on the same samples each time, the first window of each. Call it on all ranks."""
    losses = bank.losses(model, 0, microbatch_size)
    weights = np.array([bank.weights[name] for name in bank.names])
    return ProbeReading(bank.names, weights, np.array([losses[name].mean for name in bank.names]))


def check_forward(model: nn.Module) -> None:
    """Say now, and not at the first update, that forward passes cannot measure this model."""
    try:
        check_precision(model)
    except UserError as error:
        raise UserError(f"{error} Or measure by a backward pass: InfluenceConfig(scorer='hook').") from error


def _check_finite(measured: SourceInfluence) -> None:
    stays = "The mixture's weights stay as they were."
    for name, loss in zip(measured.probes, measured.probe_losses, strict=True):
        if not np.isfinite(loss):
            raise UserError(f"probe '{name}': expected a finite loss, found {loss}: the model has diverged. {stays}")
    for direction, scores, errors in zip(measured.directions, measured.scores, measured.errors, strict=True):
        for source, score, error in zip(measured.sources, scores, errors, strict=True):
            if not (np.isfinite(score) and np.isfinite(error)):
                raise UserError(
                    f"influence of source '{source}' on probe '{direction}': expected a finite number, found {score} "
                    f"(standard error {error}). {stays}"
                )
