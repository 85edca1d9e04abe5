"""What the layouts of `yamls/distributed` give: the same numbers, checkpoints that load anywhere, and their cost.

    python tools/bench/layouts.py [--data DATA.yaml] [--parity] [--checkpoints] [--kills [N]] [--cost]

Without a choice, all four. Data: rows of 32 tokens in sources code, docs and topics; without --data a sample is made of
the interpreter's own library. Processes talk over gloo, four of them on whatever cores there are.

--parity       losses of 20 steps and final weights against one process, for each layout, optimizer and objective
--checkpoints  saved under each layout, resumed under each other: losses of the next steps against the undisturbed run
--kills        kill -9 of all ranks while they save, N times; the run goes on from the latest checkpoint each time
--cost         memory and CPU time of a step as multiples of DDP's; what a save costs
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.bench import _layouts
from tools.bench._layouts import (
    LAYOUTS,
    OBJECTIVES,
    OPTIMIZERS,
    VARIANTS,
    Outcome,
    config_of,
    difference,
    resume_from,
    spawn,
)
from tools.bench._layouts_cost import report_cost
from tools.bench._layouts_kills import report_kills
from tools.bench._shards import library_texts, write_sources

SAVED_AT, STEPS_AFTER = 6, 2
SOURCES = {
    1: [("single", 1), *((layout, 2) for layout in LAYOUTS[2]), *((layout, 4) for layout in LAYOUTS[4])],
    2: [("single", 1), *((layout, 2) for layout in LAYOUTS[2]), ("fsdp2", 4), ("fsdp2_tp", 4)],
    4: [("single", 1), ("fsdp2", 2), ("tp", 2), ("ddp", 4), ("hsdp", 4), ("fsdp2_tp", 4)],
}
"""Whose checkpoints are resumed on a number of processes; one process goes on from all of them."""
FORMATS = ("full", "sharded")


def tiny_sample(folder: Path) -> Path:
    """A data yaml over some hundred rows of 32 tokens in three sources."""
    texts = library_texts(240_000)
    sources = {name: texts[number::3] for number, name in enumerate(("code", "docs", "topics"))}
    return write_sources(folder, sources, "code", vocab_size=512, seq_len=32)


def name_of(layout: str, world: int) -> str:
    """A layout on a number of processes, in a word."""
    return layout if world == 1 else f"{layout}x{world}"


def every_layout() -> list[tuple[str, int]]:
    """Layouts and numbers of processes, fewest first."""
    return [(layout, world) for world, names in LAYOUTS.items() for layout in names]


# ---- parity ------------------------------------------------------------------------------------------------
def train_all(path: Path, layouts: Sequence[str], optimizers: Sequence[str], steps: int, results: Path) -> None:
    """Run every layout with every optimizer and objective on this group; rank 0 writes ``results/<name>.pt``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for layout in layouts:
        base, options = VARIANTS.get(layout, (layout, []))
        for objective, overrides in OBJECTIVES.items():
            for optimizer in optimizers:
                name = f"{name_of(layout, world)}-{objective}-{optimizer}".replace(", ", "-").replace(" ", "-")
                choice = [f"run_name={name}", f"max_duration={steps}ba", *options, *overrides]
                outcome = _layouts.run_once(config_of(path, base, *choice), optimizer)
                if rank == 0:
                    torch.save(vars(outcome), results / f"{name}.pt")


def outcome_of(results: Path, name: str) -> Outcome:
    """What :func:`train_all` has written."""
    return Outcome(**torch.load(results / f"{name.replace(', ', '-').replace(' ', '-')}.pt", weights_only=True))


def report_parity(path: Path, folder: Path) -> None:
    """Print the table of differences from one process."""
    spawn(train_all, 1, path, ["single"], list(OPTIMIZERS), 20, folder, method="fork")
    print("\n| layout | objective | optimizer | losses of 20 steps | final weights |")
    print("| --- | --- | --- | --- | --- |")
    rows = [(*each, list(OPTIMIZERS)) for each in every_layout()[1:]] + [(name, 2, ["adamw"]) for name in VARIANTS]
    for layout, world, optimizers in rows:
        spawn(train_all, world, path, [layout], optimizers, 20, folder, method="fork")
        for objective in OBJECTIVES:
            for optimizer in optimizers:
                name = f"{name_of(layout, world)}-{objective}-{optimizer}"
                alone = outcome_of(folder, f"single-{objective}-{optimizer}")
                losses, weights = difference(outcome_of(folder, name), alone)
                row = (name_of(layout, world), objective, optimizer, f"{losses:.0e}", f"{weights:.0e}")
                print(f"| {' | '.join(row)} |", flush=True)


# ---- checkpoints -------------------------------------------------------------------------------------------
def saved_checkpoint(path: Path, layout: str, world: int, kind: str) -> Path:
    """Where :func:`save_all` leaves the checkpoint after ``SAVED_AT`` batches."""
    suffix = "-rank0.pt" if kind == "full" else ""
    run = path.parent / "runs" / f"saved-{name_of(layout, world)}-{kind}"
    return run / "checkpoints" / f"ep0-ba{SAVED_AT}{suffix}"


def format_of(layout: str, turn: int) -> str:
    """The format to take in this turn; FSDP1 on a CPU has shards only."""
    return "sharded" if layout == "fsdp" else FORMATS[turn % 2]


def save_all(path: Path, layouts: Sequence[str]) -> None:
    """Train ``SAVED_AT`` batches under every layout, and save in either format."""
    world = int(os.environ["WORLD_SIZE"])
    for layout in layouts:
        for kind in sorted({format_of(layout, turn) for turn in range(2)}):
            run = f"run_name=saved-{name_of(layout, world)}-{kind}"
            choice = [run, f"parallelism.state_dict_type={kind}", f"max_duration={SAVED_AT}ba"]
            _layouts.run_once(config_of(path, layout, *choice))


def resume_all(path: Path, layout: str, checkpoints: Sequence[tuple[int, str]], results: Path) -> None:
    """Go on from checkpoints under a layout, ``(n, checkpoint)``; rank 0 writes ``results/resumed-<world>-<n>.pt``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, checkpoint in checkpoints:
        run = f"resumed-{world}-{number}"
        if rank == 0:
            resume_from(path, run, Path(checkpoint))
        torch.distributed.barrier()
        steps = f"max_duration={SAVED_AT + STEPS_AFTER}ba"
        outcome = _layouts.run_once(config_of(path, layout, f"run_name={run}", "autoresume=true", steps))
        if rank == 0:
            torch.save(vars(outcome), results / f"{run}.pt")


def report_checkpoints(path: Path, folder: Path) -> None:
    """Print the largest difference of the losses after resuming, from each layout in each."""
    spawn(train_all, 1, path, ["single"], ["adamw"], SAVED_AT + STEPS_AFTER, folder, method="fork")
    undisturbed = outcome_of(folder, "single-cross_entropy-adamw")
    after = undisturbed.losses[SAVED_AT:]
    for world, layouts in LAYOUTS.items():
        spawn(save_all, world, path, layouts, method="fork")
    for world, layouts in LAYOUTS.items():
        sources = SOURCES[world]
        columns = [name_of(*source) for source in sources]
        print(f"\n| resumed as \\ saved as | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}", flush=True)
        for row, layout in enumerate(layouts):
            # In turns, so that every layout is seen with both formats.
            checkpoints = [
                str(saved_checkpoint(path, *source, format_of(source[0], row + column)))
                for column, source in enumerate(sources)
            ]
            numbers = [row * len(sources) + column for column in range(len(sources))]
            spawn(resume_all, world, path, layout, list(zip(numbers, checkpoints, strict=True)), folder, method="fork")
            found = [outcome_of(folder, f"resumed-{world}-{number}") for number in numbers]
            errors = [max(abs(a - b) / b for a, b in zip(one.losses, after, strict=True)) for one in found]
            print(f"| {name_of(layout, world)} | {' | '.join(f'{error:.0e}' for error in errors)} |", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--kills", nargs="?", type=int, const=20)
    parser.add_argument("--cost", action="store_true")
    chosen = parser.parse_args(arguments)
    everything = not (chosen.parity or chosen.checkpoints or chosen.kills or chosen.cost)
    reports: dict[str, tuple[bool, Any]] = {
        "parity": (chosen.parity, report_parity),
        "checkpoints": (chosen.checkpoints, report_checkpoints),
        "kills": (chosen.kills is not None, lambda path, folder: report_kills(path, folder, chosen.kills or 20)),
        "cost": (chosen.cost, report_cost),
    }
    with tempfile.TemporaryDirectory() as scratch:
        data = chosen.data or tiny_sample(Path(scratch) / "sample")
        for name, (wanted, report) in reports.items():
            if wanted or everything:
                start, folder = time.monotonic(), Path(scratch) / name
                folder.mkdir()
                report(_layouts.tiny_yaml(folder / "run.yaml", data), folder)
                print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    import cheapertraining.training.run  # noqa: F401  # before anything is forked, so that only one process imports it

    main(sys.argv[1:])
