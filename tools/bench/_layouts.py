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
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cheapertraining.config import OptimizerConfig, RunConfig, load_run_config

__all__ = [
    "LAYOUTS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "Outcome",
    "layout_overrides",
    "losses_of",
    "run_once",
    "spawn",
    "tiny_yaml",
]

LAYOUTS: dict[str, dict[int, list[str]]] = {
    "ddp": {2: [], 4: []},
    "fsdp": {2: [], 4: []},
    "fsdp2": {2: [], 4: []},
    "hsdp": {2: [], 4: []},
    "tp": {2: [], 4: []},
    "fsdp2_tp": {4: []},
}
"""By name in ``yamls/distributed``: numbers of processes that it is tried on."""

OBJECTIVES: dict[str, list[str]] = {"cross_entropy": []}
"""What a run trains for, as overrides; one more objective is one more entry."""


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
        {"batch": 8, "weights": {"code": 6, "docs": 1, "topics": 1}},
        {"batch": 16, "weights": {"code": 1, "docs": 1, "topics": 6}},
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
        "scheduler": {"name": "cosine", "warmup": "0ba"},
        "algorithms": {
            "gradient_clipping": {"threshold": 1.0},
            "online_mixing": {
                "strategy": "schedule", "interval": "4ba", "warmup": "0ba", "constraints": {"kl_step": None},
                "schedule": {"points": points},
            },
        },
        "loggers": {"jsonl": {}},
    }  # fmt: skip
    path.write_text(json.dumps(run | changes), encoding="utf-8")  # every JSON is yaml
    return path


def layout_overrides(name: str) -> list[str]:
    """What chooses a layout."""
    return [f"compose.distributed={name}"]


def run_once(config: RunConfig, optimizer: str = "adamw") -> Outcome:
    """Train in this process and its group, through the front door."""
    from cheapertraining.training import run as training

    own = OPTIMIZERS[optimizer]
    replaced = contextlib.nullcontext() if own is None else patch.object(training, "build_optimizer", own)
    with replaced, quiet():
        trainer = training.train(config)
    weights = get_model_state_dict(
        trainer.state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    folder = Path(config.save_folder) / str(config.run_name)
    return Outcome(losses_of(folder), {name: weight.clone() for name, weight in weights.items()})


def losses_of(folder: Path) -> list[float]:
    """The training losses that a run has logged, by step."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss/train/total"] for entry in lines if "loss/train/total" in entry]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what Composer prints to nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def spawn(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call ``work(*arguments)`` on ``world`` processes of one gloo group, and wait for them."""
    mp.spawn(_start, args=(world, free_port(), work, arguments), nprocs=world)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(rank: int, world: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
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


def load(path: Path, layout: str, *overrides: str) -> RunConfig:
    """The config of ``tiny_yaml`` under a layout."""
    return load_run_config(path, [*layout_overrides(layout), *overrides])
