"""Estimates against the bytes that real models, optimizers and backward passes take, and against published numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.config import ModelConfig, load_run_config
from cheapertraining.distributed.estimate import (
    Plan,
    Shape,
    activation_bytes,
    estimate_memory,
    memory_of_run,
    shape_of_model,
)
from cheapertraining.distributed.fsdp2 import checkpoint_blocks
from cheapertraining.distributed.throughput import GPUS, estimate_speed
from cheapertraining.errors import UserError
from cheapertraining.models import CausalLM, build_causal_lm
from tools.estimate import main

SMALL = ModelConfig(
    vocab_size=97, hidden_size=64, intermediate_size=176, num_layers=3, num_heads=4, num_kv_heads=2,
    max_position_embeddings=64, tie_embeddings=False,
)  # fmt: skip
ROWS, LENGTH = 2, 64
PLAN = Plan(length=LENGTH, rows=ROWS, batch=ROWS, half=False, flash=False)
LLAMA_70B = Shape(32000, 8192, 28672, 80, 64, 8, 128, False)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH).repeat(ROWS, 1)}


def kept_bytes(model: CausalLM, half: bool) -> int:
    """What autograd keeps of a forward pass, each storage once, but for parameters and copies of them."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    shapes = {tuple(p.shape) for p in matrices} | {tuple(p.T.shape) for p in matrices}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not (half and tuple(tensor.shape) in shapes):
            found[storage.data_ptr()] = storage
        return tensor

    given = batch()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        outputs = model(given)
        model.loss(outputs, given)
    log_softmax = ROWS * LENGTH * 97 * 4  # counted with the logits
    return sum(storage.nbytes() for storage in found.values()) - log_softmax


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_gradients_and_moments_are_exact(tied: bool) -> None:
    config = replace(SMALL, tie_embeddings=tied)
    model = build_causal_lm(config, 97)
    given = batch()
    model.loss(model(given), given).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    memory = estimate_memory(shape_of_model(config), PLAN)
    assert memory.parameters == sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(moment.nbytes for moment in moments)
    assert shape_of_model(config).flops_per_token(LENGTH) * ROWS * LENGTH == pytest.approx(
        model.flops_per_batch(given), rel=1e-9
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layers", [2, 5])
def test_activations_are_what_autograd_keeps(layers: int, half: bool) -> None:
    config = replace(SMALL, num_layers=layers)
    memory = estimate_memory(shape_of_model(config), replace(PLAN, half=half))
    assert memory.activations == pytest.approx(kept_bytes(build_causal_lm(config, 97), half), rel=0.01)


def test_checkpointed_layers_keep_their_inputs() -> None:
    config = replace(SMALL, num_layers=5)
    model = build_causal_lm(config, 97)
    checkpoint_blocks(model.model, model.blocks)
    shape = shape_of_model(config)
    memory = estimate_memory(shape, replace(PLAN, checkpointing=True))
    again = activation_bytes(shape, False, LENGTH) * ROWS * LENGTH  # of the layer that runs once more
    # What all layers share is given to each: positions, and the mask, which is not counted for each.
    assert memory.activations - again == pytest.approx(kept_bytes(model, False), rel=0.1)


@pytest.mark.parametrize(
    ("name", "vocabulary", "billions"), [("llama_7b", 32000, 6.74), ("mobilellm_140m", 128256, 0.14)]
)
def test_presets_have_as_many_parameters_as_their_models(name: str, vocabulary: int, billions: float) -> None:
    given = [f"compose.model={name}", f"model.vocab_size={vocabulary}"]
    config = load_run_config("mixed_pretrain", given).model
    with torch.device("meta"):
        model = build_causal_lm(config, vocabulary)
    assert shape_of_model(config).parameters == sum(p.numel() for p in model.parameters())
    assert shape_of_model(config).parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_llama_70b_is_69_billion() -> None:
    """arXiv 2307.09288, table 1, says 70B; its checkpoint has 68,976,648,192."""
    assert LLAMA_70B.parameters == 68_976_648_192


def test_layouts_divide_what_they_should() -> None:
    one = estimate_memory(LLAMA_70B, Plan(4096, 1, 64))
    for sizes in ({"shard": 8}, {"tensor": 8}, {"shard": 2, "tensor": 4}):
        cut = estimate_memory(LLAMA_70B, Plan(4096, 1, 64, **sizes))
        assert cut.parameters == one.parameters / 8
        assert cut.optimizer == one.optimizer / 8
    piped = {name: estimate_memory(LLAMA_70B, Plan(4096, 1, 64, stages=8, schedule=name)) for name in ("gpipe", "1f1b")}
    assert piped["gpipe"].activations == pytest.approx(8 * piped["1f1b"].activations)
    assert one.parameters / 8 < piped["1f1b"].parameters < one.parameters / 7.5
    assert estimate_memory(LLAMA_70B, Plan(4096, 1, 64, checkpointing=True)).activations < one.activations / 10


def test_bubbles_and_recomputation_cost_what_their_papers_say() -> None:
    plain = estimate_speed(LLAMA_70B, Plan(4096, 1, 64), GPUS["h100"], mfu=0.4)
    assert plain.mfu == pytest.approx(0.4)
    piped = estimate_speed(LLAMA_70B, Plan(4096, 1, 64, stages=8), GPUS["h100"], mfu=0.4)
    assert piped.bubble == pytest.approx(7 / (64 + 7))
    assert piped.tokens_per_second == pytest.approx(8 * plain.tokens_per_second * 64 / 71)
    again = estimate_speed(LLAMA_70B, Plan(4096, 1, 64, checkpointing=True), GPUS["h100"], mfu=0.4)
    assert again.tokens_per_second == pytest.approx(plain.tokens_per_second * 3 / 4)


def test_the_tool_reads_models_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--gpus", "8", "compose.distributed=fsdp2", "train_loader.global_batch_size=64"]
    assert main(["llama_7b", "model.vocab_size=32000", "data.seq_len=4096", *given]) == 0
    assert "6.74G parameters on 8 GPUs: replicate 1, shard 8" in capsys.readouterr().out
    assert main(["mixed_pretrain", *given]) == 2
    assert "model.vocab_size: expected a number" in capsys.readouterr().err


def test_a_run_needs_no_more_than_its_config(tiny_run: Path) -> None:
    """What start-up prints: without torch, from the config, the model's sizes and the number of processes."""
    config = load_run_config(tiny_run, ["model.vocab_size=97"])
    shape = shape_of_model(config.model)
    whole = memory_of_run(config, shape, 1, on_gpu=False)
    assert whole.parameters == whole.gradients == whole.optimizer / 2 == 4 * shape.parameters
    cut = load_run_config(tiny_run, ["model.vocab_size=97", "compose.distributed=fsdp2"])
    assert memory_of_run(cut, shape, 2, on_gpu=False).parameters == whole.parameters / 2
    code = "import sys, cheapertraining.distributed.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(UserError, match=r"train_loader.global_batch_size: expected a multiple .*\(7\)"):
        memory_of_run(config, shape, 7, on_gpu=False)
