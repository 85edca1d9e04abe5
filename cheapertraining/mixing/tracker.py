"""The mixture's control loop as a set of callbacks, for loops that step no optimizer of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError
from cheapertraining.influence import InfluenceConfig
from cheapertraining.mixing.calculator import MixtureWeightCalculator
from cheapertraining.mixing.signals import Strategy

__all__ = ["InfluenceTracker", "create_influence_tracker"]

_KEY = "influence"


class InfluenceTracker:
    """Call :meth:`on_step_end` after each optimizer step; the weights of the mixture move when they are due.

    Args:
        config: a mapping with a section ``influence`` (plain or OmegaConf): ``enabled`` (default false; everything is
            then a no-op), ``update_interval`` (10000 steps), ``learning_rate`` (0.1), ``warmup_steps`` (1000),
            ``method`` (another name of ``metric``), and any setting of :class:`InfluenceConfig`.
        model: what is trained.
        mixed_dataset: the mixture; None switches the tracker off.
        probe_dataloaders: the probes by name, or a single one.
        strategy, reference: as of :class:`~cheapertraining.mixing.MixtureWeightCalculator`, default ``influence``. For
            one that looks at training losses, call ``tracker.calculator.record`` after each forward pass.

    Raises:
        UserError: an unknown setting, no probe, or a mixture that cannot be measured.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        model: nn.Module,
        mixed_dataset: Any | None,
        probe_dataloaders: Mapping[str, DataLoader[Any]] | DataLoader[Any] | None = None,
        *,
        strategy: Strategy | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        settings = dict(config.get(_KEY) or {})
        self.enabled = bool(settings.pop("enabled", False)) and mixed_dataset is not None
        self.update_interval = int(settings.pop("update_interval", 10_000))
        self.warmup_steps = int(settings.pop("warmup_steps", 1_000))
        learning_rate = float(settings.pop("learning_rate", 0.1))
        if "method" in settings:
            settings["metric"] = settings.pop("method")
        self.mixed_dataset = mixed_dataset
        self.calculator: MixtureWeightCalculator | None = None
        self._history: list[dict[str, float]] = []
        if not self.enabled:
            return
        if self.update_interval < 1:
            raise UserError(f"{_KEY}.update_interval: expected at least 1 step, found {self.update_interval}.")
        chosen = InfluenceConfig.of(settings)
        if chosen.metric == "adam":
            raise UserError(
                f"{_KEY}.metric: 'adam' needs the optimizer, which the tracker does not see. Wrap it in "
                "InfluenceAwareOptimizer instead, or use another metric."
            )
        self.calculator = MixtureWeightCalculator(
            model, probe_dataloaders, chosen, strategy=strategy, reference=reference
        )
        self.calculator.attach(mixed_dataset, learning_rate=learning_rate, interval=self.update_interval)

    @property
    def is_enabled(self) -> bool:
        """Whether it does anything."""
        return self.enabled

    def on_train_begin(self) -> None:
        """Nothing to prepare: probes are measured when an update is due."""

    def on_step_end(self, step: int, loss: torch.Tensor | None = None) -> None:
        """Update where ``step`` is a multiple of ``update_interval`` and the warm-up is over.

        Raises:
            UserError: what the measurement finds wrong; the weights are then as before.
        """
        if self.calculator is None or step < self.warmup_steps or step <= 0 or step % self.update_interval:
            return
        self._history.append({"step": step, **self.calculator.update()})

    def on_epoch_end(self, epoch: int) -> None:
        """Nothing to refresh: each measurement takes the probes' gradients anew."""

    def on_train_end(self) -> None:
        """Nothing to close."""

    def get_current_weights(self) -> dict[str, float]:
        """The newest weights by source; empty where the tracker is off."""
        if self.calculator is None:
            return {}
        return self.calculator.controller.mixture.get_current_weights()

    def get_weight_history(self) -> list[dict[str, float]]:
        """``{"step": ..., <source>: weight, ...}`` of each update so far."""
        return [dict(entry) for entry in self._history]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; save the mixture's own beside it."""
        return {
            "history": self.get_weight_history(),
            "calculator": None if self.calculator is None else self.calculator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off.

        Raises:
            UserError: the state is of other sources.
        """
        if self.calculator is not None and state["calculator"] is not None:
            self.calculator.load_state_dict(state["calculator"])
            self._history = [dict(entry) for entry in state["history"]]


def create_influence_tracker(
    config: Mapping[str, Any],
    model: nn.Module,
    mixed_dataset: Any | None,
    probe_dataloaders: Mapping[str, DataLoader[Any]] | DataLoader[Any] | None = None,
    *,
    strategy: Strategy | None = None,
    reference: nn.Module | None = None,
) -> InfluenceTracker:
    """Make an :class:`InfluenceTracker`; its name as a function, as other packages call it."""
    return InfluenceTracker(config, model, mixed_dataset, probe_dataloaders, strategy=strategy, reference=reference)
