"""One run under one layout, and what to compare of it; ranks are processes of one group that go through many runs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cheapertraining.config import OptimizerConfig, RunConfig, load_run_config
from cheapertraining.data.collate import IGNORED
from cheapertraining.distributed.pipeline_state import gather_stages
from cheapertraining.models.stages import PipelinedLM

__all__ = [
    "ENGINES",
    "FOUR_LAYERS",
    "OPTIMIZERS",
    "PIPELINES",
    "RAGGED",
    "SOURCES",
    "VOCABULARY",
    "Outcome",
    "RaggedMasks",
    "config_of",
    "difference",
    "file_name",
    "free_port",
    "losses_of",
    "metrics_of",
    "name_of",
    "outcome_of",
    "quiet",
    "resume_from",
    "run_once",
    "spawn",
    "start_rank",
    "tiny_yaml",
]

LATEST = "latest-rank0.pt"

SOURCES = ("code", "docs", "topics")
VOCABULARY = 512

ENGINES: dict[int, list[str]] = {
    1: ["single"],
    2: ["ddp", "fsdp", "fsdp2", "hsdp", "tp"],
    4: ["ddp", "fsdp", "fsdp2", "hsdp", "tp", "fsdp2_tp"],
}
"""Names in ``yamls/distributed`` by the number of processes that they are tried on, but for the pipeline."""

PIPELINES: dict[int, dict[str, list[str]]] = {
    1: {},
    2: {
        "gpipe": ["parallelism.pp.schedule=gpipe"],
        "1f1b": [],
        "interleaved": ["parallelism.pp.schedule=interleaved"],
    },
    4: {"1f1b": []},
}
"""Schedules by the number of processes, as overrides."""

FOUR_LAYERS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
    "max_position_embeddings": 32, "init_std": 0.1,
}  # fmt: skip
"""A model that four stages, and four ranks of tensor parallelism, can share."""


class RaggedMasks(Algorithm):
    """Takes labels away, from 0 to all but one of a row, by sample: what a loss mask of conversations does."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_DATALOADER

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        batch = state.batch
        kept = (batch["sample_id"] * 7 + batch["source"] * 3) % 31
        column = torch.arange(batch["labels"].shape[1], device=kept.device)
        batch["labels"] = batch["labels"].masked_fill(column[None, :] > kept[:, None] + 1, IGNORED)


RAGGED = (RaggedMasks,)


def _sgd(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100 * config.lr)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, nn.Module], torch.optim.Optimizer] | None] = {
    "adamw": None,
    "sgd": _sgd,
}
"""By name; None is what the config builds."""


@dataclass
class Outcome:
    """What a run leaves.

    Attributes:
        losses: of each step, over the global batch, as rank 0 logged them.
        weights: whole, by name; on rank 0.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]


def tiny_yaml(path: Path, data: Path, **changes: Any) -> Path:
    """A run in which nothing is even: two layers, packed rows, accumulation, clipping, a mixture that changes twice.

    Args:
        path: of the yaml to write; runs are saved in ``runs`` beside it.
        data: data yaml with sources ``code``, ``docs`` and ``topics`` in rows of 32 tokens.
        changes: keys at the top, over or beside those here.
    """
    points = [
        {"batch": 0, "weights": {"code": 1, "docs": 1, "topics": 1}},
        {"batch": 2, "weights": {"code": 6, "docs": 1, "topics": 1}},
        {"batch": 12, "weights": {"code": 1, "docs": 1, "topics": 6}},
    ]
    run: dict[str, Any] = {
        "compose": {"data": str(data)},
        "seed": 3,
        "device": "cpu",
        "max_duration": "20ba",
        "save_folder": str(path.parent / "runs"),
        "save_interval": "1000ba",
        "model": {
            "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
            "max_position_embeddings": 32, "init_std": 0.1,
        },
        "train_loader": {"global_batch_size": 16, "device_microbatch_size": 2, "lag": 2},
        "eval_loader": {"batch_size": 4, "interval": "1000ba", "subset_num_batches": 1, "first": False},
        "optimizer": {"lr": 3.0e-3, "eps": 1.0e-6},
        "scheduler": {"name": "constant"},  # so that a run that is resumed for a few steps takes the same
        "algorithms": {
            "gradient_clipping": {"threshold": 1.0},
            "online_mixing": {
                "strategy": "schedule", "interval": "2ba", "warmup": "0ba", "constraints": {"kl_step": None},
                "schedule": {"points": points},
            },
        },
        "loggers": {"jsonl": {}},
    }  # fmt: skip
    path.write_text(json.dumps(run | changes), encoding="utf-8")  # every JSON is yaml
    return path


def run_once(
    config: RunConfig, optimizer: str = "adamw", algorithms: Sequence[Callable[[], Algorithm]] = ()
) -> Outcome:
    """Train in this process and its group, through the front door, with further algorithms before the config's."""
    from cheapertraining.training import run as training

    own, build_algorithms = OPTIMIZERS[optimizer], training.build_algorithms

    def with_more(*arguments: Any) -> list[Algorithm]:
        return [*(make() for make in algorithms), *build_algorithms(*arguments)]

    replaced = contextlib.nullcontext() if own is None else patch.object(training, "build_optimizer", own)
    with replaced, patch.object(training, "build_algorithms", with_more), quiet():
        trainer = training.train(config)
    model = trainer.state.model
    if isinstance(model, PipelinedLM):
        weights, _ = gather_stages(model, trainer.state.optimizers[0], model.duplicates)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
    folder = Path(config.save_folder) / str(config.run_name)
    return Outcome(losses_of(folder), {name: weight.clone() for name, weight in weights.items()})


def outcome_of(file: Path) -> Outcome:
    """What a rank has written of a run."""
    return Outcome(**torch.load(file, weights_only=True))


def name_of(layout: str, world: int) -> str:
    """A layout on a number of processes, in a word."""
    return layout if world == 1 else f"{layout} x{world}"


def file_name(words: str) -> str:
    """Words as a part of the name of a run or a file."""
    return words.replace(", ", "-").replace(" ", "-")


def losses_of(folder: Path) -> list[float]:
    """The training losses that a run has logged, by step."""
    return metrics_of(folder, "loss/train/total")["loss/train/total"]


def metrics_of(folder: Path, *beginnings: str) -> dict[str, list[float]]:
    """The numbers that a run has logged under names that begin so (without any: all), in their order."""
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if not beginnings or name.startswith(beginnings):
                found.setdefault(name, []).append(value)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what Composer prints to nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def spawn(work: Callable[..., None], world: int, *arguments: Any, join: bool = True) -> mp.ProcessContext | None:
    """Call ``work(*arguments)`` on ``world`` processes of one gloo group, forked from this one, and wait for them.

    Args:
        work: a function of a module.
        world: number of processes.
        arguments: for ``work``.
        join: False returns the processes at once.
    """
    args = (world, free_port(), work, arguments)
    return mp.start_processes(start_rank, args=args, nprocs=world, start_method="fork", join=join)  # type: ignore[no-untyped-call]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(rank: int, world: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Call ``work(*arguments)`` on a rank of a gloo group that meets at a port, in a process of its own."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    from composer.utils import dist

    dist.initialize_dist("cpu")
    work(*arguments)
    dist.barrier()
    sys.stdout.flush()
    # Not by way of the destructors: gloo's threads may wait there for the interpreter's lock.
    os._exit(0)


def config_of(path: Path, layout: str, *overrides: str) -> RunConfig:
    """The config of :func:`tiny_yaml` under a layout."""
    return load_run_config(path, [f"compose.distributed={layout}", *overrides])


def resume_from(path: Path, run_name: str, checkpoint: Path) -> None:
    """Make a run whose latest checkpoint is that of another run."""
    folder = path.parent / "runs" / run_name / "checkpoints"
    folder.mkdir(parents=True)
    (folder / checkpoint.name).symlink_to(checkpoint.resolve())
    (folder / LATEST).symlink_to(checkpoint.name)


def difference(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """Largest relative differences of the losses, and of the weights by parameter (norm of the difference by norm)."""
    assert len(found.losses) == len(expected.losses)
    assert found.weights.keys() == expected.weights.keys()
    losses = max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True))
    weights = max(float((found.weights[name] - w).norm() / w.norm()) for name, w in expected.weights.items())
    return losses, weights
