"""DataInf against its definition, worked out sample by sample with explicit inverses on gradients from autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import per_sample_loss
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners.datainf import DataInf, LayerScale, datainf_scores
from tests.influence.tiny_llama import Batch, random_batch, tiny_llama

Gradients = dict[str, torch.Tensor]


def autograd(model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch) -> Gradients:
    """Gradients of each row's summed loss, one backward a row: ``{name: [B, *shape]}``."""
    rows: list[tuple[torch.Tensor, ...]] = []
    model.eval()
    for i in range(len(batch["labels"])):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        logits = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits
        rows.append(torch.autograd.grad(per_sample_loss(logits, row["labels"])[0].sum(), list(parameters.values())))
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(parameters)}


def by_definition(v: np.ndarray, g: np.ndarray, lambda_scale: float = 0.1) -> np.ndarray:
    """``mean_i (lambda I + g_i g_i^T)^-1 v`` of one layer; ``v`` is ``[d]``, ``g`` ``[n, d]``."""
    n, d = g.shape
    lam = lambda_scale * sum(float(row @ row) / d for row in g) / n
    total = np.zeros(d)
    for row in g:
        if d <= 128 and n <= 20:
            total += np.linalg.inv(lam * np.eye(d) + np.outer(row, row)) @ v
        else:  # Sherman-Morrison
            total += (v - (v @ row) / (lam + row @ row) * row) / lam
    return total / n


def cut(batch: Batch, size: int) -> list[Batch]:
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["labels"]), size)]


def some_directions(parameters: dict[str, nn.Parameter], count: int = 3) -> Directions:
    g = torch.Generator().manual_seed(5)
    tensors = {n: torch.randn(count, *p.shape, generator=g, dtype=p.dtype) for n, p in parameters.items()}
    return Directions(tuple("abcdef"[:count]), tensors)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama(tied=True)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (12, 5), (200, 40)])
def test_it_is_the_mean_of_damped_inverses_layer_by_layer(model: nn.Module, count: int, size: int) -> None:
    parameters = select_parameters(model)
    batch = random_batch(count, 3)
    gradients, u = autograd(model, parameters, batch), some_directions(parameters)
    applied = DataInf(parameters).fit(model, cut(batch, size)).apply(u)
    assert applied.names == u.names
    for name in parameters:
        g = gradients[name].flatten(1).numpy()
        expected = np.stack([by_definition(v, g) for v in u.tensors[name].flatten(1).numpy()])
        found = applied.tensors[name].flatten(1).numpy()
        assert applied.tensors[name].shape == u.tensors[name].shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_single_sample_has_the_closed_form(model: nn.Module) -> None:
    parameters = select_parameters(model)
    batch = random_batch(1, 4)
    gradients, u = autograd(model, parameters, batch), some_directions(parameters, 1)
    datainf = DataInf(parameters).fit(model, [batch])
    applied = datainf.apply(u)
    for name, lam in datainf.lambdas.items():
        g, v = gradients[name][0].flatten(), u.tensors[name][0].flatten()
        assert lam == pytest.approx(0.1 * float(g @ g) / g.numel(), rel=1e-9)
        score = float(applied.tensors[name][0].flatten() @ g)
        assert score == pytest.approx(float(v @ g) / (lam + float(g @ g)), rel=1e-6)


def test_documents_count_as_samples_and_padding_does_not(model: nn.Module) -> None:
    parameters = select_parameters(model, ["*norm*", "*k_proj*"])
    batch, apart = random_batch(2, 6), []
    for row in range(2):
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()[:2]
        for keep in starts:
            inside = torch.zeros(24, dtype=torch.bool)
            inside[keep : next((s for s in (batch["position_ids"][row] == 0).nonzero().flatten() if s > keep), 24)] = (
                True
            )
            apart.append(torch.where(inside, batch["labels"][row], -100))
    alone = {
        "labels": torch.stack(apart),
        "input_ids": batch["input_ids"].repeat_interleave(2, 0),
        "position_ids": batch["position_ids"].repeat_interleave(2, 0),
    }
    u = some_directions(parameters)
    documents = DataInf(parameters, by="document").fit(model, [batch]).apply(u)
    rows = DataInf(parameters).fit(model, [alone]).apply(u)
    for name in parameters:
        torch.testing.assert_close(documents.tensors[name], rows.tensors[name], rtol=1e-9, atol=1e-9)


def test_the_matrix_form_gives_the_same_scores(model: nn.Module) -> None:
    parameters = select_parameters(model)
    fisher, candidates = random_batch(6, 1), random_batch(5, 2)
    g, c = autograd(model, parameters, fisher), autograd(model, parameters, candidates)
    u = some_directions(parameters)
    datainf = DataInf(parameters).fit(model, [fisher])
    applied = datainf.apply(u)
    for name, lam in datainf.lambdas.items():
        v, a, b = u.tensors[name].flatten(1), g[name].flatten(1), c[name].flatten(1)
        scores = datainf_scores(v @ a.T, a.square().sum(1), a @ b.T, v @ b.T, lam)
        torch.testing.assert_close(scores, applied.tensors[name].flatten(1) @ b.T, rtol=1e-8, atol=1e-8)


def test_a_sample_scored_on_its_own_gradient_helps(model: nn.Module) -> None:
    parameters = select_parameters(model)
    batch = random_batch(4, 1)
    g = autograd(model, parameters, batch)
    own = Directions(tuple("abcd"), g)
    applied = DataInf(parameters).fit(model, [batch]).apply(own)
    for name in parameters:
        assert ((applied.tensors[name] * g[name]).flatten(1).sum(1) > 0).all()


def test_strong_damping_leaves_a_scale_for_each_layer(model: nn.Module) -> None:
    parameters = select_parameters(model)
    batches = cut(random_batch(6, 1), 3)
    u = some_directions(parameters)
    scale = LayerScale(parameters, lambda_scale=1e9).fit(model, batches)
    full, limit = DataInf(parameters, lambda_scale=1e9).fit(model, batches).apply(u), scale.apply(u)
    for name in parameters:
        torch.testing.assert_close(limit.tensors[name], u.tensors[name] / scale.lambdas[name])
        torch.testing.assert_close(full.tensors[name], limit.tensors[name], rtol=1e-4, atol=1e-12)


def test_bad_input(model: nn.Module) -> None:
    parameters = select_parameters(model, ["*k_proj*"])
    u = some_directions(parameters)
    with pytest.raises(UserError, match="datainf: expected to be fitted before"):
        DataInf(parameters).apply(u)
    with pytest.raises(UserError, match="layer_scale: expected at least one batch"):
        LayerScale(parameters).fit(model, [])
    batch = random_batch(2, 0)
    with pytest.raises(UserError, match=r"datainf: .* every label masked"):
        DataInf(parameters).fit(model, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])
    with pytest.raises(UserError, match="lambda_scale above 0, found 0"):
        DataInf(parameters, lambda_scale=0)
    fitted = DataInf(parameters).fit(model, [batch])
    with pytest.raises(UserError, match=r"expected directions over the 2 parameters .* 'model\.norm\.weight'"):
        fitted.apply(Directions(("p",), {"model.norm.weight": torch.ones(1, 16)}))


def test_gradients_that_are_not_finite_are_refused() -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    parameters = select_parameters(broken, ["*k_proj*"])
    with pytest.raises(UserError, match=r"datainf: expected finite gradients, .* 'model\.layers\.0\.self_attn\.k_proj"):
        DataInf(parameters).fit(broken, [random_batch(2, 0)])


def test_where_no_sample_has_a_gradient_there_is_no_direction(model: nn.Module) -> None:
    parameters = select_parameters(model)
    unused = {"unused": nn.Parameter(torch.ones(3))}
    fitted = DataInf({**parameters, **unused})
    fitted.fit(model, [random_batch(2, 1)])
    u = Directions(("p",), {"unused": torch.ones(1, 3)})
    assert not fitted.apply(u).tensors["unused"].any()
