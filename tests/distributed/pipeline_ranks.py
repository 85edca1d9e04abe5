"""What ``test_pipeline.py`` runs on one rank of two; all in one process group."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from tests.distributed.ranks import checkpoint_of
from tools.bench._layouts import config_of, resume_from, run_once

STEPS, SAVED_AT, RESUMED_TO = 20, 10, 13

UNTIED = ("model.tie_embeddings=false",)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpipe": ("adamw", ("parallelism.pp.schedule=gpipe", *UNTIED)),
    "1f1b": ("adamw", ()),
    "interleaved": ("sgd", ("parallelism.pp.schedule=interleaved", "parallelism.activation_checkpointing=true")),
}
"""Optimizer and overrides, by name; embeddings are tied but where it says otherwise."""


def twin(run: str) -> str:
    """The run of one process that a run of the pipeline is to be like."""
    optimizer, overrides = RUNS[run]
    return f"alone-{optimizer}{'-untied' if UNTIED[0] in overrides else ''}"


def work(path: Path) -> None:
    """Everything, on this rank."""
    runs, rank = path.parent / "runs", dist.get_rank()
    for name, (optimizer, overrides) in RUNS.items():
        steps = (f"run_name={name}", f"max_duration={STEPS}ba", f"save_interval={SAVED_AT}ba")
        run_once(config_of(path, "pp", *steps, *overrides), optimizer)
    sources = {"full": checkpoint_of(runs, "alone-adamw", SAVED_AT), "shards": checkpoint_of(runs, "shards", SAVED_AT)}
    for kind, checkpoint in sources.items():
        if rank == 0:
            resume_from(path, f"pp-from-{kind}", checkpoint)
        dist.barrier()
        again = ("autoresume=true", f"run_name=pp-from-{kind}", f"max_duration={RESUMED_TO}ba")
        run_once(config_of(path, "pp", *again))
