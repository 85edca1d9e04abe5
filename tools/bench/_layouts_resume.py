"""Checkpoints saved under each layout and resumed under each other, against the run that was left in peace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.bench import _layouts
from tools.bench._layouts import ENGINES, RAGGED, config_of, file_name, name_of, outcome_of, resume_from, run_once

__all__ = ["report_checkpoints"]

SAVED_AT, STEPS_AFTER = 6, 2
FORMATS = ("full", "sharded")
LAYOUTS = {world: [*layouts, *(["pp"] if world > 1 else [])] for world, layouts in ENGINES.items()}
EVERY = [(layout, world) for world, layouts in LAYOUTS.items() for layout in layouts]


def formats_of(layout: str) -> tuple[str, ...]:
    """The formats that a layout writes on a CPU: FSDP1 shards alone, a pipeline one file."""
    return {"fsdp": ("sharded",), "pp": ("full",)}.get(layout, FORMATS)


def saved_checkpoint(path: Path, layout: str, world: int, kind: str) -> Path:
    """Where :func:`save_all` leaves the checkpoint after ``SAVED_AT`` batches."""
    suffix = "-rank0.pt" if kind == "full" else ""
    return path.parent / "runs" / saved_run(layout, world, kind) / "checkpoints" / f"ep0-ba{SAVED_AT}{suffix}"


def saved_run(layout: str, world: int, kind: str) -> str:
    """The name of the run that saves."""
    return file_name(f"saved-{name_of(layout, world)}-{kind}")


def save_all(path: Path, layouts: Sequence[str]) -> None:
    """Train ``SAVED_AT`` batches under every layout, and save in each of its formats."""
    world = int(os.environ["WORLD_SIZE"])
    for layout in layouts:
        for kind in formats_of(layout):
            choice = [
                f"run_name={saved_run(layout, world, kind)}",
                f"parallelism.state_dict_type={kind}",
                f"max_duration={SAVED_AT}ba",
            ]
            run_once(config_of(path, layout, *choice), algorithms=RAGGED)


def resume_all(path: Path, layouts: Sequence[str], results: Path) -> None:
    """Go on from every checkpoint under every layout; rank 0 writes ``results/<layout>-from-<layout>.pt``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for row, layout in enumerate(layouts):
        for column, source in enumerate(EVERY):
            # In turns, so that every layout reads both formats.
            kinds = formats_of(source[0])
            checkpoint = saved_checkpoint(path, *source, kinds[(row + column) % len(kinds)])
            run = file_name(f"{name_of(layout, world)}-from-{name_of(*source)}")
            if rank == 0:
                resume_from(path, run, checkpoint)
            torch.distributed.barrier()
            steps = ["autoresume=true", f"max_duration={SAVED_AT + STEPS_AFTER}ba"]
            outcome = run_once(config_of(path, layout, f"run_name={run}", *steps), algorithms=RAGGED)
            if rank == 0:
                torch.save(vars(outcome), results / f"{run}.pt")


def undisturbed(path: Path, results: Path) -> None:
    """The run that is never interrupted."""
    steps = f"max_duration={SAVED_AT + STEPS_AFTER}ba"
    torch.save(
        vars(run_once(config_of(path, "single", "run_name=peace", steps), algorithms=RAGGED)), results / "peace.pt"
    )


def report_checkpoints(path: Path, folder: Path) -> None:
    """Print the largest relative difference of the losses after resuming, from each layout in each."""
    _layouts.spawn(undisturbed, 1, path, folder)
    after = outcome_of(folder / "peace.pt").losses[SAVED_AT:]
    for world, layouts in LAYOUTS.items():
        _layouts.spawn(save_all, world, path, layouts)
    columns = [name_of(*source) for source in EVERY]
    print(f"\n| resumed as \\ saved as | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}", flush=True)
    for world, layouts in LAYOUTS.items():
        _layouts.spawn(resume_all, world, path, layouts, folder)
        for layout in layouts:
            row = name_of(layout, world)
            found = [outcome_of(folder / file_name(f"{row}-from-{column}.pt")).losses for column in columns]
            errors = [max(abs(a - b) / b for a, b in zip(losses, after, strict=True)) for losses in found]
            print(f"| {row} | {' | '.join(f'{error:.0e}' for error in errors)} |", flush=True)
