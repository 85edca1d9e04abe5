"""Estimates against the bytes that steps of real models take on each rank, and against published numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cheapertraining.config import load_run_config
from cheapertraining.distillation import chunked
from cheapertraining.distributed import estimate
from cheapertraining.distributed.estimate import Plan, Shape, estimate_memory, memory_of_run, shape_of_model
from cheapertraining.distributed.throughput import GPUS, estimate_speed
from cheapertraining.errors import UserError
from cheapertraining.models import build_causal_lm
from tests.processes import run_on_ranks
from tools.bench._planning_published import PUBLISHED
from tools.bench._planning_steps import config_of_case, measure, predicted, predicted_kept
from tools.bench.planning import CASES
from tools.estimate import main

LLAMA_70B = Shape(32000, 8192, 28672, 80, 64, 8, 128, False)

PEAKS = {
    "single, half": 0.01, "single, live teacher": 0.02, "ddp": 0.12, "fsdp2": 0.15, "tp": 0.2,
    "1f1b": 0.1,
}  # fmt: skip
"""Cases, and how far the predicted peak may be off. On gloo, buffers of messages come and go as they please."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Of each case what its ranks have measured."""
    folder = tmp_path_factory.mktemp("measured")
    for ranks in (1, 2):
        run_on_ranks(work, folder, [name for name in PEAKS if CASES[name][0] == ranks], ranks=ranks)
    files = {name: sorted(folder.glob(f"{name}.*.json")) for name in PEAKS}
    return {name: [json.loads(file.read_text()) for file in found] for name, found in files.items()}


def work(rank: int, ranks: int, folder: Path, names: list[str]) -> None:
    """Measure cases on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{ranks}", rank=rank, world_size=ranks)
    for name in names:
        _, layout, overrides = CASES[name]
        found = measure(config_of_case(layout, ranks, *overrides))
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", PEAKS)
def test_memory_is_what_steps_take(name: str, measured: dict[str, list[dict[str, float]]]) -> None:
    ranks, layout, overrides = CASES[name]
    config = config_of_case(layout, ranks, *overrides)
    assert len(measured[name]) == ranks
    for expected, found in zip(predicted(config, ranks), measured[name], strict=True):
        assert {part: getattr(expected, part) for part in ("parameters", "gradients", "optimizer")} == {
            part: found[part] for part in ("parameters", "gradients", "optimizer")
        }
        if "kept" in found:
            assert predicted_kept(config, ranks) == pytest.approx(found["kept"], rel=0.01)
        assert expected.total == pytest.approx(found["peak"], rel=PEAKS[name])


def test_chunks_are_those_of_the_distillation_loss() -> None:
    assert {False: chunked.CHUNK["cpu"], True: chunked.CHUNK["cuda"]} == estimate.CHUNK_LOGITS
    assert {False: chunked.BLOCK["cpu"], True: chunked.BLOCK["cuda"]} == estimate.BLOCK_LOGITS
    assert chunked.CHUNK_TOKENS == estimate.CHUNK_TOKENS


def test_operations_are_those_that_the_speed_monitor_counts() -> None:
    config = config_of_case("single", 1).model
    ids = torch.zeros(2, 128, dtype=torch.int64)
    counted = build_causal_lm(config, 2048).flops_per_batch({"input_ids": ids})
    assert shape_of_model(config).flops_per_token(128) * 256 == pytest.approx(counted, rel=1e-9)


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
    one = estimate_memory(LLAMA_70B, Plan(4096, 1, 64, fsdp=True))
    cut = estimate_memory(LLAMA_70B, Plan(4096, 1, 64, shard=8, fsdp=True))
    assert (cut.parameters, cut.optimizer) == (one.parameters / 8, one.optimizer / 8)
    both = estimate_memory(LLAMA_70B, Plan(4096, 1, 64, shard=2, tensor=4, fsdp=True))
    # Norms are cut by FSDP2 alone: 2 a layer and the last.
    assert both.parameters == one.parameters / 8 + 4 * 161 * 8192 * (1 / 2 - 1 / 8)
    piped = {name: estimate_memory(LLAMA_70B, Plan(4096, 1, 64, stages=8, schedule=name)) for name in ("gpipe", "1f1b")}
    assert piped["gpipe"].activations == pytest.approx(8 * piped["1f1b"].activations, rel=0.01)
    assert one.parameters / 8 < piped["1f1b"].parameters < one.parameters / 7.5
    again = estimate_memory(LLAMA_70B, Plan(4096, 1, 64, fsdp=True, checkpointing=True))
    assert again.activations < one.activations / 10
    offloaded = estimate_memory(LLAMA_70B, Plan(4096, 1, 64, fsdp=True, offloaded=True))
    assert offloaded.total == one.total - 16 * LLAMA_70B.parameters


def test_bubbles_and_recomputation_cost_what_their_papers_say() -> None:
    plain = estimate_speed(LLAMA_70B, Plan(4096, 1, 64), GPUS["h100"])
    assert plain.mfu == pytest.approx(0.4)
    piped = estimate_speed(LLAMA_70B, Plan(4096, 1, 64, stages=8), GPUS["h100"])
    assert piped.bubble == pytest.approx(7 / (64 + 7))
    assert piped.tokens_per_second == pytest.approx(8 * plain.tokens_per_second * 64 / 71)
    again = estimate_speed(LLAMA_70B, Plan(4096, 1, 64, checkpointing=True), GPUS["h100"], utilization=0.4)
    assert again.tokens_per_second == pytest.approx(plain.tokens_per_second * 3 / 4)


def test_rings_leave_a_node_by_the_cards_of_all_their_members() -> None:
    """Slow links and one micro-batch, so that transfers bind: FSDP2 within a node, over two, and replicas of shards."""
    shape, gpu = LLAMA_70B, GPUS["h100"]

    def seconds(**sizes: Any) -> float:
        return estimate_speed(shape, Plan(128, 1, 16, fsdp=True, **sizes), gpu, network=1e9).communication

    moved = 8 * shape.parameters  # gathered twice in half precision, reduced in single
    assert seconds(shard=8) == pytest.approx(2 * moved * 7 / 8 / 450e9)
    assert seconds(shard=16) == pytest.approx(moved * 15 / 16 / 8e9)
    assert seconds(shard=8, replicate=2) == pytest.approx(moved * 7 / 8 / 450e9 + shape.parameters / 8 * 4 / 1e9)


def test_published_speeds_are_not_far_off() -> None:
    """Others' models and kernels, on H100 and A100; float8 counts as bfloat16 here and is left out."""
    for run in PUBLISHED:
        if "float8" not in run.name and "405B" not in run.name:
            speed = estimate_speed(run.shape, run.plan, GPUS[run.gpu]).tokens_per_second / run.plan.ranks
            assert 0.7 < speed / run.tokens < 1.25, run.name


def test_the_tool_reads_models_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--gpus", "8", "compose.distributed=fsdp2", "train_loader.global_batch_size=64"]
    given += ["train_loader.device_microbatch_size=1"]
    assert main(["llama_7b", "model.vocab_size=32000", "data.seq_len=4096", *given]) == 0
    assert "6.74G parameters on 8 GPUs: replicate 1, shard 8" in capsys.readouterr().out
    assert main(["mixed_pretrain", *given]) == 2
    assert "model.vocab_size: expected a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpu", "h10"], "--gpu: expected one of b200, .* found 'h10'. Did you mean 'h100'"),
        (["--gpus", "0"], "--gpus: expected a number above 0, found 0"),
        (["--gpus", "6", "compose.distributed=fsdp2_tp", "parallelism.tp.tensor_parallel_degree=4"], "fits the 6 proc"),
        (
            ["--gpus", "6", "train_loader.global_batch_size=64"],
            r"global_batch_size: expected a multiple .*\(6\), found 64",
        ),
        (
            ["model.num_layers=8", "compose.distributed=pp", "train_loader.device_microbatch_size=8"],
            "as many micro-batches",
        ),
        (["compose.distributed=fsdp2"], "device_microbatch_size: Composer finds it by itself .* only for whole models"),
        (["model.name_or_path=nowhere"], "nowhere/config.json: expected the sizes of a Llama-like model"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mixed_pretrain", "model.vocab_size=512", "train_loader.global_batch_size=32", *given]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


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
