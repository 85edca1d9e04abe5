"""The hook scorer and the loop: against torch.func, without a trace, and what they refuse."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cheapertraining.errors import UserError
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers.consumers import Projection
from cheapertraining.influence.scorers.forward import forward_scores
from cheapertraining.influence.scorers.hook import (
    hook_gram,
    hook_norms,
    hook_projected,
    hook_scores,
    per_unit_gradients,
)
from cheapertraining.influence.scorers.loop import loop_gradients, loop_scores
from tests.influence.gradients import (
    batch_of,
    build,
    directions_for,
    plain_batch,
    products,
    relative,
    unit_gradients,
)
from tests.influence.tiny_llama import VOCABULARY, Batch, random_batch

CELLS = [
    (kind, tied, lora, packed)
    for kind in ("llama", "gpt2")
    for tied in (True, False)
    for lora in (False, True)
    for packed in (False, True)
]


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)


@pytest.mark.parametrize(("kind", "tied", "lora", "packed"), CELLS)
def test_everything_equals_autograd(kind: str, tied: bool, lora: bool, packed: bool) -> None:
    model, batch = build(kind, tied=tied, lora=lora), batch_of(packed)
    directions, parameters = directions_for(model), select_parameters(model)
    gradients = unit_gradients(model, batch, parameters)
    everything = flat(gradients)

    found = hook_scores(model, directions, batch)
    assert relative(found.scores, products(gradients, directions)) < 1e-9
    assert torch.equal(found.tokens, (batch["labels"][:, 1:] != -100).sum(1))
    assert relative(hook_norms(model, parameters, batch), everything.pow(2).sum(1)) < 1e-9
    assert relative(hook_gram(model, parameters, batch), everything @ everything.T) < 1e-9
    taken: dict[str, torch.Tensor] = {}
    losses = per_unit_gradients(model, parameters, batch, lambda name, g: taken.update({name: g.clone()}))
    assert relative(losses.losses, found.losses) < 1e-12
    assert taken.keys() == parameters.keys()
    for name, gradient in gradients.items():
        assert taken[name].shape == gradient.shape
        assert (taken[name] - gradient).abs().max() < 1e-9 * everything.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loop_equals_the_jacobian(kind: str) -> None:
    model, batch = build(kind, tied=True), batch_of(packed=True)
    directions = directions_for(model)
    expected = products(unit_gradients(model, batch, directions.tensors), directions)
    assert relative(loop_scores(model, directions, batch).scores, expected) < 1e-9


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [1, 6])
def test_documents_of_packed_rows(tied: bool, count: int) -> None:
    """Both routes: with one direction, short documents are scored token by token, with six from their gradients."""
    model, batch = build("llama", tied=tied), random_batch(5, 3)
    directions, parameters = directions_for(model, count), select_parameters(model)
    expected = loop_scores(model, directions, batch, by="document")
    found = hook_scores(model, directions, batch, by="document")
    assert len(found.tokens) == (batch["position_ids"] == 0).sum()
    assert relative(found.scores, expected.scores) < 1e-9
    assert torch.equal(found.tokens, expected.tokens)
    assert relative(found.losses, expected.losses) < 1e-12
    gradients = torch.stack([flat({n: g[None] for n, g in one.items()})[0] for one in documents(model, batch)])
    assert relative(hook_norms(model, parameters, batch, by="document"), gradients.pow(2).sum(1)) < 1e-9
    assert relative(hook_gram(model, parameters, batch, by="document"), gradients @ gradients.T) < 1e-9


def documents(model: nn.Module, batch: Batch) -> list[dict[str, torch.Tensor]]:
    return list(loop_gradients(model, select_parameters(model), batch, by="document"))


def test_documents_add_up_to_their_row() -> None:
    model, batch = build("llama", tied=True), random_batch(5, 3)
    directions = directions_for(model)
    rows = hook_scores(model, directions, batch).scores
    parts = hook_scores(model, directions, batch, by="document").scores
    row = (batch["position_ids"] == 0).nonzero()[:, 0]
    assert relative(torch.zeros_like(rows).index_add_(0, row, parts), rows) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_float32(kind: str) -> None:
    model, batch = build(kind, torch.float32, tied=True), batch_of(packed=True)
    exact = build(kind, tied=True)
    exact.load_state_dict(model.state_dict())
    directions = directions_for(model)
    expected = products(unit_gradients(exact, batch, directions.tensors), directions)
    assert relative(hook_scores(model, directions, batch).scores, expected) < 1e-5


def test_products_between_two_batches_by_parameter() -> None:
    model, first, second = build("gpt2", tied=True), plain_batch(3, 1), plain_batch(5, 2)
    parameters = select_parameters(model)
    found = hook_gram(model, parameters, first, second, per_parameter=True)
    left, right = (unit_gradients(model, batch, parameters) for batch in (first, second))
    for name in parameters:
        expected = left[name].flatten(1) @ right[name].flatten(1).T
        assert found[name].shape == (3, 5)
        assert relative(found[name], expected) < 1e-9
    total = hook_gram(model, parameters, first, second)
    assert relative(total, flat(left) @ flat(right).T) < 1e-9
    short = {name: value[:, :10] for name, value in second.items()}
    with pytest.raises(UserError, match="rows of one length"):
        hook_gram(model, parameters, first, short)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_projections_are_of_the_gradients(kind: str) -> None:
    model, batch = build(kind, tied=True), batch_of(packed=True)
    parameters = select_parameters(model)
    projection = Projection.random(parameters, rank=3, seed=1)
    gradients = unit_gradients(model, batch, projection.left)
    found = hook_projected(model, projection, batch)
    assert found.keys() == {name for name, parameter in parameters.items() if parameter.dim() == 2}
    for name, value in found.items():
        expected = projection.left[name] @ gradients[name] @ projection.right[name].T
        assert relative(value, expected.flatten(1)) < 1e-9


def test_projection_keeps_products_on_average() -> None:
    parameters = {"w": torch.zeros(7, 5, dtype=torch.float64)}
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    found = []
    for seed in range(2000):
        p = Projection.random(parameters, rank=4, seed=seed)
        left, right = p.left["w"], p.right["w"]
        found.append(((left @ one @ right.T) * (left @ other @ right.T)).sum())
    products_found = torch.stack(found)
    error = products_found.std() / len(found) ** 0.5
    assert abs(products_found.mean() - (one * other).sum()) < 4 * error
    again = Projection.random(parameters, rank=4, seed=1999)
    assert torch.equal(again.left["w"], left)


@pytest.mark.parametrize("layers", ["embedding_and_output", "last_1", "*norm*"])
def test_only_the_chosen_layers_are_touched(layers: str) -> None:
    model, batch = build("llama"), batch_of(packed=True)
    directions = directions_for(model, layers=layers)
    expected = products(unit_gradients(model, batch, directions.tensors), directions)
    assert relative(hook_scores(model, directions, batch).scores, expected) < 1e-9
    assert len(directions.tensors) < len(select_parameters(model))


def digest(model: nn.Module) -> list[object]:
    states: list[object] = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    for name, module in model.named_modules():
        states.append((name, module.training, "forward" in module.__dict__, sorted(module.__dict__)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = None if parameter.grad is None else parameter.grad.tolist()
        states.append((name, parameter.requires_grad, grad, id(parameter), parameter.tolist()))
    return states


def test_no_trace_is_left_not_even_by_an_error() -> None:
    model, batch = build("llama", tied=True).train(), batch_of(packed=True)
    model.model.layers[0].eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    parameters, directions = select_parameters(model), directions_for(model)
    model.model.norm.weight.requires_grad_(False)
    del parameters["model.norm.weight"], directions.tensors["model.norm.weight"]
    before = digest(model)
    hook_scores(model, directions, batch)
    hook_norms(model, parameters, batch)
    per_unit_gradients(model, parameters, batch, lambda name, gradients: None)
    loop_scores(model, directions, batch)
    assert digest(model) == before

    def fail(name: str, gradients: torch.Tensor) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        per_unit_gradients(model, parameters, batch, fail)
    assert digest(model) == before


class Checkpointed(nn.Module):
    """A block that autograd runs twice."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.module, self.reentrant = block, reentrant

    def forward(self, *inputs: torch.Tensor, **named: object) -> torch.Tensor:
        def run(*values: torch.Tensor) -> torch.Tensor:
            return self.module(*values, **named)

        return checkpoint(run, *inputs, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_count_once(reentrant: bool) -> None:
    model, batch = build("llama", tied=True), batch_of(packed=True)
    directions, parameters = directions_for(model), select_parameters(model)
    expected, norms = hook_scores(model, directions, batch).scores, hook_norms(model, parameters, batch)
    for place, block in enumerate(model.model.layers):
        model.model.layers[place] = Checkpointed(block, reentrant)
    assert relative(hook_scores(model, directions, batch).scores, expected) < 1e-12
    assert relative(hook_norms(model, parameters, batch), norms) < 1e-12


def test_rows_without_a_label_score_zero() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    batch["labels"][1] = -100
    found = hook_scores(model, directions_for(model), batch)
    assert found.tokens[1] == 0
    assert found.losses[1] == 0
    assert (found.scores[1] == 0).all()
    assert (found.scores[0] != 0).all()
    batch["labels"][:] = -100
    assert (hook_scores(model, directions_for(model), batch).scores == 0).all()


def test_tokens_of_another_tokenizer() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    batch["input_ids"][2, 3] = VOCABULARY
    with pytest.raises(UserError, match=f"vocabulary of {VOCABULARY}, found {VOCABULARY}"):
        hook_scores(model, directions_for(model), batch)


def test_gradients_that_are_not_finite() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[batch["input_ids"][2, 0]] = torch.nan
    parameters = select_parameters(model)
    for score in (
        lambda: hook_scores(model, directions_for(model), batch),
        lambda: hook_norms(model, parameters, batch),
        lambda: hook_projected(model, Projection.random(parameters, 2, 0), batch),
    ):
        with pytest.raises(UserError, match="found NaN or infinity for unit"):
            score()


def test_directions_of_another_model() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    with pytest.raises(UserError, match="of the model's trainable parameters, found 'transformer"):
        hook_scores(model, directions_for(build("gpt2")), batch)
    wrong = Directions(("p",), {"model.norm.weight": torch.zeros(1, 3)})
    with pytest.raises(UserError, match=r"'model.norm.weight'.*\(16,\), found \(3,\)"):
        hook_scores(model, wrong, batch)


def test_frozen_model() -> None:
    model = build("llama")
    directions = directions_for(model)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="none with requires_grad"):
        hook_scores(model, directions, batch_of(packed=True))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_refused(whole: bool) -> None:
    model = build("llama")
    directions = directions_for(model)
    if whole:
        model = torch.compile(model)  # type: ignore[assignment]
    else:
        model.model.layers[1].compile()
    with pytest.raises(UserError, match="forward or the microbatch scorer"):
        hook_scores(model, directions, batch_of(packed=True))


class Mixer(nn.Module):
    """A layer that sees the tokens of a row side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        hidden = self.mix(self.embedding(batch["input_ids"]).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(hidden)}


def test_a_layer_over_something_else_than_tokens() -> None:
    torch.manual_seed(0)
    model = Mixer()
    with pytest.raises(UserError, match="expected 'mix' to see one vector for each of 4 x 24 tokens"):
        hook_scores(model, directions_for(model), plain_batch(4, 0))
    rest = directions_for(model, layers=["embedding.*", "head.*"])  # type: ignore[arg-type]
    assert hook_scores(model, rest, plain_batch(4, 0)).scores.shape == (4, 3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(VOCABULARY, 4, scale_grad_by_freq=True), "without scale_grad_by_freq.*'0'"),
        (nn.BatchNorm1d(4), "found BatchNorm1d at '0'"),
        (nn.Conv1d(4, 4, 1), "found Conv1d at '0'"),
    ],
)
def test_layers_whose_gradients_are_not_sums_over_tokens(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(UserError, match=message):
        hook_scores(model, directions_for(model), plain_batch(2, 0))


@pytest.mark.parametrize("score", [hook_scores, loop_scores, forward_scores])
@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_outside_the_vocabulary_are_refused(score: Callable[..., object], token: int) -> None:
    model, batch = build("llama"), random_batch(2, 1)
    batch["input_ids"][1, 3] = token
    with pytest.raises(UserError, match=f"token ids from 0 to below .* of {VOCABULARY}, found {token}"):
        score(model, directions_for(model), batch)
