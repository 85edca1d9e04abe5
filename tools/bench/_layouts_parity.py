"""Losses and final weights under each layout, optimizer and objective, against one process at the same global batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from cheapertraining.config import ModelConfig
from cheapertraining.distillation.cache_job import CacheJob
from cheapertraining.distillation.caching import cache_teacher
from cheapertraining.models import build_causal_lm
from tools.bench import _layouts
from tools.bench._layouts import (
    ENGINES,
    OPTIMIZERS,
    PIPELINES,
    RAGGED,
    SOURCES,
    VOCABULARY,
    Outcome,
    config_of,
    difference,
    file_name,
    name_of,
    outcome_of,
    run_once,
)

__all__ = ["report_parity"]

STEPS = 20
TEACHER = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=4,
    max_position_embeddings=32, init_std=0.3,  # untrained, yet not uniform
)  # fmt: skip

VARIANTS: dict[str, tuple[str, list[str]]] = {
    "fsdp2, gathered once": ("fsdp2", ["parallelism.fsdp2.reshard_after_forward=false"]),
    "fsdp2, activations again": ("fsdp2", ["parallelism.activation_checkpointing=true"]),
    "fsdp2, on the host": ("fsdp2", ["parallelism.fsdp2.cpu_offload=true"]),
    "fsdp2, compiled": ("fsdp2", ["parallelism.compile_blocks=true"]),
    "tp, activations again": ("tp", ["parallelism.activation_checkpointing=true"]),
    "pp 1f1b, activations again": ("pp", ["parallelism.activation_checkpointing=true"]),
}
"""Options, each under one layout on two processes, with AdamW and cross-entropy."""

FEWER = ["train_loader.device_microbatch_size=8"]
"""Under tensor parallelism, which sends something for each layer of each microbatch: still two a batch."""


class Case(NamedTuple):
    """One run of the table."""

    layout: str
    base: str
    overrides: list[str]
    objectives: list[str]
    optimizers: list[str]

    def names(self, world: int) -> list[tuple[str, str, str]]:
        """Layout with its processes, objective and optimizer of each run."""
        return [
            (name_of(self.layout, world), objective, optimizer)
            for objective in self.objectives
            for optimizer in self.optimizers
        ]


def cases(objectives: list[str]) -> dict[int, list[Case]]:
    """All runs by number of processes."""
    found: dict[int, list[Case]] = {}
    for world in (1, 2, 4):
        rows = [(layout, layout, FEWER if "tp" in layout else []) for layout in ENGINES[world]]
        rows += [(f"pp {schedule}", "pp", options) for schedule, options in PIPELINES[world].items()]
        found[world] = [
            # FSDP1 does not distil.
            Case(*row, [each for each in objectives if row[1] != "fsdp" or each == "cross_entropy"], list(OPTIMIZERS))
            for row in rows
        ]
    for name, (base, overrides) in VARIANTS.items():
        found[2].append(Case(name, base, overrides, ["cross_entropy"], ["adamw"]))
    return found


def write_objectives(path: Path, folder: Path) -> dict[str, list[str]]:
    """What a run trains for, as overrides; a teacher and its cache are written for the sample of ``path``'s run."""
    teacher, cache = folder / "teacher", folder / "cache"
    build_causal_lm(TEACHER, VOCABULARY, seed=4).model.save_pretrained(teacher)
    data = Path(config_of(path, "single").data.local)
    cache_teacher(CacheJob(teacher, [data / source / "train" for source in SOURCES], cache), progress=False)
    return {
        "cross_entropy": [],
        "live_kl": [f"algorithms.distillation.teacher.path={teacher}", "algorithms.distillation.temperature=2"],
        "cached": [f"algorithms.distillation.cache={cache}"],
    }


def train_all(path: Path, chosen: list[Case], objectives: dict[str, list[str]], results: Path) -> None:
    """Run the cases on this group; rank 0 writes ``results/<name>.pt``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in chosen:
        for layout, objective, optimizer in case.names(world):
            name = _file(layout, objective, optimizer)
            choice = [f"run_name={name}", f"max_duration={STEPS}ba", *case.overrides, *objectives[objective]]
            outcome = run_once(config_of(path, case.base, *choice), optimizer, algorithms=RAGGED)
            if rank == 0:
                torch.save(vars(outcome), results / f"{name}.pt")


def _file(layout: str, objective: str, optimizer: str) -> str:
    return file_name(f"{layout}-{objective}-{optimizer}")


def _found(folder: Path, layout: str, objective: str, optimizer: str) -> Outcome:
    return outcome_of(folder / f"{_file(layout, objective, optimizer)}.pt")


def report_parity(path: Path, folder: Path) -> None:
    """Print the table of largest relative differences from one process."""
    objectives = write_objectives(path, folder)
    chosen = cases(list(objectives))
    print("\n| layout | objective | losses, AdamW / SGD | final weights, AdamW / SGD |\n| --- | --- | --- | --- |")
    for world, some in chosen.items():
        _layouts.spawn(train_all, world, path, some, objectives, folder)
        if world == 1:
            continue
        for case in some:
            for objective in case.objectives:
                errors = [
                    difference(
                        _found(folder, name_of(case.layout, world), objective, optimizer),
                        _found(folder, "single", objective, optimizer),
                    )
                    for optimizer in case.optimizers
                ]
                cells = [" / ".join(f"{error[part]:.0e}" for error in errors) for part in range(2)]
                print(f"| {name_of(case.layout, world)} | {objective} | {' | '.join(cells)} |", flush=True)
