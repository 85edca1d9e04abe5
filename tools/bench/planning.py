"""How far the formulas of tools/estimate.py are from what small models take, and from published speeds.

    python tools/bench/planning.py [--memory] [--speed] [CASE ...]

--memory  steps of a small model under each layout, in processes over gloo: predicted over measured bytes
--speed   predicted over published tokens per second

Without a choice, both. Bytes are those that torch's CPU allocator had given out; cases are the first column's names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from tools.bench import _layouts
from tools.bench._planning_published import report_speed
from tools.bench._planning_steps import config_of_case, measure, predicted, predicted_kept

HALF, AGAIN = "precision=amp_bf16", "parallelism.activation_checkpointing=true"
TEACHER = "algorithms.distillation.teacher.path=student"
CASES: dict[str, tuple[int, str, list[str]]] = {
    "single": (1, "single", []),
    "single, half": (1, "single", [HALF]),
    "single, again": (1, "single", [AGAIN]),
    "single, live teacher": (1, "single", [TEACHER]),
    "ddp": (2, "ddp", []),
    "ddp, half": (2, "ddp", [HALF]),
    "fsdp2": (2, "fsdp2", []),
    "fsdp2, half": (2, "fsdp2", [HALF]),
    "fsdp2, again": (2, "fsdp2", [AGAIN]),
    "fsdp2, gathered once": (2, "fsdp2", ["parallelism.fsdp2.reshard_after_forward=false"]),
    "fsdp2, live teacher": (2, "fsdp2", [TEACHER]),
    "tp": (2, "tp", []),
    "tp, half": (2, "tp", [HALF]),
    "tp, again": (2, "tp", [AGAIN]),
    "fsdp2_tp": (4, "fsdp2_tp", []),
    "1f1b": (2, "pp", []),
    "1f1b, 4 stages": (4, "pp", []),
    "gpipe": (2, "pp", ["parallelism.pp.schedule=gpipe"]),
    "interleaved": (2, "pp", ["parallelism.pp.schedule=interleaved"]),
}
"""Processes, layout and overrides. ``half`` is bfloat16 autocast, ``again`` checkpointed activations."""


def report_memory(names: Sequence[str], folder: Path) -> None:
    """Measure cases one after the other and print a row of each, of the ranks that are furthest off."""
    print("| layout | ranks | parameters, gradients, moments | kept for backward | peak, MB | predicted / peak |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in names or CASES:
        ranks, layout, overrides = CASES[name]
        _layouts.spawn(_work, ranks, layout, overrides, folder)
        config = config_of_case(layout, ranks, *overrides)
        found: list[dict[str, float]] = json.loads((folder / "found.json").read_text())
        pairs = list(zip(predicted(config, ranks), found, strict=True))
        state = [getattr(guess, part) / each[part] for guess, each in pairs for part in ("parameters", "gradients")]
        state += [guess.optimizer / each["optimizer"] for guess, each in pairs]
        kept = _range([predicted_kept(config, ranks) / each["kept"] for each in found if "kept" in each])
        peaks = _range([each["peak"] / 1e6 for each in found], 1)
        row = (name, str(ranks), _range(state), kept, peaks, _range([g.total / each["peak"] for g, each in pairs]))
        print(f"| {' | '.join(row)} |", flush=True)


def _range(values: list[float], digits: int = 3) -> str:
    if not values:
        return ""
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _work(layout: str, overrides: list[str], folder: Path) -> None:
    """A case on this rank; rank 0 writes what all have measured."""
    with _layouts.quiet():
        warnings.simplefilter("ignore")
        config = config_of_case(layout, dist.get_world_size(), *overrides)
        found = measure(config)
    told: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(told))


def main(arguments: Sequence[str]) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE")
    chosen = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if chosen.speed or not chosen.memory:
        report_speed()
    if chosen.memory or not chosen.speed:
        with tempfile.TemporaryDirectory() as folder:
            report_memory(chosen.cases, Path(folder))


if __name__ == "__main__":
    import cheapertraining.training.run  # noqa: F401  # before anything is forked, so that only one process imports it

    main(sys.argv[1:])
