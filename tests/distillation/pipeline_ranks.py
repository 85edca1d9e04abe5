"""What ``test_pipeline.py`` runs on one rank of two; all in one process group."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from composer.utils import dist as composer_dist

from cheapertraining.errors import UserError
from tests.distributed.ranks import checkpoint_of
from tools.bench._layouts import RAGGED, config_of, resume_from, run_once

STEPS, SAVED_AT, EVALUATED_AT = 10, 6, 4

_KEY = "algorithms.distillation"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "live": (
        f"{_KEY}.teacher.path={{teacher}}",
        f"{_KEY}.alpha={{{{first: 0.9, last: 0.3}}}}",
        f"{_KEY}.temperature={{{{first: 1.0, last: 2.0}}}}",
        f"{_KEY}.source_weights={{{{code: 0.5, topics: 2.0}}}}",
    ),
    "sampled": (f"{_KEY}.cache={{folder}}/sampled", f"{_KEY}.source_weights={{{{docs: 0}}}}"),
    "top_k": (f"{_KEY}.cache={{folder}}/top_k", f"{_KEY}.divergence=reverse_kl", f"{_KEY}.alpha=0.7"),
}
"""Overrides by objective; ``teacher`` and ``folder`` are to be filled in."""
OPTIMIZERS = {"live": "sgd", "sampled": "adamw", "top_k": "sgd"}

UNTIED = ("model.tie_embeddings=false",)
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "live-gpipe": ("live", "gpipe", UNTIED),
    "live-interleaved": ("live", "interleaved", (f"{_KEY}.teacher.placement=offloaded",)),
    "sampled-1f1b": ("sampled", "1f1b", ("parallelism.activation_checkpointing=true",)),
    "top_k-1f1b": ("top_k", "1f1b", ()),
}
"""Objective, schedule and overrides, by name; ``tools/bench/layouts.py --parity`` has more."""


def objective(name: str, folder: Path, teacher: str) -> list[str]:
    """Overrides of an objective and of what all runs have."""
    steps = (f"max_duration={STEPS}ba", f"save_interval={SAVED_AT}ba", f"{_KEY}.log_interval=2ba")
    return [*(each.format(folder=folder, teacher=teacher) for each in OBJECTIVES[name]), *steps]


def twin(run: str) -> str:
    """The run of one process that a run of the pipeline is to be like."""
    name, _, overrides = RUNS[run]
    return f"alone-{name}{'-untied' if UNTIED[0] in overrides else ''}"


def work(rank: int, ranks: int, path: Path) -> None:
    """Everything, on this rank, in a folder of its own: ``teacher`` is in the last one's alone."""
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} | {"NODE_RANK": "0"}
    folder = path.parent
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    composer_dist.initialize_dist("cpu")
    os.chdir(folder / f"rank{rank}")
    for name, (learned, schedule, overrides) in RUNS.items():
        choice = (f"run_name={name}", f"parallelism.pp.schedule={schedule}", *overrides)
        run_once(config_of(path, "pp", *objective(learned, folder, "teacher"), *choice), OPTIMIZERS[learned], RAGGED)
    for name in ("live-interleaved", "sampled-1f1b"):
        if rank == 0:
            resume_from(path, f"{name}-resumed", checkpoint_of(folder / "runs", name, SAVED_AT))
        dist.barrier()
        learned, _, overrides = RUNS[name]
        choice = ("autoresume=true", f"run_name={name}-resumed", *overrides)
        run_once(config_of(path, "pp", *objective(learned, folder, "teacher"), *choice), OPTIMIZERS[learned], RAGGED)
    said = {}
    for teacher in ("nowhere", "other", "short"):  # of another vocabulary, of a smaller context
        choice = (f"run_name={teacher}", f"{_KEY}.teacher.path={teacher}")
        try:
            run_once(config_of(path, "pp", *choice))
        except UserError as error:
            said[teacher] = str(error)
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    os._exit(0)  # not by way of the destructors, where gloo's threads may wait for the interpreter
