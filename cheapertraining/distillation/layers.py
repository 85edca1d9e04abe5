"""Losses on what is within student and teacher: hidden states, and Q/K/V relations, of one decoder layer of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cheapertraining.distillation.hidden import HiddenProjection, hidden_loss
from cheapertraining.distillation.relations import relation_loss
from cheapertraining.errors import UserError
from cheapertraining.influence.ranks import rank_and_world, sum_over_ranks
from cheapertraining.models.causal_lm import CausalLM, HeadInputs

__all__ = ["HiddenMatch", "LayerLosses", "RelationMatch"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class HiddenMatch:
    """Draw the states after one decoder layer to those of the teacher.

    Attributes:
        weight: factor of the loss.
        student_layer, teacher_layer: counted from 0, or from the end with -1 the last.
        form: see :func:`~cheapertraining.distillation.hidden.hidden_loss`.
    """

    weight: float
    student_layer: int = -1
    teacher_layer: int = -1
    form: Literal["mse", "cosine"] = "mse"


@dataclass(frozen=True)
class RelationMatch:
    """Draw the relations among queries, keys and values of one decoder layer to those of the teacher.

    Attributes:
        weight: factor of the loss.
        student_layer, teacher_layer: as of :class:`HiddenMatch`.
        heads: relation heads, a divisor of all widths.
        form, temperature: see :func:`~cheapertraining.distillation.relations.relation_loss`.
    """

    weight: float
    student_layer: int = -1
    teacher_layer: int = -1
    heads: int = 1
    form: Literal["scaled", "cosine"] = "scaled"
    temperature: float = 1.0


class LayerLosses:
    """The losses of a :class:`HiddenMatch` and a :class:`RelationMatch`, either of which may be None.

    Where widths differ, hidden states go through a linear map that is learnt beside the student, by an AdamW of its own
    with the student's learning rate; it is no part of the student and falls away with the training.
    """

    def __init__(self, hidden: HiddenMatch | None, relations: RelationMatch | None, *, seed: int = 0) -> None:
        self.hidden = hidden
        self.relations = relations
        self.projection: HiddenProjection | None = None
        self._seed = seed
        self._optimizer: torch.optim.Optimizer | None = None

    def begin(self, student: CausalLM, teacher: CausalLM) -> None:
        """Find the layers.

        Raises:
            UserError: no such layer; relations of an architecture whose queries, keys and values are not told apart.
        """
        if self.relations is not None:
            match = self.relations
            self._own = _Projections(_layer(student, match.student_layer, "relations.student_layer"))
            self._other = _Projections(_layer(teacher, match.teacher_layer, "relations.teacher_layer"))
        if self.hidden is not None:
            for model, number, key in (
                (student, self.hidden.student_layer, "hidden.student_layer"),
                (teacher, self.hidden.teacher_layer, "hidden.teacher_layer"),
            ):
                _layer(model, number, key)
            widths = student.model.config.hidden_size, teacher.model.config.hidden_size
            if widths[0] != widths[1]:
                device = next(student.parameters()).device
                self.projection = HiddenProjection(*widths, seed=self._seed).to(device)
                self._optimizer = torch.optim.AdamW(self.projection.parameters())

    def heard(self) -> list[Tensor]:
        """The queries, keys and values of the teacher's pass that was just made."""
        return self._other.take() if self.relations is not None else []

    def losses(
        self, own: HeadInputs, other: HeadInputs, heard: list[Tensor], batch: Mapping[str, Any], mask: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses ``hidden`` and ``relations``, means over the tokens that count, with gradient.

        Args:
            own: of the student, with layers.
            other: of the teacher, with layers.
            heard: of :meth:`heard`.
            batch: the microbatch.
            mask: bool ``[B, S]``, positions that count.
        """
        found, tokens = {}, mask.sum()
        if self.hidden is not None:
            match = self.hidden
            pair = own.layers[_after(match.student_layer)], other.layers[_after(match.teacher_layer)]
            form, projection = match.form, self.projection
            loss = hidden_loss(*pair, mask, form=form, projection=projection, normalizer=tokens)
            found["hidden"] = match.weight * loss
        if self.relations is not None:
            ours = self.relations
            padding = batch.get("attention_mask")
            real = torch.ones_like(mask) if padding is None else padding.bool()
            loss = relation_loss(
                self._own.take(),
                heard,
                real,
                relation_heads=ours.heads,
                position_ids=batch.get("position_ids"),
                form=ours.form,
                temperature=ours.temperature,
                normalizer=tokens,
            )
            found["relations"] = ours.weight * loss
        return found

    def step(self, learning_rate: float, scale: float) -> None:
        """Update the map, the same on all ranks; ``scale`` is what the loss was multiplied by against underflow."""
        if self.projection is None or self._optimizer is None:
            return
        gradient = self.projection.weight.grad
        if gradient is not None:
            sum_over_ranks(gradient)
            gradient.div_(scale * rank_and_world()[1])
            if bool(gradient.isfinite().all()):
                self._optimizer.param_groups[0]["lr"] = learning_rate
                self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Of the map and its optimizer; empty without one."""
        if self.projection is None or self._optimizer is None:
            return {}
        return {"projection": self.projection.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as :meth:`state_dict` left off; after :meth:`begin`."""
        if self.projection is not None and self._optimizer is not None and state:
            self.projection.load_state_dict(state["projection"])
            self._optimizer.load_state_dict(state["optimizer"])


class _Projections:
    """The newest outputs of a layer's query, key and value projections."""

    def __init__(self, layer: nn.Module) -> None:
        found = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        if missing := [name for name in _PROJECTIONS if name not in found]:
            raise UserError(
                f"relations: expected a {missing[0]} in each decoder layer, as in Llama, Qwen or Mistral, found none "
                f"in {type(layer).__name__}. Leave relations out."
            )
        self._states: dict[str, Tensor] = {}
        for name in _PROJECTIONS:
            found[name].register_forward_hook(self._keep(name))

    def take(self) -> list[Tensor]:
        """``[B, S, width]`` each, then forgotten."""
        states = [self._states[name] for name in _PROJECTIONS]
        self._states.clear()
        return states

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module, inputs
            self._states[name] = output

        return hook


def _layer(model: CausalLM, number: int, key: str) -> nn.Module:
    layers = model.blocks
    if not -len(layers) <= number < len(layers):
        raise UserError(f"{key}: expected a layer from {-len(layers)} to {len(layers) - 1}, found {number}.")
    return layers[number]


def _after(layer: int) -> int:
    """Index among the states of all layers, the first of which are the embeddings."""
    return layer if layer < 0 else layer + 1
