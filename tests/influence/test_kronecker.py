"""K-FAC and EK-FAC against dense Kronecker matrices and explicit inverses, made from autograd's own gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import token_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners import EKFAC, KFAC
from cheapertraining.influence.preconditioners.factors import Basis, Sums, live_tokens, transferred
from cheapertraining.influence.preconditioners.kronecker import sampled_labels
from tests.influence.tiny_llama import Batch, random_batch, tiny_llama

Pairs = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]


def tiny_gpt2() -> nn.Module:
    """Conv1D, biases, LayerNorms, learned positions; its head is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=24, n_embd=12, n_layer=1, n_head=2, initializer_range=0.2)
    model: nn.Module = GPT2LMHeadModel(config).double()
    return model


def losses_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Summed loss of each row, ``[B]``."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    return token_losses(model(**inputs).logits, batch["labels"])[0].sum(1)


def per_sample(model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch) -> dict[str, torch.Tensor]:
    model.eval()
    losses = losses_of(model, batch)
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(parameters)}


def in_and_out(model: nn.Module, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What went into each layer (tokens, for an embedding) and the gradient of what came out, over live tokens."""
    model.eval()
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        seen[name] = [inputs[0], output]

    handles = [
        module.register_forward_hook(functools.partial(keep, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    losses_of(model, batch).sum().backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    live = live_tokens(batch)
    found = {}
    for name, (into, out) in seen.items():
        assert out.grad is not None
        found[name] = into.detach()[live], out.grad[live]
    return found


def some_directions(parameters: dict[str, nn.Parameter], count: int = 2) -> Directions:
    g = torch.Generator().manual_seed(5)
    tensors = {n: torch.randn(count, *p.shape, generator=g, dtype=p.dtype) for n, p in parameters.items()}
    return Directions(tuple("abcdef"[:count]), tensors)


def solved(fisher: torch.Tensor, u: torch.Tensor, damping: float = 0.1) -> torch.Tensor:
    """``(F + damping * mean eigenvalue)^-1 u`` by an explicit inverse."""
    size = len(fisher)
    whole = fisher + damping * fisher.trace() / size * torch.eye(size, dtype=fisher.dtype)
    return (u.flatten(1) @ torch.linalg.inv(whole).T).view_as(u)


@pytest.fixture(scope="module")
def untied() -> nn.Module:
    return tiny_llama(tied=False)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return [random_batch(5, 1), random_batch(4, 2)]


LINEAR = ["*q_proj.weight", "*down_proj.weight", "lm_head.weight"]


def test_kfac_is_the_damped_kronecker_product(untied: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(untied, LINEAR)
    u = some_directions(parameters)
    applied = KFAC(parameters, labels="given").fit(untied, batches).apply(u)
    seen = [in_and_out(untied, batch) for batch in batches]
    for name in parameters:
        into, out = (torch.cat([each[name.removesuffix(".weight")][side] for each in seen]) for side in (0, 1))
        tokens, units = len(into), 9
        # tokens / units times the product of the two means over tokens
        fisher = torch.kron(out.T @ out / tokens, into.T @ into / tokens) * tokens / units
        torch.testing.assert_close(applied.tensors[name], solved(fisher, u.tensors[name]), rtol=1e-7, atol=1e-9)
    assert len(parameters) == 5


def test_ekfac_is_diagonal_in_the_kronecker_basis(untied: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(untied, LINEAR)
    u = some_directions(parameters)
    applied = EKFAC(parameters, labels="given").fit(untied, batches).apply(u)
    seen = [in_and_out(untied, batch) for batch in batches]
    gradients = [per_sample(untied, parameters, batch) for batch in batches]
    for name in parameters:
        into, out = (torch.cat([each[name.removesuffix(".weight")][side] for each in seen]) for side in (0, 1))
        basis = torch.kron(torch.linalg.eigh(out.T @ out)[1], torch.linalg.eigh(into.T @ into)[1])
        g = torch.cat([each[name] for each in gradients]).flatten(1)
        fisher = basis @ torch.diag((g @ basis).square().mean(0)) @ basis.T
        torch.testing.assert_close(applied.tensors[name], solved(fisher, u.tensors[name]), rtol=1e-6, atol=1e-8)


# GPT-2's attention does not keep packed documents apart.
@pytest.mark.parametrize(("build", "by"), [(tiny_llama, "sample"), (tiny_llama, "document"), (tiny_gpt2, "sample")])
def test_lambda_is_the_second_moment_of_the_whole_gradient(build: Callable[[], nn.Module], by: str) -> None:
    model = build()
    parameters = select_parameters(model)
    batch = random_batch(3, 3)
    units = [batch]
    if by == "document":  # Each document with the other one's labels masked.
        document = (batch["position_ids"] == 0).cumsum(1)
        units = [{**batch, "labels": torch.where(document == k, batch["labels"], -100)} for k in (1, 2)]
    g = {name: torch.cat([per_sample(model, parameters, unit)[name] for unit in units]) for name in parameters}
    u = some_directions(parameters)
    ekfac = EKFAC(parameters, labels="given", by=by).fit(model, [batch])  # type: ignore[arg-type]
    applied = ekfac.apply(u)
    state = ekfac._kept.current()
    assert state is not None
    for name, bare in parameters.items():
        basis = state[1].get(name)
        assert (basis is None) == (bare.dim() == 1)
        turned = g[name] if basis is None else in_basis(basis, g[name])
        values = turned.square().mean(0)
        expected = u.tensors[name] if basis is None else in_basis(basis, u.tensors[name])
        expected = expected / (values + 0.1 * values.mean())
        found = applied.tensors[name] if basis is None else in_basis(basis, applied.tensors[name])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def in_basis(basis: Basis, matrices: torch.Tensor) -> torch.Tensor:
    left = torch.eye(matrices.shape[1], dtype=matrices.dtype) if basis.left is None else basis.left
    right = torch.eye(matrices.shape[2], dtype=matrices.dtype) if basis.right is None else basis.right
    for side in (left, right):
        torch.testing.assert_close(side.T @ side, torch.eye(len(side), dtype=side.dtype))
    return torch.einsum("rj,nrc,ck->njk", left, matrices, right)


def test_a_tied_embedding_has_the_factors_of_both_its_sites(batches: list[Batch]) -> None:
    model = tiny_llama(tied=True)
    parameters = select_parameters(model, ["model.embed_tokens.weight"])
    u = some_directions(parameters)
    applied = KFAC(parameters, labels="given").fit(model, batches).apply(u)
    seen = [in_and_out(model, batch) for batch in batches]
    (hidden, of_logits), (tokens, of_embedded) = (
        tuple(torch.cat([each[name][side] for each in seen]) for side in (0, 1))
        for name in ("lm_head", "model.embed_tokens")
    )
    one_hot = nn.functional.one_hot(tokens, 50).double()
    lefts = [torch.diag((each.T @ each).diag()) for each in (of_logits, one_hot)]
    rights = [hidden.T @ hidden, of_embedded.T @ of_embedded]
    # The only product of two factors with the partial traces of the sum of the sites' products.
    left = sum((b.trace() * a for a, b in zip(lefts, rights, strict=True)), torch.zeros(()))
    right = sum((a.trace() * b for a, b in zip(lefts, rights, strict=True)), torch.zeros(()))
    total = sum(torch.kron(a, b) for a, b in zip(lefts, rights, strict=True))
    assert isinstance(total, torch.Tensor)
    fisher = torch.kron(left, right) / left.trace() / len(tokens) / 9
    blocks = total.view(50, 16, 50, 16)
    torch.testing.assert_close(torch.einsum("ikjk->ij", blocks), left)
    torch.testing.assert_close(torch.einsum("kikj->ij", blocks), right)
    (name,) = parameters
    torch.testing.assert_close(applied.tensors[name], solved(fisher, u.tensors[name]), rtol=1e-7, atol=1e-9)


def test_large_sides_are_diagonal(untied: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(untied, ["lm_head.weight"])
    u = some_directions(parameters)
    applied = KFAC(parameters, labels="given", max_dim=49).fit(untied, batches).apply(u)
    seen = [in_and_out(untied, batch)["lm_head"] for batch in batches]
    into, out = (torch.cat([each[side] for each in seen]) for side in (0, 1))
    fisher = torch.kron(torch.diag(out.square().sum(0)), into.T @ into) / len(into) / 9
    found = applied.tensors["lm_head.weight"]
    torch.testing.assert_close(found, solved(fisher, u.tensors["lm_head.weight"]), rtol=1e-7, atol=1e-9)


def test_padding_and_what_is_behind_the_last_loss_are_not_live() -> None:
    batch = {
        "labels": torch.tensor([[-100, 5, 6, -100, -100, 7, -100, -100], [-100, -100, -100, 4, -100, 3, 3, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    expected = [[1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0]]
    assert live_tokens(batch).int().tolist() == expected


def test_labels_are_drawn_from_the_model_and_from_no_global_generator() -> None:
    model = tiny_llama()
    batch = {k: v[:1].repeat(4000, 1)[:, :6] for k, v in random_batch(1, 0).items()}
    batch["labels"][:, 3] = -100
    before = torch.get_rng_state()
    labels = sampled_labels(model, batch, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(labels, sampled_labels(model, batch, torch.Generator().manual_seed(1)))
    assert (labels[:, [0, 3]] == -100).all()
    model.eval()
    inputs = {name: batch[name][:1] for name in ("input_ids", "position_ids")}
    chances = model(**inputs, use_cache=False).logits.softmax(-1)[0].detach()
    for position in (1, 2, 4, 5):
        counts = torch.bincount(labels[:, position], minlength=50)
        expected = 4000 * chances[position - 1]
        # Pearson's statistic has a mean of 49 and a deviation of 10.
        assert float(((counts - expected) ** 2 / expected).sum()) < 110


def test_fit_leaves_no_trace_and_is_reproducible(batches: list[Batch]) -> None:
    model = tiny_llama().train()
    parameters = select_parameters(model)
    u = some_directions(parameters)
    before, state = torch.get_rng_state(), {n: p.clone() for n, p in model.state_dict().items()}
    applied = EKFAC(parameters).fit(model, batches).apply(u)
    torch.rand(3)
    again, other = (EKFAC(parameters, seed=seed).fit(model, batches).apply(u) for seed in (0, 1))
    torch.set_rng_state(before)
    EKFAC(parameters).fit(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    for name in parameters:
        assert torch.equal(applied.tensors[name], again.tensors[name])
        assert not torch.equal(applied.tensors[name], other.tensors[name])


def test_squares_are_carried_into_a_new_basis() -> None:
    torch.manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 3, 4, 3)]
    old, new = (Basis(left, right, torch.ones(4), torch.ones(3)) for left, right in (turns[:2], turns[2:]))
    squares = torch.rand(4, 3, dtype=torch.float64)
    before, after = torch.kron(*turns[:2]), torch.kron(*turns[2:])
    expected = (after.T @ before @ torch.diag(squares.flatten()) @ before.T @ after).diag().view(4, 3)
    torch.testing.assert_close(transferred(squares, old, new), expected)


def test_bad_input(untied: nn.Module, batches: list[Batch]) -> None:
    parameters = select_parameters(untied, ["*k_proj*"])
    u = some_directions(parameters)
    with pytest.raises(UserError, match="ekfac: expected to be fitted before it is applied"):
        EKFAC(parameters).apply(u)
    with pytest.raises(UserError, match="kfac: expected at least one batch to fit on"):
        KFAC(parameters).fit(untied, [])
    with pytest.raises(UserError, match="damping above 0, found 0"):
        KFAC(parameters, damping=0)
    masked = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(UserError, match="every label masked"):
        EKFAC(parameters).fit(untied, [masked])
    fitted = KFAC(parameters).fit(untied, batches)
    with pytest.raises(UserError, match=r"kfac: expected directions over the 2 parameters .* 'lm_head\.weight'"):
        fitted.apply(Directions(("p",), {"lm_head.weight": torch.ones(1, 50, 16)}))
    assert Sums().count("units") == 0


@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_what_is_not_finite_is_refused(labels: str, batches: list[Batch]) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        EKFAC(select_parameters(broken, ["*k_proj*"]), labels=labels).fit(broken, batches)  # type: ignore[arg-type]
