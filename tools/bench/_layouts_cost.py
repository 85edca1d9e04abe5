"""Memory and time of a step under each layout beside DDP's, and what a save costs."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist
from composer import Trainer

from cheapertraining.observe.checkpoints import AtomicCheckpointSaver, latest_checkpoint
from tools.bench import _layouts
from tools.bench._layouts import config_of
from tools.bench._trainer import StepClock, build_trainer, close_quietly, fit_quietly

__all__ = ["report_cost"]

WORLD, STEPS, SAVES = 2, 5, 3
# 17M parameters: large beside what a process is without a model.
MODEL = [
    f"model.{key}={value}"
    for key, value in {
        "hidden_size": 384, "intermediate_size": 1024, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8,
        "vocab_size": 8192, "tie_embeddings": "true",
    }.items()
]  # fmt: skip
LAYOUTS = {
    "ddp": ("ddp", []),
    "ddp, activations again": ("ddp", ["parallelism.activation_checkpointing=true"]),
    "fsdp": ("fsdp", []),
    "fsdp2": ("fsdp2", []),
    "fsdp2, gathered once": ("fsdp2", ["parallelism.fsdp2.reshard_after_forward=false"]),
    "hsdp": ("hsdp", []),
    "tp": ("tp", []),
    "pp 1f1b": ("pp", []),
}
SAVERS = {
    "one file": ["parallelism.state_dict_type=full"],
    "shards": ["parallelism.state_dict_type=sharded"],
    "shards, in the background": ["parallelism.state_dict_type=sharded", "parallelism.async_save=true"],
}


def report_cost(path: Path, folder: Path) -> None:
    """Print both tables. Each layout has processes of its own, since memory that was freed may stay with a process."""
    layouts, savers = {}, {}
    for name, (layout, overrides) in LAYOUTS.items():
        _layouts.spawn(measure_layout, WORLD, path, layout, overrides, folder)
        layouts[name] = json.loads((folder / "cost.json").read_text())
    for name, overrides in SAVERS.items():
        _layouts.spawn(measure_saver, WORLD, path, overrides, folder)
        savers[name] = json.loads((folder / "cost.json").read_text())
    base = layouts["ddp"]
    print("\n| layout | peak MiB of a rank | x DDP | CPU-seconds of a step, all ranks | x DDP |")
    print("| --- | --- | --- | --- | --- |")
    for name, (peak, seconds) in layouts.items():
        row = (f"{peak:.0f}", f"{peak / base[0]:.2f}", f"{seconds:.2f}", f"{seconds / base[1]:.2f}")
        print(f"| {name} | {' | '.join(row)} |")
    print("\n| fsdp2 saves | training waits, s | until it is on disk, s | MiB on disk |\n| --- | --- | --- | --- |")
    for name, (stall, whole, size) in savers.items():
        print(f"| {name} | {stall:.3f} | {whole:.3f} | {size:.1f} |")


def measure_layout(path: Path, layout: str, overrides: list[str], folder: Path) -> None:
    """Measure a layout on this group; rank 0 writes ``cost.json``: peak memory in MiB, CPU-seconds."""
    peaks, seconds = _gathered(_step_cost(path, layout, overrides))
    _write(folder, [max(peaks), sum(seconds)])


def measure_saver(path: Path, overrides: list[str], folder: Path) -> None:
    """The same of a way to save: seconds that training waits, seconds until it is on disk, MiB."""
    stalls, wholes, sizes = _gathered(_save_cost(path, overrides))
    _write(folder, [max(stalls), max(wholes), sizes[0]])


def _write(folder: Path, found: list[float]) -> None:
    if dist.get_rank() == 0:
        (folder / "cost.json").write_text(json.dumps(found))


def _gathered(mine: tuple[float, ...]) -> list[tuple[float, ...]]:
    told: list[tuple[float, ...]] = [() for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, mine)
    return list(zip(*told, strict=True))


def _trainer(path: Path, layout: str, *overrides: str) -> tuple[Trainer, StepClock]:
    clock = StepClock()
    run = ["run_name=cost", "save_overwrite=true", "max_duration=1000ba", "train_loader.device_microbatch_size=4"]
    with _layouts.quiet():
        return build_trainer(config_of(path, layout, *MODEL, *run, *overrides), clock), clock


def _step_cost(path: Path, layout: str, overrides: list[str]) -> tuple[float, float]:
    """Peak memory above what the process was before, MiB, and least CPU-seconds of a step of this rank."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    trainer, clock = _trainer(path, layout, *overrides)
    fit_quietly(trainer, STEPS)
    least, peak = min(clock.steps()), _status("VmHWM")
    close_quietly(trainer)
    return (peak - before) / 1024, least


def _save_cost(path: Path, overrides: list[str]) -> tuple[float, float, float]:
    """Seconds that a save holds up training, seconds until it is on disk (least of some), and MiB on disk."""
    trainer, _ = _trainer(path, "fsdp2", *overrides)
    fit_quietly(trainer, 1)
    saver = next(each for each in trainer.state.callbacks if isinstance(each, AtomicCheckpointSaver))
    stalls, wholes = [], []
    for _ in range(SAVES):
        dist.barrier()
        start = time.perf_counter()
        saver._save_checkpoint(trainer.state, trainer.logger)
        stalls.append(time.perf_counter() - start)
        saver._settle()
        wholes.append(time.perf_counter() - start)
    latest = latest_checkpoint(Path(saver.folder))
    assert latest is not None
    files = [latest] if latest.is_file() else list(latest.iterdir())
    size = sum(file.stat().st_size for file in files) / 2**20
    dist.barrier()
    close_quietly(trainer)
    if dist.get_rank() == 0:
        shutil.rmtree(saver.folder)
    return min(stalls), min(wholes), size


def _status(key: str) -> int:
    """A size of this process from /proc, KiB."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
