"""An optimizer that adapts the mixture it trains on, for loops that are not Composer's.

    optimizer = InfluenceAwareOptimizer(torch.optim.AdamW(model.parameters()), calculator, loader.mixture)
    for batch in loader:
        ...
        optimizer.step()  # every update_interval steps: measure, decide, set the weights of the mixture

It is handed its calculator and its mixture and imports neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch.optim import Optimizer

from cheapertraining.errors import UserError

__all__ = ["InfluenceAwareOptimizer"]

log = logging.getLogger(__name__)

_STATE_VERSION = 1
_KEY = "influence"


class Mixture(Protocol):
    """What is needed of a mixture here; ``cheapertraining.data.MixedDataset`` is one."""

    def get_current_weights(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class MixtureCalculator(Protocol):
    """Measures and moves a mixture; ``cheapertraining.mixing.MixtureWeightCalculator`` is one.

    ``update`` either moves the weights of the mixture or raises and leaves everything as it was.
    """

    def attach(self, mixture: Any, *, learning_rate: float, interval: int) -> None: ...

    def update(self, optimizer: Optimizer | None = None) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _inner(name: str) -> Any:
    """An attribute that is the wrapped optimizer's own, whichever of the two it is reached through."""

    def get(wrapper: InfluenceAwareOptimizer) -> Any:
        return getattr(wrapper.optimizer, name)

    def put(wrapper: InfluenceAwareOptimizer, value: Any) -> None:
        setattr(wrapper.optimizer, name, value)

    return property(get, put)


class InfluenceAwareOptimizer(Optimizer):
    """Wraps any torch optimizer and is one: schedulers, hooks, parameter groups and checkpoints work as ever.

    After every ``update_interval``-th step, when the parameters have moved, the calculator measures the influence of
    each source and changes the weights of the mixture. Call :meth:`step` on all ranks. What a measurement finds wrong
    is raised, once: the parameters have taken their step, nothing else has changed, and the next measurement is due an
    interval later.

    :meth:`state_dict` holds what the mixture's course depends on (the mixture's own state included), besides the
    wrapped optimizer's state. Load it before iterating over the loader; training then goes on bit for bit.
    ``torch.distributed.checkpoint`` keeps of an optimizer only what it knows: save ``mixture_calculator.state_dict()``
    and ``mixed_dataset.state_dict()`` beside it there.

    Args:
        optimizer: makes the steps.
        mixture_calculator: measures and decides, such as ``MixtureWeightCalculator``; it is attached to the mixture.
        mixed_dataset: the mixture, such as ``get_loader(...).mixture``.
        update_interval: steps between updates.
        learning_rate: how far an update moves the logarithm of a weight, for a score of typical size.
        rank: the new weights are logged on rank 0. Nothing else depends on it.

    Raises:
        UserError: an interval or learning rate out of range, or a mixture that cannot be measured.
    """

    # They stay shared whatever either optimizer is given, loaded states included.
    param_groups = _inner("param_groups")
    state = _inner("state")
    defaults = _inner("defaults")

    def __init__(
        self,
        optimizer: Optimizer,
        mixture_calculator: MixtureCalculator,
        mixed_dataset: Mixture,
        update_interval: int = 1000,
        learning_rate: float = 0.2,
        rank: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"optimizer: expected a torch.optim.Optimizer, found {type(optimizer).__name__}.")
        if update_interval < 1:
            raise UserError(f"update_interval: expected at least 1 step, found {update_interval}.")
        if not learning_rate > 0:
            raise UserError(f"learning_rate (of the mixture's weights): expected above 0, found {learning_rate}.")
        mixture_calculator.attach(mixed_dataset, learning_rate=learning_rate, interval=update_interval)
        # Not the base's __init__, which would begin with empty groups; its __setstate__ makes the hooks.
        self.__setstate__(
            {
                "optimizer": optimizer,
                "mixture_calculator": mixture_calculator,
                "mixed_dataset": mixed_dataset,
                "update_interval": update_interval,
                "rank": rank,
                "_step": 0,
                "_last_update_step": 0,
            }
        )

    optimizer: Optimizer
    """The wrapped one."""
    mixture_calculator: MixtureCalculator
    mixed_dataset: Mixture
    update_interval: int
    rank: int
    _step: int
    _last_update_step: int

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: all but the hooks, and what schedulers hang on an optimizer."""
        own = ("optimizer", "mixture_calculator", "mixed_dataset", "update_interval", "rank")
        return {name: getattr(self, name) for name in (*own, "_step", "_last_update_step")}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make the wrapped optimizer's step; every ``update_interval`` steps, update the mixture.

        Raises:
            UserError: what a measurement finds wrong, such as a loss that is not finite.
        """
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._step += 1
        if self._step % self.update_interval == 0:
            weights = self.mixture_calculator.update(self.optimizer)
            self._last_update_step = self._step
            if self.rank == 0:
                listed = ", ".join(f"{name} {weight:.4f}" for name, weight in weights.items())
                log.info("step %d: weights of the mixture: %s", self._step, listed)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under ``influence`` JSON-able: steps, calculator, mixture."""
        own = {
            "version": _STATE_VERSION,
            "step": self._step,
            "last_update_step": self._last_update_step,
            "calculator": self.mixture_calculator.state_dict(),
            "mixture": self.mixed_dataset.state_dict(),
        }
        return {**self.optimizer.state_dict(), _KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`, of the same sources.

        The state of a bare optimizer is taken too: the mixture then stays where it is, with a word in the log.

        Raises:
            UserError: the mixture's state is of other sources, another batch size, seed or lag.
        """
        own = state_dict.get(_KEY)
        if own is None:
            log.warning("optimizer state without the mixture's: its weights and order of samples stay as they are")
        else:
            self.mixed_dataset.load_state_dict(own["mixture"])
            self.mixture_calculator.load_state_dict(own["calculator"])
            self._step, self._last_update_step = int(own["step"]), int(own["last_update_step"])
        self.optimizer.load_state_dict({name: value for name, value in state_dict.items() if name != _KEY})
