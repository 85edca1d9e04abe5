"""Teachers that are the student itself: without its adapters, or an average of what it was.

Both run the student's own modules, so that they are spread over the ranks as it is and cost no second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cheapertraining.distillation.targets import HiddenTargets
from cheapertraining.distillation.teacher import head_of
from cheapertraining.errors import UserError
from cheapertraining.influence.model_access import no_trace
from cheapertraining.influence.sharding import local, reshard
from cheapertraining.models.causal_lm import CausalLM, HeadInputs

__all__ = ["AdapterOffTeacher", "AverageTeacher"]


class AdapterOffTeacher:
    """The student with its adapters (LoRA, by PEFT) switched off: what it was before fine-tuning.

    Args:
        model: the student.

    Raises:
        UserError: it has no adapters.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._adapters = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
        if not self._adapters:
            raise UserError("teacher.kind=adapters_off: expected a student with PEFT adapters, found none.")

    def head_inputs(self, batch: Mapping[str, Any], layers: bool = False) -> HeadInputs:
        """As :meth:`~cheapertraining.distillation.teacher.TeacherWrapper.head_inputs`."""
        # PEFT's own switch also changes requires_grad, which DDP and FSDP do not expect within a step.
        before = [module._disable_adapters for module in self._adapters]
        for module in self._adapters:
            module._disable_adapters = True  # type: ignore[assignment]
        try:
            return _pass(self.model, batch, layers)
        finally:
            for module, was in zip(self._adapters, before, strict=True):
                module._disable_adapters = was

    def __call__(self, batch: Mapping[str, Any]) -> HiddenTargets:
        """What it says about a batch, without gradient."""
        inputs = self.head_inputs(batch)
        return HiddenTargets(inputs.hidden, head_of(inputs))

    def reshard(self) -> None:
        """Nothing is to be let go of: the student's own pass comes next."""


class AverageTeacher:
    """An exponential moving average of the student's weights: ``a <- decay a + (1 - decay) w`` after each step
    (mean teacher, arXiv 1703.01780).

    Args:
        model: the student; sharded by FSDP2 or not.
        decay: in (0, 1).
    """

    def __init__(self, model: CausalLM, decay: float) -> None:
        self.model = model
        self.decay = decay
        reshard(model)  # or parameters would be what a pass has gathered, whose memory is let go of
        self._parameters = dict(model.named_parameters())
        self.averages: dict[str, Tensor] = {name: local(each).clone() for name, each in self._parameters.items()}
        """By name, what this rank holds of each."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the student's weights as they are."""
        for name, parameter in self._parameters.items():
            self.averages[name].lerp_(local(parameter), 1 - self.decay)

    def head_inputs(self, batch: Mapping[str, Any], layers: bool = False) -> HeadInputs:
        """As :meth:`~cheapertraining.distillation.teacher.TeacherWrapper.head_inputs`."""
        with self._in_place():
            inputs = _pass(self.model, batch, layers)
            bias = None if inputs.bias is None else inputs.bias.clone()
            return inputs._replace(weight=inputs.weight.detach().clone(), bias=bias)

    def __call__(self, batch: Mapping[str, Any]) -> HiddenTargets:
        """What it says about a batch, without gradient."""
        inputs = self.head_inputs(batch)
        return HiddenTargets(inputs.hidden, head_of(inputs))

    def reshard(self) -> None:
        """Nothing is to be let go of: what was gathered is copied."""

    def state_dict(self) -> dict[str, Tensor]:
        """Whole averages by name, on the CPU; call it on every rank."""
        return {name: _whole(each, self._parameters[name]).cpu() for name, each in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with whole averages.

        Raises:
            UserError: they are of another model.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        if shapes != {name: tuple(each.shape) for name, each in state.items()}:
            raise UserError("distillation: the averaged teacher in the checkpoint is of another model than the run's.")
        for name, each in state.items():
            self.averages[name].copy_(_part(each, self._parameters[name]))

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The averages in place of the weights."""
        reshard(self.model)  # or what was gathered would hide the change
        kept = {name: local(parameter).clone() for name, parameter in self._parameters.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            reshard(self.model)
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter).copy_(values[name])


def _pass(model: CausalLM, batch: Mapping[str, Any], layers: bool) -> HeadInputs:
    with no_trace(model), torch.no_grad():
        return model.head_inputs(batch, layers)


def _whole(part: Tensor, like: nn.Parameter) -> Tensor:
    if not hasattr(like, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = like
    return DTensor.from_local(
        part, spread.device_mesh, spread.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _part(whole: Tensor, like: nn.Parameter) -> Tensor:
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    spread: Any = like
    return distribute_tensor(whole.to(local(like).device), spread.device_mesh, spread.placements).to_local()
