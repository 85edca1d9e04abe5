"""The controller for plain loops: a model, probes and a mixture; measure, decide, act.

    calculator = MixtureWeightCalculator(model, probe_dataloaders=loader.probes)
    optimizer = InfluenceAwareOptimizer(optimizer, calculator, loader.mixture, update_interval=100)

The same controller, strategies and constraints as in ``OnlineMixing``, Composer's algorithm. Any strategy but
``influence`` is handed over ready-made, and what it looks at is measured when an update is due; one that looks at
training losses is told them:

    calculator = MixtureWeightCalculator(model, strategy=ODMStrategy())
    ...
    calculator.record(batch, logits)                   # after each forward pass
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence.model_access import losses_of_logits, model_losses
from cheapertraining.influence.ranks import sum_over_ranks
from cheapertraining.influence.settings import InfluenceConfig
from cheapertraining.influence.sharding import sample_copies
from cheapertraining.mixing.agreement import agreed
from cheapertraining.mixing.constraints import Constraints
from cheapertraining.mixing.controller import MixtureController
from cheapertraining.mixing.measuring import Measured, Measuring, check_forward
from cheapertraining.mixing.signals import (
    INFLUENCE,
    LOSSES,
    PROBE_LOSSES,
    REFERENCE,
    Strategy,
)
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
        strategy: decides; default ``InfluenceStrategy`` with the settings of ``influence_config``. Sample counts,
            layers and bounds are that config's for every strategy.
        reference: model over the same tokens, for a strategy that compares with one (``DoReMiStrategy``); frozen here.

    Raises:
        UserError: no module, no probe where the strategy steers towards probes, a probe without a length, or no
            reference model for a strategy that needs one.
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
        strategy: Strategy | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(
                f"MixtureWeightCalculator: model: expected a torch.nn.Module, found {type(model).__name__}. Give it "
                "the model and its probes; the estimator is made here."
            )
        self.model = model
        self.influence_config = InfluenceConfig.of(influence_config)
        needs = InfluenceStrategy.needs if strategy is None else strategy.needs
        steered = bool(needs & {INFLUENCE, PROBE_LOSSES})
        given = probe_dataloader is not None or probe_dataloaders is not None
        self.probes = _named_probes(probe_dataloader, probe_dataloaders) if steered or given else {}
        if REFERENCE in needs and reference is None:
            raise UserError(
                "MixtureWeightCalculator: reference: expected the model that the strategy compares with, found None."
            )
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.probe_weights = probe_weights
        self.horizon_tokens = horizon_tokens
        self.strategy = strategy
        self._parts: tuple[MixtureController, Measuring] | None = None
        self._recorded = False
        # float64 [2 or 3, K], losses, tokens and excess losses by source of this rank, not yet the controller's.
        self._pending: torch.Tensor | None = None

    @property
    def controller(self) -> MixtureController:
        """What decides; its ``history`` has every decision with the scores behind it.

        Raises:
            UserError: there is no mixture yet.
        """
        return self._attached()[0]

    def attach(self, mixture: Any, *, learning_rate: float = 0.2, interval: int = 1000) -> None:
        """Begin with a mixture; ``InfluenceAwareOptimizer`` does it. The weights of a strategy that looks at nothing
        hold from the mixture's first batch.

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
        strategy = self.strategy or InfluenceStrategy(learning_rate, config.ema, config.threshold)
        if INFLUENCE in strategy.needs and config.scorer == "forward":
            check_forward(self.model)
        controller = MixtureController(
            mixture,
            strategy,
            Constraints(config.floor, config.ceiling, config.kl_step),
            interval=interval,
            warmup=0,
            horizon_tokens=self.horizon_tokens or 0,
        )
        self._parts = controller, Measuring.of(config, strategy.needs, mixture, self.probes, self.probe_weights)
        if mixture.consumed == 0:
            controller.start()

    def record(self, batch: Mapping[str, Any], logits: torch.Tensor) -> None:
        """Take note of the training losses of a batch, for strategies that look at them; on every rank, each batch.

        Args:
            batch: with ``labels`` int64 ``[B, S]`` and ``source`` int64 ``[B]``, and what the reference model needs.
            logits: ``[B, S, vocabulary]``, of the model as it trains; position ``t`` predicts label ``t + 1``.

        Raises:
            UserError: the batch has no ``source``.
        """
        if "source" not in batch:
            raise UserError(
                f"MixtureWeightCalculator.record: expected 'source' in the batch, found {', '.join(sorted(batch))}. "
                "Load with a mixture of sources."
            )
        with torch.no_grad():
            losses, counted = losses_of_logits(self.model, logits.detach(), batch["labels"])
            rows = [losses.double().sum(dim=1), counted.double().sum(dim=1)]
            if self.reference is not None:
                other, _ = model_losses(self.reference, batch)
                rows.append((losses.double() - other.double()).clamp(min=0).sum(dim=1))
        source = batch["source"].to(losses.device)
        sums = torch.zeros(len(rows), len(self.controller.source_names), dtype=torch.float64, device=losses.device)
        sums.index_add_(1, source, torch.stack(rows))
        self._pending = sums if self._pending is None else self._pending + sums
        self._recorded = True

    def update(self, optimizer: Optimizer | None = None) -> dict[str, float]:
        """Measure and decide; new weights count ``lag`` batches from now. Call it on all ranks, between steps.

        Args:
            optimizer: read where the metric is ``adam``, by strategies whose steps are in its unit, and for the
                prediction of what the update does.

        Returns:
            The newest weights of the mixture, by source.

        Raises:
            UserError: a loss or a score is not finite, the model cannot be measured, or the strategy looks at training
                losses and none was recorded. Weights, model and the
                calculator's own state are then as before.
        """
        with self._restored(only_on_failure=True):
            weights, found = self._decide(optimizer)
            self.controller.commit(
                self.controller.mixture.consumed,
                weights,
                found.influence,
                _learning_rate(optimizer),
                probe_losses=found.probe_losses,
            )
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
        self._flush()
        controller, measuring = self._attached()
        return {
            "version": _STATE_VERSION,
            "controller": controller.state_dict(),
            "estimator": None if measuring.estimator is None else measuring.estimator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off. The mixture restores its own state.

        Raises:
            UserError: the state is of other sources.
        """
        controller, measuring = self._attached()
        controller.load_state_dict(state["controller"])
        if measuring.estimator is not None and state["estimator"] is not None:
            measuring.estimator.load_state_dict(state["estimator"])
        self._pending = None

    def _attached(self) -> tuple[MixtureController, Measuring]:
        if self._parts is None:
            raise UserError(
                "MixtureWeightCalculator: no mixture to measure yet. Pass it to InfluenceAwareOptimizer with the "
                "mixture, or call attach(mixture)."
            )
        return self._parts

    def _flush(self) -> None:
        """Hand what was recorded over to the controller, summed over the ranks."""
        if self._pending is not None:
            sum_over_ranks(self._pending, sample_copies(self.model))
            self.controller.record(*self._pending.cpu().numpy())
            self._pending = None

    def _decide(self, optimizer: Optimizer | None) -> tuple[dict[str, float] | None, Measured]:
        controller, measuring = self._attached()
        if controller.strategy.needs & {LOSSES, REFERENCE} and not self._recorded:
            raise UserError(
                f"strategy '{controller.strategy.name}' looks at training losses, and none was recorded since training "
                "(re)started. Call MixtureWeightCalculator.record(batch, logits) after each forward pass."
            )
        found = measuring.measure(self.model, optimizer, controller.measurements, self.influence_config.microbatch_size)
        wish = controller.propose(
            controller.mixture.consumed,
            found.influence,
            _learning_rate(optimizer),
            gradients=found.gradients,
            probe_losses=found.probe_losses,
        )
        return agreed(wish, controller.source_names), found

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
    *,
    strategy: Strategy | None = None,
    reference: nn.Module | None = None,
) -> MixtureWeightCalculator:
    """Make a :class:`MixtureWeightCalculator`; its name as a function, as other packages call it."""
    return MixtureWeightCalculator(model, probe_dataloader, config, strategy=strategy, reference=reference)


def _learning_rate(optimizer: Optimizer | None) -> float | None:
    return None if optimizer is None else float(optimizer.param_groups[0]["lr"])


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
