"""What ``test_tensor_parallel.py`` computes on one rank of four, and alone; ranks are processes of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cheapertraining.config import FSDP2Config, ParallelismConfig, TensorParallelConfig
from cheapertraining.distributed.fsdp2 import shard_with_fsdp2
from cheapertraining.distributed.parallelism import Layout, build_mesh
from cheapertraining.distributed.tensor_parallel import apply_tensor_parallel
from cheapertraining.influence import ProbeBank
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.influence.scorers.gram import GradientEstimator, SourceGradients
from cheapertraining.influence.scorers.hook import hook_scores
from cheapertraining.influence.scorers.loop import loop_scores
from cheapertraining.influence.sharding import gradient_scale, sample_copies
from cheapertraining.models import CausalLM
from cheapertraining.models.sharded import build_spread
from tests.influence.sharded_ranks import leaves_no_trace, refused, unwatched
from tests.influence.tiny_llama import LENGTH, Sources, probe_loader, random_batch

TENSOR = 2
CASES = {"llama": torch.float64, "gpt2": torch.float64, "tied llama in float32": torch.float32}
TRIED = {2: tuple(CASES), 4: ("llama", "tied llama in float32")}
"""Cases by the number of processes."""
MOMENTS = {2: ("llama", "tied llama in float32"), 4: ("llama",)}
"""Those of which moments of gradients are measured too."""
_ROWS = 52  # of the vocabulary: twice two ranks divide them, and no two of its parts are alike


def whole(case: str) -> CausalLM:
    """The model in one piece."""
    torch.manual_seed(0)
    dtype = CASES[case]
    model: PreTrainedModel
    if case == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=_ROWS, initializer_range=0.2, **sizes, **still))
    else:
        # Torch 2.7 takes two tables of one shape, but different dtypes, for one, where a process has both.
        width = 16 if dtype == torch.float64 else 24
        config = LlamaConfig(
            vocab_size=_ROWS, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=LENGTH, initializer_range=0.2,
            tie_word_embeddings=case.startswith("tied"),
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for module in model.modules():
            for name, child in module.named_children():
                if dtype == torch.float64 and type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, nn.RMSNorm(width, eps=config.rms_norm_eps))
    return CausalLM(model.to(dtype))


def cut(case: str, layout: Layout) -> CausalLM:
    """As a run has it; in float64 without the way over the meta device, which makes float32."""
    if CASES[case] == torch.float32:
        settings = ParallelismConfig(tp=TensorParallelConfig(layout.tensor), fsdp2=FSDP2Config())
        return build_spread(lambda: whole(case), layout, settings, "fp32", torch.device("cpu"))
    model, mesh = whole(case), build_mesh(layout, "cpu")
    apply_tensor_parallel(model.model, mesh["tensor_parallel"])
    model.vocabulary_group = mesh["tensor_parallel"].get_group()
    shard_with_fsdp2(model.model, model.blocks, mesh["data_parallel_shard"])
    return model


def moments(model: CausalLM) -> dict[str, torch.Tensor]:
    """Of the sources' gradients, with probes, and of their halves, which leave a sample of each probe over."""
    bank = ProbeBank({"p": probe_loader(), "q": probe_loader(seed=7)}, {"p": 2.0, "q": 1.0}, 5)
    found = GradientEstimator(Sources(), 4, probes=bank).measure(model.eval(), update_index=1, microbatch_size=4)
    parts: dict[str, SourceGradients] = {"": found, "first ": found.halves[0], "second ": found.halves[1]}
    names = ("products", "errors", "squared_norms", "variances", "target_products")
    return {part + name: torch.from_numpy(getattr(each, name)) for part, each in parts.items() for name in names}


def refusals(model: CausalLM) -> dict[str, str]:
    """Scorers that watch single layers."""
    parameters, batch = select_parameters(model), random_batch(2, 1)
    directions, _ = ProbeBank({"p": probe_loader()}, samples=2).directions(model, 0, parameters)
    return refused(
        {
            "hook": lambda: hook_scores(model, directions, batch),
            "fused": lambda: FusedScorer(model, directions),
            "loop": lambda: loop_scores(model, directions, batch),
        }
    )


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    layout, found = Layout("fsdp2", 1, world // TENSOR, TENSOR), dict[str, Any]()
    for case in TRIED[world]:
        found[case] = unwatched(cut(case, layout), rank // TENSOR, layout.data)
        del found[case]["own directions"]
        if case in MOMENTS[world]:
            found[case]["moments"] = moments(cut(case, layout))
        found[case]["scale"] = gradient_scale(cut(case, layout))
        found[case]["copies"] = sample_copies(cut(case, layout))
    leaves_no_trace(cut("llama", layout))
    found["refusals"] = refusals(cut("llama", layout))
    torch.save(found, Path(folder) / f"{world} ranks, {rank}.pt")
    dist.barrier()
    os._exit(0)  # As in sharded_ranks.
