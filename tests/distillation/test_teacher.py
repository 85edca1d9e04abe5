"""Live teachers: frozen, of the student's isolation, refused where they do not fit, and those that are the student."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from cheapertraining.config import ModelConfig
from cheapertraining.distillation.own_teacher import AdapterOffTeacher, AverageTeacher
from cheapertraining.distillation.teacher import TeacherWrapper
from cheapertraining.errors import UserError
from cheapertraining.models import CausalLM, build_causal_lm

SMALL = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=2,
    max_position_embeddings=16, init_std=0.2,
)  # fmt: skip


@pytest.fixture
def model() -> CausalLM:
    torch.set_num_threads(1)
    return build_causal_lm(SMALL, 64, seed=3)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of two documents each."""
    ids = torch.arange(1, 33).view(2, 16) * 7 % 64
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(2, 16)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def test_it_stays_frozen_and_in_evaluation_mode(model: CausalLM, batch: dict[str, torch.Tensor]) -> None:
    model.model.config.attention_dropout = 0.5
    for layer in model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    teacher = TeacherWrapper(model)
    student = nn.ModuleDict({"teacher": teacher})
    student.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(batch).hidden, teacher(batch).hidden)


def test_it_keeps_documents_apart_and_gives_the_models_logits(model: CausalLM, batch: dict[str, torch.Tensor]) -> None:
    teacher = TeacherWrapper(model)
    found = teacher(batch).rows(torch.arange(32)).logits.view(2, 16, 64)
    torch.testing.assert_close(found, model(batch)["logits"])
    for first, last in ((0, 6), (6, 16)):
        alone = model.model(input_ids=batch["input_ids"][:, first:last]).logits
        torch.testing.assert_close(found[:, first:last], alone, rtol=1e-5, atol=1e-5)


def test_its_own_precision(model: CausalLM, batch: dict[str, torch.Tensor]) -> None:
    exact = model(batch)["logits"].detach()
    teacher = TeacherWrapper(model, dtype=torch.bfloat16)
    targets = teacher(batch)
    assert targets.hidden.dtype == torch.bfloat16
    assert float((targets.rows(torch.arange(32)).logits.view(2, 16, 64) - exact).abs().max()) < 0.1 * float(exact.std())


def test_offloaded_it_says_the_same_and_lets_go(model: CausalLM, batch: dict[str, torch.Tensor]) -> None:
    teacher = TeacherWrapper(model)
    expected = teacher(batch).hidden
    teacher.offload(torch.device("cpu"))
    seen: list[int] = []
    masters = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}
    layer = teacher.model.blocks[1]
    layer.mlp.register_forward_hook(lambda module, *_: seen.append(module.up_proj.weight.data_ptr()))
    assert torch.equal(teacher(batch).hidden, expected)
    name = next(name for name, each in teacher.named_parameters() if each is layer.mlp.up_proj.weight)
    assert seen[0] != masters[name]  # computed with a copy
    assert {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()} == masters


def test_what_does_not_fit_is_refused(model: CausalLM, tmp_path: Path) -> None:
    teacher = TeacherWrapper(model)
    with pytest.raises(UserError, match="expected the student's vocabulary of 32, found 64"):
        teacher.check_vocabulary(32)
    with pytest.raises(UserError, match="expected rows of up to 17 tokens"):
        teacher.check_context(17)
    with pytest.raises(UserError, match="found nothing of the kind"):
        TeacherWrapper.load(tmp_path / "nothing")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="quantization=8bit: expected a CUDA device"):
            TeacherWrapper.load(tmp_path, quantization="8bit")


def test_without_its_adapters_the_student_is_what_it_was(model: CausalLM, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="expected a student with PEFT adapters, found none"):
        AdapterOffTeacher(model)
    before = TeacherWrapper(build_causal_lm(SMALL, 64, seed=3))(batch).hidden
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5), model.model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    model.train()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    teacher = AdapterOffTeacher(model)
    torch.testing.assert_close(teacher(batch).hidden, before)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    model.eval()
    assert float((model.head_inputs(batch).hidden - before).abs().max()) > 0.01


def test_the_average_is_that_of_the_weights(model: CausalLM, batch: dict[str, torch.Tensor]) -> None:
    teacher = partial(AverageTeacher, decay=0.75)(model)
    expected = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)), alpha=0.1)
        teacher.update()
        for name, value in model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * value.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(teacher.averages[name].double(), value, rtol=1e-5, atol=1e-6)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = teacher(batch)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name])  # put back
    other = build_causal_lm(SMALL, 64, seed=9)
    other.load_state_dict({name: value.float() for name, value in expected.items()}, strict=False)
    torch.testing.assert_close(
        found.rows(torch.arange(32)).logits.view(2, 16, 64), other(batch)["logits"], rtol=1e-4, atol=1e-4
    )
    fresh = AverageTeacher(model, 0.75)
    fresh.load_state_dict(teacher.state_dict())
    assert all(torch.equal(fresh.averages[name], value) for name, value in teacher.averages.items())
    with pytest.raises(UserError, match="another model"):
        fresh.load_state_dict({"x": torch.zeros(1)})
