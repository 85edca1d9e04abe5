"""What a resumed run takes from its config, not from the checkpoint: the settings of its optimizer.

A checkpoint holds an optimizer's settings beside its moments, and a scheduler's first learning rates, and loading puts
them in place of the config's. Who resumes with another learning rate would train with the old one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from composer.core import State

__all__ = ["put_in_force", "settings_of"]

_KEYS = ("lr", "betas", "eps", "weight_decay")

Settings = list[dict[str, Any]]


def settings_of(optimizer: Optimizer) -> Settings:
    """Of each group, as configured; before anything is loaded."""
    return [{key: group[key] for key in _KEYS if key in group} for group in optimizer.param_groups]


def put_in_force(state: State, settings: Settings) -> None:
    """Give the loaded optimizer its ``settings``; the schedule goes on where it was. Equal ones change no bit."""
    (optimizer,) = state.optimizers
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        rate, base = group["lr"], group.get("initial_lr", group["lr"])
        group.update(own)
        group["initial_lr"] = own["lr"]
        group["lr"] = rate if own["lr"] == base else own["lr"] * (rate / base if base else 1.0)
    for scheduler in state.schedulers:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
