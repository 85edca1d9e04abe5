"""Kill all ranks of a run while they save, again and again, under changing layouts; what is left goes on each time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch.multiprocessing as mp

from cheapertraining.distributed.checkpoints import checkpoint_kind
from cheapertraining.observe.checkpoints import latest_checkpoint
from tools.bench import _layouts
from tools.bench._layouts import config_of, losses_of

__all__ = ["report_kills"]

WAYS = {
    "fsdp2, in the background": ("fsdp2", ["parallelism.state_dict_type=sharded", "parallelism.async_save=true"]),
    "ddp, one file": ("ddp", ["parallelism.state_dict_type=full"]),
    "tp, shards": ("tp", ["parallelism.state_dict_type=sharded"]),
}
WORLD, SAVES_BETWEEN, PATIENCE = 2, 3, 120.0


def train_on(path: Path, layout: str, overrides: list[str]) -> None:
    """Go on with the run, saving after every batch; on a rank."""
    _layouts.run_once(config_of(path, layout, "autoresume=true", "save_interval=1ba", *overrides))


def report_kills(path: Path, folder: Path, kills: int) -> None:
    """Print what each kill met, and how far the run's losses are from those of the same run left in peace."""
    rng = np.random.default_rng(0)
    steps = f"max_duration={(SAVES_BETWEEN + 1) * kills}ba"
    _layouts.spawn(train_on, 1, path, "single", ["run_name=peace", steps, "save_interval=1000ba"])
    run = path.parent / "runs" / "killed"
    print("\n| kill | way | latest checkpoint | left half-written |\n| --- | --- | --- | --- |")
    for number in range(kills):
        way = list(WAYS)[number % len(WAYS)]
        layout, overrides = WAYS[way]
        choice = ["run_name=killed", steps, *overrides]
        ranks = _layouts.spawn(train_on, WORLD, path, layout, choice, join=False)
        _kill_in_a_save(
            ranks, run / "checkpoints", int(rng.integers(1, SAVES_BETWEEN + 1)), float(rng.uniform(0, 0.02))
        )
        latest = latest_checkpoint(run / "checkpoints")
        assert latest is not None
        checkpoint_kind(latest)  # raises where something is missing
        left = [each.name for each in (run / "checkpoints").glob(".unfinished-*")]
        print(f"| {number} | {way} | {latest.name} | {', '.join(left) or '-'} |", flush=True)
    _layouts.spawn(train_on, WORLD, path, "fsdp2", ["run_name=killed", steps])
    peace, killed = losses_of(path.parent / "runs" / "peace"), losses_of(run)
    assert len(peace) == len(killed)
    error = max(abs(a - b) / b for a, b in zip(killed, peace, strict=True))
    print(f"\n{kills} kills, {len(killed)} steps, each logged once; largest relative difference of a loss {error:.0e}")


def _kill_in_a_save(ranks: mp.ProcessContext, checkpoints: Path, saves: int, delay: float) -> None:
    """Kill all ranks ``delay`` seconds after their next save but ``saves`` has begun."""
    before = latest_checkpoint(checkpoints) if checkpoints.is_dir() else None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        now = latest_checkpoint(checkpoints) if checkpoints.is_dir() else None
        if now != before:
            before, saves = now, saves - 1
        if saves <= 0 and any(checkpoints.glob(".unfinished-ep*")):
            break
        time.sleep(0.001)
    else:
        raise TimeoutError(f"no save within {PATIENCE:.0f} s")
    time.sleep(delay)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in ranks.processes:
        process.join()
