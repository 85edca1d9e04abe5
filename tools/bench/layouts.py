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

from tools.bench import _layouts
from tools.bench._layouts import FOUR_LAYERS, SOURCES, VOCABULARY
from tools.bench._layouts_cost import report_cost
from tools.bench._layouts_kills import report_kills
from tools.bench._layouts_parity import report_parity
from tools.bench._layouts_resume import report_checkpoints
from tools.bench._shards import library_texts, write_sources


def tiny_sample(folder: Path) -> Path:
    """A data yaml over some hundred rows of 32 tokens in three sources."""
    texts = library_texts(240_000)
    sources = {name: texts[number::3] for number, name in enumerate(SOURCES)}
    return write_sources(folder, sources, "code", vocab_size=VOCABULARY, seq_len=32)


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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # which would warn in each process that is forked
    with tempfile.TemporaryDirectory() as scratch:
        data = chosen.data or tiny_sample(Path(scratch) / "sample")
        for name, (wanted, report) in reports.items():
            if wanted or everything:
                start, folder = time.monotonic(), Path(scratch) / name
                folder.mkdir()
                report(_layouts.tiny_yaml(folder / "run.yaml", data, model=FOUR_LAYERS), folder)
                print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    import cheapertraining.training.run  # noqa: F401  # before anything is forked, so that only one process imports it

    main(sys.argv[1:])
