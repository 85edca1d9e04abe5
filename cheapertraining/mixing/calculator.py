"""The controller for plain loops: a model, probes and a mixture; measure, decide, act.

    calculator = MixtureWeightCalculator(model, probe_dataloaders=loader.probes)
    optimizer = InfluenceAwareOptimizer(optimizer, calculator, loader.mixture, update_interval=100)

The same controller, strategy and constraints as in ``OnlineMixing``, Composer's algorithm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.forward import check_precision
from cheapertraining.influence.scorers.sources import SourceEstimator
from cheapertraining.influence.settings import InfluenceConfig
from cheapertraining.mixing.agreement import agreed
from cheapertraining.mixing.constraints import Constraints
from cheapertraining.mixing.controller import MixtureController
from cheapertraining.mixing.strategies import InfluenceStrategy

__all__ = ["MixtureWeightCalculator", "create_mixture_calculator"]

_STATE_VERSION = 1
_SINGLE = "probe"
Probes = Mapping[str, "DataLoader[Any]"]


class MixtureWeightCalculator:
    """Measures what each source does to the loss on the probes, and moves the weights of a mixture accordingly.

    Nothing is remembered of the probes' gradients: each measurement takes them anew from the model as it is then.

    Args:
        model: what is trained.
        probe_dataloader: a finite loader of the target, or a mapping of several by name.
        influence_config: how to measure and how to move; default :class:`InfluenceConfig`'s values.
        probe_dataloaders: several probes by name, each with a direction of its own; instead of ``probe_dataloader``.
        probe_weights: weight of each probe's loss in the objective, by name, on any scale; default equal.
        horizon_tokens: tokens (padding included) of the whole run, from which caps on passes over a source are spread
            over the run; default: the mixture enforces its caps, but they are not looked ahead to.

    Raises:
        UserError: no module, no probe, or a probe without a length.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_dataloader: DataLoader[Any] | Probes | None = None,
        influence_config: InfluenceConfig | Mapping[str, Any] | None = None,
        *,
        probe_dataloaders: Probes | None = None,
        probe_weights: Mapping[str, float] | None = None,
        horizon_tokens: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(
                f"MixtureWeightCalculator: model: expected a torch.nn.Module, found {type(model).__name__}. Give it "
                "the model and its probes; the estimator is made here."
            )
        self.model = model
        self.influence_config = InfluenceConfig.of(influence_config)
        self.probes = _named_probes(probe_dataloader, probe_dataloaders)
        self.probe_weights = probe_weights
        self.horizon_tokens = horizon_tokens
        self._parts: tuple[MixtureController, SourceEstimator] | None = None

    @property
    def controller(self) -> MixtureController:
        """What decides; its ``history`` has every decision with the scores behind it.

        Raises:
            UserError: there is no mixture yet.
        """
        return self._attached()[0]

    def attach(self, mixture: Any, *, learning_rate: float = 0.2, interval: int = 1000) -> None:
        """Begin with a mixture; ``InfluenceAwareOptimizer`` does it.

        Args:
            mixture: a ``cheapertraining.data.MixedDataset``, or what has its methods.
            learning_rate: how far an update moves the logarithm of a weight, for a score of typical size.
            interval: steps between updates, for the prediction of what they do.

        Raises:
            UserError: the mixture or the model cannot be measured so, or the weights do not fit the bounds.
        """
        needed = ("source_names", "draw", "set_weights", "consumed", "lag")
        if missing := [name for name in needed if not hasattr(mixture, name)]:
            raise UserError(
                "mixed_dataset: expected a cheapertraining.data.MixedDataset such as get_loader(...).mixture, found "
                f"{type(mixture).__name__} (without {', '.join(missing)})."
            )
        config = self.influence_config
        if config.scorer == "forward":
            _check_forward(self.model)
        controller = MixtureController(
            mixture,
            InfluenceStrategy(learning_rate, config.ema, config.threshold),
            Constraints(config.floor, config.ceiling, config.kl_step),
            interval=interval,
            warmup=0,
            horizon_tokens=self.horizon_tokens or 0,
        )
        estimator = SourceEstimator(
            mixture,
            self.probes,
            self.probe_weights,
            probe_samples=config.probe_samples,
            source_samples=config.source_samples,
            metric=config.metric,
            scorer=config.scorer,
            damping=config.lambda_reg,
            step_size=config.step_size,
            seed=config.seed,
            combine=config.combine,
        )
        self._parts = controller, estimator

    def update(self, optimizer: Optimizer | None = None) -> dict[str, float]:
        """Measure and decide; new weights count ``lag`` batches from now. Call it on all ranks, between steps.

        Args:
            optimizer: read where the metric is ``adam``, and for the prediction of what the update does.

        Returns:
            The newest weights of the mixture, by source.

        Raises:
            UserError: a loss or a score is not finite, or the model cannot be measured. Weights, model and the
                calculator's own state are then as before.
        """
        with self._restored(only_on_failure=True):
            weights, measured = self._decide(optimizer)
            learning_rate = None if optimizer is None else float(optimizer.param_groups[0]["lr"])
            self.controller.commit(self.controller.mixture.consumed, weights, measured, learning_rate)
        return self.controller.mixture.get_current_weights()

    def compute_mixture_weights(self, optimizer: Optimizer | None = None) -> dict[str, float]:
        """The weights that :meth:`update` would set now; nothing is changed by asking.

        Raises:
            UserError: as :meth:`update`.
        """
        with self._restored():
            weights, _ = self._decide(optimizer)
        return self.controller.mixture.get_current_weights() if weights is None else weights

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: what the next decision depends on, besides the mixture and the model."""
        controller, estimator = self._attached()
        return {
            "version": _STATE_VERSION,
            "controller": controller.state_dict(),
            "estimator": estimator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off. The mixture restores its own state.

        Raises:
            UserError: the state is of other sources.
        """
        controller, estimator = self._attached()
        controller.load_state_dict(state["controller"])
        estimator.load_state_dict(state["estimator"])

    def _attached(self) -> tuple[MixtureController, SourceEstimator]:
        if self._parts is None:
            raise UserError(
                "MixtureWeightCalculator: no mixture to measure yet. Pass it to InfluenceAwareOptimizer with the "
                "mixture, or call attach(mixture)."
            )
        return self._parts

    def _decide(self, optimizer: Optimizer | None) -> tuple[dict[str, float] | None, SourceInfluence]:
        controller, estimator = self._attached()
        measured = estimator.measure(
            self.model,
            optimizer,
            update_index=controller.measurements,
            microbatch_size=self.influence_config.microbatch_size,
        )
        _check_finite(measured)
        wish = controller.propose(controller.mixture.consumed, measured)
        return agreed(wish, controller.source_names), measured

    @contextlib.contextmanager
    def _restored(self, *, only_on_failure: bool = False) -> Iterator[None]:
        """On leaving, put back what a decision advances."""
        state, history = self.state_dict(), list(self.controller.history)
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed or not only_on_failure:
                self.load_state_dict(state)
                self.controller.history[:] = history


def create_mixture_calculator(
    model: nn.Module,
    probe_dataloader: DataLoader[Any] | Probes | None = None,
    config: InfluenceConfig | Mapping[str, Any] | None = None,
) -> MixtureWeightCalculator:
    """Make a :class:`MixtureWeightCalculator`; its name as a function, as other packages call it."""
    return MixtureWeightCalculator(model, probe_dataloader, config)


def _named_probes(one: DataLoader[Any] | Probes | None, several: Probes | None) -> dict[str, DataLoader[Any]]:
    if (one is None) == (several is None):
        found = "neither" if one is None else "both"
        raise UserError(
            f"MixtureWeightCalculator: expected either probe_dataloader or probe_dataloaders, found {found}. Probes "
            "are the target that the mixture is steered towards, such as get_loader(...).probes."
        )
    given = one if one is not None else several
    probes = dict(given) if isinstance(given, Mapping) else {_SINGLE: given}
    for name, loader in probes.items():
        dataset = getattr(loader, "dataset", None)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(
                f"probe '{name}': expected a DataLoader over a finite dataset with indices, found "
                f"{type(loader).__name__} over {type(dataset).__name__}. Use get_loader(...).probes."
            )
    return probes  # type: ignore[return-value]  # checked just now


def _check_forward(model: nn.Module) -> None:
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
