"""What ``test_tensor_parallel.py`` runs on one rank of two, or of four; all in one process group."""

from __future__ import annotations

import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composer.utils import dist as composer_dist

from cheapertraining.distillation import DenseTargets, Divergence, chunked_distillation_loss
from cheapertraining.distillation.teacher import head_of
from cheapertraining.distributed.parallelism import Layout
from cheapertraining.models import CausalLM
from cheapertraining.models.sharded import build_spread
from tests.distributed.ranks import MODELS, WAYS, checkpoint_of, gradient_error, ragged_batch
from tools.bench._layouts import RAGGED, config_of, resume_from, run_once

STEPS, SAVED_AT = 6, 3

_KEY = "algorithms.distillation"
_RAMPS = (
    f"{_KEY}.alpha={{{{first: 0.9, last: 0.3}}}}",
    f"{_KEY}.temperature={{{{first: 1.0, last: 2.0}}}}",
    f"{_KEY}.source_weights={{{{code: 0.5, topics: 2.0}}}}",
)
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "live": (f"{_KEY}.teacher.path={{folder}}/teacher", *_RAMPS),
    "whole": (f"{_KEY}.teacher.path={{folder}}/without_plan", f"{_KEY}.divergence=skew_reverse_kl"),
    "sampled": (f"{_KEY}.cache={{folder}}/sampled", f"{_KEY}.source_weights={{{{docs: 0}}}}"),
    "top_k": (f"{_KEY}.cache={{folder}}/top_k", f"{_KEY}.divergence=reverse_kl", f"{_KEY}.alpha=0.7"),
    "average": (f"{_KEY}.teacher.kind=average", f"{_KEY}.teacher.decay=0.6", f"{_KEY}.divergence=jensen_shannon"),
}
"""Overrides by objective; ``folder`` is to be filled in."""
OPTIMIZERS = {"sampled": "adamw", "average": "adamw"}
"""By objective; ``sgd`` elsewhere."""

LAYOUTS = {2: "tp", 4: "fsdp2_tp"}
RUNS: dict[int, tuple[str, ...]] = {2: tuple(OBJECTIVES), 4: ("live",)}
"""Objectives by number of ranks; ``tools/bench/layouts.py --parity`` has more."""


def train(path: Path, layout: str, run_name: str, objective: str, *overrides: str) -> None:
    """One run of an objective; what rank 0 has of it then is in ``<run_name>.pt``."""
    chosen = [each.format(folder=path.parent) for each in OBJECTIVES[objective]]
    steps = (f"max_duration={STEPS}ba", f"save_interval={SAVED_AT}ba", f"{_KEY}.log_interval=2ba")
    config = config_of(path, layout, f"run_name={run_name}", *steps, *chosen, *overrides)
    outcome = run_once(config, OPTIMIZERS.get(objective, "sgd"), RAGGED)
    if os.environ.get("RANK", "0") == "0":
        torch.save(vars(outcome), path.parent / f"{run_name}.pt")


def gradients() -> dict[str, float]:
    """Largest relative error of a gradient by architecture: tied and untied heads, separate and fused projections."""
    found, batch = {}, ragged_batch()
    teacher = 2 * torch.randn(*batch["input_ids"].shape, 64, generator=torch.Generator().manual_seed(2))
    for name, make in MODELS.items():
        torch.manual_seed(0)
        whole = CausalLM(make())
        options: dict[str, Any] = {"divergence": Divergence("jensen_shannon"), "temperature": 1.5, "alpha": 0.7}
        inputs = whole.head_inputs(batch)
        labels = batch["labels"]
        chunked_distillation_loss(
            inputs.hidden, head_of(inputs), DenseTargets(teacher), labels, **options
        ).total.backward()
        expected = {
            key: parameter.grad.clone() for key, parameter in whole.named_parameters() if parameter.grad is not None
        }
        make_cut = partial(copy.deepcopy, whole)
        cut = build_spread(make_cut, Layout("fsdp2", 1, 1, 2), WAYS["tp"], "fp32", torch.device("cpu"))
        inputs, group = cut.head_inputs(batch), cut.vocabulary_group
        part = DenseTargets(teacher.chunk(2, dim=-1)[dist.get_rank()])
        chunked_distillation_loss(inputs.hidden, head_of(inputs), part, labels, group=group, **options).total.backward()
        found[name] = gradient_error(cut, expected)
    return found


def work(rank: int, ranks: int, path: Path) -> None:
    """Everything, on this rank."""
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} | {"NODE_RANK": "0"}
    store = f"file://{path.parent}/store{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    composer_dist.initialize_dist("cpu")
    layout, runs = LAYOUTS[ranks], path.parent / "runs"
    if ranks == 2:
        (path.parent / f"gradients{rank}.json").write_text(json.dumps(gradients()))
    for name in RUNS[ranks]:
        train(path, layout, f"{layout}-{name}", name)
    if ranks == 2:
        if rank == 0:
            resume_from(path, f"{layout}-resumed", checkpoint_of(runs, "single-average", SAVED_AT))
        dist.barrier()
        train(path, layout, f"{layout}-resumed", "average", "autoresume=true")
    dist.barrier()
    os._exit(0)  # not by way of the destructors, where gloo's threads may wait for the interpreter
