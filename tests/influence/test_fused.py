"""The fused scorer: against torch.func, with the training gradients untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import token_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners import DataInf
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.influence.scorers.loop import loop_gradients, loop_scores
from tests.influence.gradients import (
    batch_of,
    build,
    directions_for,
    losses_of,
    products,
    relative,
    unit_gradients,
)
from tests.influence.test_hook import CELLS
from tests.influence.tiny_llama import LENGTH, VOCABULARY, Batch, random_batch

SCALE = 1 / 37


def trained(model: nn.Module, batches: list[Batch], scorer: FusedScorer | None = None) -> dict[str, torch.Tensor]:
    """Gradients of a step over microbatches, scored or not."""
    model.zero_grad()
    for batch in batches:
        if scorer is None:
            (losses_of(model, batch).sum() * SCALE).backward()
        else:
            with scorer.armed(batch):
                (losses_of(model, batch).sum() * SCALE).backward()
    return {name: parameter.grad.clone() for name, parameter in select_parameters(model).items()}


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(relative(found[name], gradient) for name, gradient in expected.items())


def split(batch: Batch) -> list[Batch]:
    return [{name: rows[part] for name, rows in batch.items()} for part in (slice(0, 3), slice(3, None))]


def datainf(gradients: dict[str, torch.Tensor], directions: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Kwon et al., equation 5, unit by unit, as it stands there."""
    total = torch.zeros(len(next(iter(gradients.values()))), len(next(iter(directions.values()))), dtype=torch.float64)
    for name, gradient in gradients.items():
        g, v = gradient.flatten(1), directions[name].flatten(1)
        damping = scale * (g.pow(2).sum(1) / g.shape[1]).mean()
        for k, direction in enumerate(v):
            solved = torch.zeros_like(direction)
            for one in g:
                solved += direction - (direction @ one) / (damping + one @ one) * one
            total[:, k] += g @ (solved / (len(g) * damping))
    return total


@pytest.mark.parametrize(("kind", "tied", "lora", "packed"), CELLS)
def test_everything_equals_autograd(kind: str, tied: bool, lora: bool, packed: bool) -> None:
    model, batch = build(kind, tied=tied, lora=lora), batch_of(packed)
    directions = directions_for(model)
    gradients = unit_gradients(model, batch, directions.tensors)
    squares = sum(gradient.flatten(1).pow(2).sum(1) for gradient in gradients.values())
    for microbatches in ([batch], split(batch)):
        plain = trained(model, microbatches)
        for norms in (False, True):
            scorer = FusedScorer(model, directions, norms=norms)
            assert gradient_error(trained(model, microbatches, scorer), plain) < 1e-12
            found = scorer.collect(SCALE)
            assert relative(found.scores, products(gradients, directions)) < 1e-9
            assert torch.equal(found.tokens, (batch["labels"][:, 1:] != -100).sum(1))
            if norms:
                assert relative(found.squared_norms, squares) < 1e-9
        scorer = FusedScorer(model, directions, datainf=0.1)
        assert gradient_error(trained(model, microbatches, scorer), plain) < 1e-12
        rows = [slice(0, 4)] if len(microbatches) == 1 else [slice(0, 3), slice(3, 4)]
        expected = [datainf({n: g[part] for n, g in gradients.items()}, directions.tensors, 0.1) for part in rows]
        assert relative(scorer.collect(SCALE).scores, torch.cat(expected)) < 1e-9


@pytest.mark.parametrize("count", [1, 6])
def test_documents(count: int) -> None:
    """One direction is scored token by token, six from the documents' gradients."""
    model, batch = build("llama", tied=True), random_batch(5, 3)
    directions = directions_for(model, count)
    plain = trained(model, [batch])
    scorer = FusedScorer(model, directions, by="document", norms=count == 6)
    assert gradient_error(trained(model, [batch], scorer), plain) < 1e-12
    found, expected = scorer.collect(SCALE), loop_scores(model, directions, batch, by="document")
    assert relative(found.scores, expected.scores) < 1e-9
    assert torch.equal(found.tokens, expected.tokens)
    if count == 6:
        squares = [
            sum(gradient.pow(2).sum() for gradient in one.values())
            for one in loop_gradients(model, select_parameters(model), batch, by="document")
        ]
        assert relative(found.squared_norms, torch.stack(squares)) < 1e-9


def test_given_damping_does_not_depend_on_the_scale_of_the_loss() -> None:
    """Against the mean of the inverses of each unit's damped Fisher matrix, for layers small enough to invert."""
    model, batch = build("llama"), batch_of(packed=True)
    directions = directions_for(model, layers="*norm*")
    scorer = FusedScorer(model, directions, datainf=dict.fromkeys(directions.tensors, 0.5))
    trained(model, [batch], scorer)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for name, g in unit_gradients(model, batch, directions.tensors).items():
        inverses = [torch.linalg.inv(torch.outer(one, one) + 0.5 * torch.eye(len(one))) for one in g]
        expected += g @ torch.stack(inverses).mean(0) @ directions.tensors[name].T
    assert relative(scorer.collect(SCALE).scores, expected) < 1e-9


def huggingface_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": huggingface_llama,
    "gpt2": lambda: build("gpt2", torch.float32, tied=True),
    "lora": lambda: build("llama", torch.float32, lora=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_float32(kind: str) -> None:
    model, batch = MODELS[kind](), batch_of(packed=True)
    directions = directions_for(model)
    plain = trained(model, [batch])
    scorer = FusedScorer(model, directions)
    assert gradient_error(trained(model, [batch], scorer), plain) < 1e-6
    expected = products(unit_gradients(model, batch, directions.tensors), directions)
    assert relative(scorer.collect(SCALE).scores, expected) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("norms", [True, False])
def test_activation_checkpointing(reentrant: bool, kind: str, norms: bool) -> None:
    model, batch = build(kind, tied=True), batch_of(packed=True)
    directions = directions_for(model)
    gradients = unit_gradients(model, batch, directions.tensors)
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    plain = trained(model, [batch])
    scorer = FusedScorer(model, directions, norms=norms)
    assert gradient_error(trained(model, [batch], scorer), plain) < 1e-12
    found = scorer.collect(SCALE)
    assert relative(found.scores, products(gradients, directions)) < 1e-9
    if norms:
        squares = sum(gradient.flatten(1).pow(2).sum(1) for gradient in gradients.values())
        assert relative(found.squared_norms, squares) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("norms", [True, False])
def test_bfloat16_autocast(kind: str, norms: bool) -> None:
    model, batch = MODELS[kind](), batch_of(packed=True)
    directions = directions_for(model)
    scorer = FusedScorer(model, directions, norms=norms)
    with torch.autocast("cpu", torch.bfloat16):
        plain = trained(model, [batch])
        found = trained(model, [batch], scorer)
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    scores = scorer.collect(SCALE)
    # Summed over the samples, scores are the products of the step's own gradient, which bfloat16 has rounded.
    total = products({name: gradient[None] / SCALE for name, gradient in plain.items()}, directions)
    sizes = Directions(directions.names, {name: tensor.abs() for name, tensor in directions.tensors.items()})
    reach = products({name: gradient[None].abs() for name, gradient in plain.items()}, sizes)
    assert ((scores.scores.sum(0) - total[0]).abs() < 2**-8 * reach[0] / SCALE).all()
    expected = products(unit_gradients(model, batch, directions.tensors), directions)
    assert relative(scores.scores, expected) < 0.03


def test_half_precision_weights() -> None:
    model, batch = huggingface_llama().to(torch.bfloat16), batch_of(packed=True)
    wide = huggingface_llama()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    directions = directions_for(wide)
    plain = trained(model, [batch])
    scorer = FusedScorer(model, directions)
    found = trained(model, [batch], scorer)
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    expected = products(unit_gradients(wide, batch, directions.tensors), directions)
    assert relative(scorer.collect(SCALE).scores, expected) < 0.05


@pytest.mark.parametrize("layers", ["embedding_and_output", "last_1", "*norm*"])
def test_only_the_chosen_layers_are_touched(layers: str) -> None:
    model, batch = build("llama"), batch_of(packed=True)
    directions = directions_for(model, layers=layers)
    plain = trained(model, [batch])
    scorer = FusedScorer(model, directions)
    with scorer.armed(batch):
        touched = {name for name, module in model.named_modules() if "forward" in module.__dict__}
        assert touched == {name.rsplit(".", 1)[0] for name in directions.tensors}
        (losses_of(model, batch).sum() * SCALE).backward()
    expected = products(unit_gradients(model, batch, directions.tensors), directions)
    assert relative(scorer.collect(SCALE).scores, expected) < 1e-9
    assert gradient_error(trained(model, [batch], scorer), plain) < 1e-12


def test_forward_comes_back_and_failed_microbatches_do_not_count() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    scorer = FusedScorer(model, directions_for(model))

    def out_of_memory() -> None:
        with scorer.armed(batch):
            losses_of(model, batch).sum().backward()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        out_of_memory()
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(UserError, match="expected a microbatch"):
        scorer.collect()
    trained(model, split(batch), scorer)
    assert len(scorer.collect().scores) == 4
    with pytest.raises(UserError, match="expected a microbatch"):
        scorer.collect()


def test_a_forward_without_gradient_inside_is_not_scored() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    directions = directions_for(model)
    scorer = FusedScorer(model, directions)
    with scorer.armed(batch):
        with torch.no_grad():
            losses_of(model, random_batch(2, 9))
        (losses_of(model, batch).sum() * SCALE).backward()
    expected = products(unit_gradients(model, batch, directions.tensors), directions)
    assert relative(scorer.collect(SCALE).scores, expected) < 1e-9


def test_armed_without_backward() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    scorer = FusedScorer(model, directions_for(model))
    with pytest.raises(UserError, match="expected a backward pass"), scorer.armed(batch):
        losses_of(model, batch)


def test_gradients_that_are_not_finite_are_handed_on() -> None:
    model, batch = build("llama"), batch_of(packed=True)
    scorer = FusedScorer(model, directions_for(model))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    trained(model, [batch], scorer)
    found: SampleScores = scorer.collect()
    assert torch.isnan(found.scores).any()


def test_compiled_models_are_refused() -> None:
    model = build("llama")
    directions = directions_for(model)
    model.model.layers[0].compile()
    with pytest.raises(UserError, match="forward or the microbatch scorer"):
        FusedScorer(model, directions)


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=3)
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        hidden = self.embedding(batch["input_ids"])
        return {"logits": self.head(self.norm(self.layer(self.layer(hidden).tanh())))}


def test_layers_used_twice_and_padding() -> None:
    torch.manual_seed(0)
    model, batch = Twice().double(), batch_of(packed=False)
    directions = directions_for(model)
    scorer = FusedScorer(model, directions)
    with scorer.armed(batch):
        token_losses(model(batch)["logits"], batch["labels"])[0].sum().backward()
    expected = loop_scores(model, directions, batch).scores
    assert relative(scorer.collect().scores, expected) < 1e-9
    norms = FusedScorer(model, directions, norms=True)
    with pytest.raises(UserError, match=r"'layer\.\w+' to be used once"), norms.armed(batch):
        model(batch)["logits"].sum().backward()


def test_units_without_a_token_are_not_in_datainf_s_fisher_set() -> None:
    model, batch = build("llama"), random_batch(4, 3)
    batch["labels"][2] = -100
    directions = directions_for(model)
    scorer = FusedScorer(model, directions, datainf=0.1)
    trained(model, [batch], scorer)
    preconditioned = DataInf(select_parameters(model)).fit(model, [batch]).apply(directions)
    assert relative(scorer.collect(SCALE).scores, loop_scores(model, preconditioned, batch).scores) < 1e-8


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), {"lm_head.weight": 0.1}])
def test_a_damping_that_is_not_above_0_is_refused(damping: float | dict[str, float]) -> None:
    model = build("llama")
    with pytest.raises(UserError, match="datainf: expected a damping above 0 for"):
        FusedScorer(model, directions_for(model), datainf=damping)
