"""Runs of ``test_tensor_parallel_mixing.py`` on one rank of several; ranks are processes of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from tools.bench._layouts import config_of, run_once

RUNS = {
    # A larger step than by default: here the noise of differences is to be small, not their bias, which all share.
    "forward": ["strategy=grape", "influence.step_size=0.01"],
    "microbatch": ["strategy=grape", "influence.scorer=microbatch"],
    "gradients": ["strategy=doge"],
    "probes": ["strategy=aioli"],
    "reference": ["strategy=doremi"],
}
"""What is measured, and a strategy that needs it, as overrides."""
LAYOUTS = {"tp": (2, tuple(RUNS)), "fsdp2_tp": (4, ("forward",))}
"""Processes of a layout, and the runs under it."""


def measure(path: Path, layout: str, names: Iterable[str], reference: Path) -> None:
    """Runs, in this process and its group."""
    for name in names:
        chosen = RUNS[name]
        overrides = [*chosen, f"doremi.reference={reference}"] if name == "reference" else chosen
        settings = [f"algorithms.online_mixing.{each}" for each in overrides]
        run_once(config_of(path, layout, f"run_name={layout}-{name}", *settings))


def work(rank: int, ranks: int, path: Path, layout: str, reference: Path) -> None:
    """The same on one rank."""
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} | {"NODE_RANK": "0"}
    torch.set_num_threads(1)
    store = f"file://{path.parent}/store-{layout}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    measure(path, layout, LAYOUTS[layout][1], reference)
    dist.barrier()
    os._exit(0)  # Not by way of the destructors: gloo's threads may wait there for the interpreter's lock.
