"""Adam's preconditioner against the step that Adam itself takes; the checks that all preconditioners share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners import Adam, Identity, Preconditioner
from cheapertraining.influence.preconditioners.base import count_units


def trained(amsgrad: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 0.9), eps=1e-3, amsgrad=amsgrad)
    for scale in (3.0, 1.0, 0.3):
        optimizer.zero_grad()
        (scale * model(torch.randn(5, 4).double())).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_direction_is_adams_own_step_without_momentum(amsgrad: bool) -> None:
    model, optimizer = trained(amsgrad)
    parameters = select_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.zero_grad()
    model(torch.randn(5, 4).double()).square().sum().backward()
    # beta1 = 0: the step is lr * g / (sqrt(v / correction) + eps), with v of after the step.
    optimizer.step()
    u = Directions(("probe",), {name: p.grad[None].clone() for name, p in parameters.items() if p.grad is not None})
    applied = Adam(parameters, optimizer).apply(u)
    for name, p in parameters.items():
        torch.testing.assert_close(applied.tensors[name][0], (before[name] - p.detach()) / 0.1, rtol=1e-9, atol=1e-9)


def test_a_parameter_without_moments_gets_no_direction_and_none_at_all_is_an_error() -> None:
    model, _ = trained()
    parameters = select_parameters(model)
    u = Directions(("a", "b"), {name: torch.ones(2, *p.shape, dtype=p.dtype) for name, p in parameters.items()})
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="second moments after at least one step, found AdamW without"):
        Adam(parameters, optimizer).apply(u)
    model[1](torch.ones(1, 3).double()).sum().backward()  # type: ignore[index]
    for p in model[0].parameters():  # type: ignore[index]
        p.grad = None
    optimizer.step()
    applied = Adam(parameters, optimizer).apply(u)
    assert applied.tensors["0.weight"].abs().sum() == 0
    assert (applied.tensors["1.weight"] > 0).all()
    assert (u.tensors["0.weight"] == 1).all()


def test_directions_over_other_parameters_are_refused() -> None:
    model, optimizer = trained()
    adam = Adam(select_parameters(model, ["0.*"]), optimizer)
    with pytest.raises(UserError, match=r"adam: expected directions over the 2 parameters .* '1\.weight'"):
        adam.apply(Directions(("p",), {"1.weight": torch.ones(1, 2, 3)}))
    with pytest.raises(UserError, match=r"shape \(3, 4\) for '0\.weight', found \(4, 3\)"):
        adam.apply(Directions(("p",), {"0.weight": torch.ones(1, 4, 3)}))


def test_identity_copies() -> None:
    u = Directions(("p",), {"w": torch.ones(1, 3)})
    identity: Preconditioner = Identity()
    applied = identity.apply(u)
    applied.tensors["w"].zero_()
    assert u.tensors["w"].sum() == 3


def test_units_with_a_loss_are_counted_and_none_is_an_error() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="datainf: expected at least one batch to fit on, found none"):
        count_units("datainf", [], "sample", cpu)
    masked = {"labels": torch.full((2, 4), -100)}
    with pytest.raises(UserError, match="found every label masked"):
        count_units("datainf", [masked], "sample", cpu)
    packed = {"labels": torch.tensor([[-100, 3, -100, 4]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    padded = {"labels": torch.tensor([[-100, 3, -100, -100]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert count_units("datainf", [masked, packed], "sample", cpu) == 1
    assert count_units("datainf", [packed], "document", cpu) == 2
    assert count_units("datainf", [padded], "document", cpu) == 1
