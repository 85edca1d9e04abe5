"""Conjugate gradients and LiSSA against the dense Gauss-Newton matrix, made from the logits' Jacobian and solved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from cheapertraining.errors import UserError
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners.krylov import GGNConjugateGradient, LiSSA
from tests.influence.tiny_llama import Batch, random_batch, tiny_llama

LAYERS = ["*layers.1.self_attn.k_proj.weight", "model.norm.weight"]


def dense(model: nn.Module, parameters: dict[str, nn.Parameter], batches: list[Batch]) -> torch.Tensor:
    """``G``, the mean over rows of ``sum_t J^T (diag(p) - p p^T) J``."""
    model.eval()
    size = sum(p.numel() for p in parameters.values())
    total = torch.zeros(size, size, dtype=torch.float64)
    for batch in batches:

        def logits(values: dict[str, torch.Tensor], batch: Batch = batch) -> torch.Tensor:
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            out: torch.Tensor = functional_call(model, values, (), inputs).logits
            return out[:, :-1][batch["labels"][:, 1:] != -100]

        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(logits)({name: p.detach() for name, p in parameters.items()})
        flat = torch.cat([jacobian[name].flatten(2) for name in parameters], dim=2)
        p = logits({name: p.detach() for name, p in parameters.items()}).softmax(-1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        total += torch.einsum("tvi,tvw,twj->ij", flat, hessian, flat)
    return total / sum(len(batch["labels"]) for batch in batches)


def some_directions(parameters: dict[str, nn.Parameter], count: int = 1) -> Directions:
    g = torch.Generator().manual_seed(5)
    tensors = {n: torch.randn(count, *p.shape, generator=g, dtype=p.dtype) for n, p in parameters.items()}
    return Directions(("a", "b")[:count], tensors)


def flat(directions: Directions) -> torch.Tensor:
    return torch.cat([part.flatten(1) for part in directions.tensors.values()], dim=1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return [random_batch(2, 1), random_batch(1, 2)]


def test_conjugate_gradients_solve_the_dense_system(model: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(model, LAYERS)
    u, curvature = some_directions(parameters, 2), dense(model, parameters, batches)
    damping = 0.1 * float(torch.linalg.eigvalsh(curvature)[-1])
    model.train()
    before = torch.get_rng_state()
    solver = GGNConjugateGradient(parameters, damping=damping, tolerance=1e-9)
    applied = solver.fit(model, batches).apply(u)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    expected = torch.linalg.solve(curvature + damping * torch.eye(len(curvature), dtype=torch.float64), flat(u).T).T
    torch.testing.assert_close(flat(applied), expected, rtol=1e-7, atol=1e-8)
    assert list(applied.tensors) == list(u.tensors)


def test_a_tied_embedding_is_one_parameter() -> None:
    model, batches = tiny_llama(), [random_batch(1, 3)]
    parameters = select_parameters(model, ["model.embed_tokens.weight"])
    u = some_directions(parameters)
    applied = GGNConjugateGradient(parameters, damping=20.0, tolerance=1e-10).fit(model, batches).apply(u)
    curvature = dense(model, parameters, batches)
    expected = torch.linalg.solve(curvature + 20 * torch.eye(len(curvature), dtype=torch.float64), flat(u).T).T
    torch.testing.assert_close(flat(applied), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("given", [True, False])
def test_the_series_converges_to_the_damped_inverse(model: nn.Module, batches: list[Batch], given: bool) -> None:
    parameters = select_parameters(model, LAYERS)
    u, curvature = some_directions(parameters), dense(model, parameters, batches[:1])
    largest = float(torch.linalg.eigvalsh(curvature)[-1])
    damping = 0.4 * largest
    scale = 1.1 * largest if given else None
    applied = LiSSA(parameters, damping=damping, terms=60, scale=scale).fit(model, batches[:1]).apply(u)
    expected = torch.linalg.solve(curvature + damping * torch.eye(len(curvature), dtype=torch.float64), flat(u).T).T
    torch.testing.assert_close(flat(applied), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_several_batches_take_turns(model: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(model, LAYERS)
    u = some_directions(parameters)
    first, second = (dense(model, parameters, [batch]) for batch in batches)
    scale, damping = 2 * float(torch.linalg.eigvalsh(first + second)[-1]), 1.0
    applied = LiSSA(parameters, damping=damping, terms=3, scale=scale).fit(model, batches).apply(u)
    total = flat(u)
    for curvature in (first, second, first):
        total = flat(u) + total - (total @ curvature + damping * total) / scale
    torch.testing.assert_close(flat(applied), total / scale, rtol=1e-9, atol=1e-12)


def test_bad_input(model: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(model, LAYERS)
    u = some_directions(parameters)
    with pytest.raises(UserError, match="ggn_cg: expected to be fitted before it is applied"):
        GGNConjugateGradient(parameters, damping=1.0).apply(u)
    with pytest.raises(UserError, match="lissa: expected at least one batch to fit on, found none"):
        LiSSA(parameters, damping=1.0).fit(model, [])
    with pytest.raises(UserError, match="ggn_cg: expected a damping above 0, found 0"):
        GGNConjugateGradient(parameters, damping=0)
    with pytest.raises(UserError, match=r"ggn_cg: expected a tolerance between 0 and 1 .* found 0 and 200"):
        GGNConjugateGradient(parameters, damping=1.0, tolerance=0)
    with pytest.raises(UserError, match=r"lissa: expected terms of at least 1 .* found 0, None"):
        LiSSA(parameters, damping=1.0, terms=0)
    with pytest.raises(UserError, match="'a' to be solved to 1e-05 in 2 iterations, found a residual of"):
        GGNConjugateGradient(parameters, damping=1e-3, max_iterations=2).fit(model, batches).apply(u)
    with pytest.raises(UserError, match=r"found one that grows at scale 0\.01"):
        LiSSA(parameters, damping=1e-3, scale=0.01).fit(model, batches).apply(u)
    part = Directions(("a",), {"model.norm.weight": u.tensors["model.norm.weight"][:1]})
    with pytest.raises(UserError, match=r"over all of its 2 parameters, found none over 'model\.layers\.1"):
        LiSSA(parameters, damping=1.0).fit(model, batches).apply(part)
    masked = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(UserError, match="every label masked"):
        LiSSA(parameters, damping=1.0).fit(model, [masked])


def test_what_is_not_finite_is_refused(batches: list[Batch]) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    parameters = select_parameters(broken, LAYERS)
    with pytest.raises(UserError, match="finite products with the Gauss-Newton matrix, found NaN"):
        GGNConjugateGradient(parameters, damping=1.0).fit(broken, batches).apply(some_directions(parameters))
