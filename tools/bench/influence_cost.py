"""Cost of influence, as a multiple of one plain forward and backward of the same batch.

    python tools/bench/influence_cost.py [--params 2.5M 10M] [--length 128 512] [--only NAME] [--repeats 5]
        [--json FILE] [--markdown] [--quick]

A Hugging Face Llama of random weights (2.6 or 8.7 million parameters, vocabulary 2,048, untied), random tokens in
float32, one thread; 4,096 tokens a batch (32 rows of 128, or 8 of 512), 2,048 with the larger model. Each candidate
takes turns with its baseline, and the figure is the ratio of their CPU times (of the process, with all its threads) in
the same turn: median [quartiles] over the turns. What scores "with the training step" is a whole training step with
scores, what is "a pass of its own" comes beside training. Peak memory is that of a process of its own beyond model and
batch, with directions and factors, over that of the plain step. kronfluence and dattri are measured where they are
installed (`pip install -e .[bench]`). The whole takes 10 to 13 CPU-minutes; `--quick` (one turn, small batches, no
other libraries) less than one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tools.bench._influence_candidates import CANDIDATES, GOALS, Candidate, Case
from tools.bench._influence_libraries import ENGINES, OTHERS
from tools.bench._influence_memory import MIB, PLAIN, peaks
from tools.bench._influence_setting import Setting, cpu_seconds

TOKENS = {"2.5M": 4096, "10M": 2048}
QUICK_TOKENS, FEW = 512, 8
WITHOUT_GOAL = 3  # turns at most, of what is not on the curves
MEMORY, MEMORY_GOAL = "peak memory", 1.5
# By name; what is not here differs little from what is.
MEASURED_MEMORY = (
    "fused, K=1",
    "fused, K=8",
    "fused DataInf, K=8",
    "sources by microbatch, K=8",
    "EK-FAC upkeep",
    "hook, K=8",
    "hook Gram matrix",
    "hook LoGra, rank 16",
    "difference, losses known",
    "JVP, K=1",
    "EK-FAC fit, with decomposition",
    "DataInf fit",
)


@dataclass(frozen=True)
class Row:
    """One figure of the report: median and quartiles of a ratio."""

    setting: str
    group: str
    name: str
    median: float
    low: float
    high: float
    goal: float | None = None

    def __str__(self) -> str:
        spread = f" [{self.low:.3f}, {self.high:.3f}]" if self.low != self.high else ""
        return f"{self.median:.3f}{spread}{' over' if self.goal and self.median > self.goal else ''}"


def ratios(case: Case, turns: int) -> list[float]:
    """Take turns, after a run that does not count, and compare turn by turn.

    Raises:
        SystemExit: the candidate gives something that is not finite.
    """
    case.baseline()
    if not bool(torch.isfinite(case.run()).all()):
        raise SystemExit("expected finite scores")
    found = []
    for turn in range(turns):
        # Whoever comes second finds a cache that the first has filled: change places.
        if turn % 2:
            cost = cpu_seconds(case.run)
            found.append(cost / cpu_seconds(case.baseline))
        else:
            cost = cpu_seconds(case.baseline)
            found.append(cpu_seconds(case.run) / cost)
    return found


def measure(candidate: Candidate, setting: Setting, turns: int) -> list[Row]:
    """The rows that a candidate fills in."""
    case = candidate.make(setting)
    found = ratios(case, turns)
    rows = []
    for added, view in case.views.items():
        values = sorted(map(view, found))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if turns > 1 else values * 3
        name = candidate.name + added
        goal = GOALS.get(name, {}).get(setting.length)
        rows.append(Row(str(setting), candidate.group, name, median, low, high, goal))
    return rows


def memory(setting: Setting, names: Iterable[str]) -> list[Row]:
    """Peaks over that of a plain step, which comes in MiB."""
    found = peaks(setting, [PLAIN, *names])
    plain = found.pop(PLAIN)
    first = Row(str(setting), MEMORY, f"{PLAIN}, MiB", *[plain / MIB] * 3)
    return [first, *(Row(str(setting), MEMORY, n, *[size / plain] * 3, MEMORY_GOAL) for n, size in found.items())]


def plan(arguments: argparse.Namespace) -> list[tuple[Setting, list[Candidate], int]]:
    """What is measured, and in how many turns: everything with the first model, the curves' part with the others."""
    first = arguments.params[0]
    jobs = []
    for params in arguments.params:
        turns = arguments.repeats if params == first else (arguments.repeats + 1) // 2
        tokens = QUICK_TOKENS if arguments.quick else TOKENS[params]
        for length in arguments.length:
            chosen = [c for c in CANDIDATES if params == first or c.curve]
            if (params, length) == (first, arguments.length[0]):
                chosen += ENGINES
                chosen += [] if arguments.quick and not arguments.only else available(OTHERS)
            jobs.append((Setting(params, max(1, tokens // length), length), chosen, turns))
    if not arguments.quick:
        few = [c for c in CANDIDATES if c.curve and "upkeep" not in c.name]
        jobs.insert(1, (Setting(first, FEW, arguments.length[0]), few, arguments.repeats))
    return [(setting, [c for c in chosen if arguments.only in c.name], turns) for setting, chosen, turns in jobs]


def available(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those whose library is installed; a note about each that is not."""
    libraries = dict.fromkeys(candidate.name.split(":")[0] for candidate in candidates)
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install -e .[bench])", file=sys.stderr)
    return [candidate for candidate in candidates if candidate.name.split(":")[0] not in missing]


def tables(rows: Sequence[Row]) -> str:
    """Markdown: one table a group, a column a setting, with goals."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        settings = list(dict.fromkeys(row.setting for row in mine))
        lines += [f"| {group} | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
        for name in dict.fromkeys(row.name for row in mine):
            cells = {row.setting: _cell(row) for row in mine if row.name == name}
            lines.append(f"| {name} | {' | '.join(cells.get(setting, '') for setting in settings)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    digits = 2 if row.median < 100 else 0
    spread = f" [{row.low:.{digits}f}, {row.high:.{digits}f}]" if row.low != row.high else ""
    goal = f" (≤ {row.goal:.2f})" if row.goal else ""
    return f"{row.median:.{digits}f}{spread}{goal}"


def main() -> None:
    """Measure, and print as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", choices=TOKENS, nargs="+", default=["2.5M", "10M"])
    parser.add_argument("--length", type=int, choices=(128, 256, 512), nargs="+", default=[128, 512])
    parser.add_argument("--only", default="", help="candidates whose name holds this; 'memory' for that alone")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns; half as many after the first model, at most 3 without a goal"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--markdown", action="store_true", help="print tables, and progress to stderr")
    parser.add_argument("--quick", action="store_true", help="one turn, the first model and length, small batches")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.params, arguments.length = 1, arguments.params[:1], arguments.length[:1]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    progress = sys.stderr if arguments.markdown else sys.stdout
    rows: list[Row] = []

    def report(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            print(f"  {row.name:<50} {row}", file=progress, flush=True)

    for setting, chosen, turns in plan(arguments):
        if chosen:
            print(f"{setting}: up to {turns} turns", file=progress, flush=True)
        for candidate in chosen:
            report(measure(candidate, setting, turns if candidate.curve else min(turns, WITHOUT_GOAL)))
    names = [name for name in MEASURED_MEMORY if arguments.only in (*MEMORY.split(), name) or arguments.only in name]
    for setting in _with_memory(arguments) if names else ():
        print(f"{setting}: {MEMORY}", file=progress, flush=True)
        report(memory(setting, names))
    if arguments.markdown:
        print(tables(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def _with_memory(arguments: argparse.Namespace) -> list[Setting]:
    tokens = QUICK_TOKENS if arguments.quick else TOKENS[arguments.params[0]]
    return [Setting(arguments.params[0], max(1, tokens // length), length) for length in arguments.length]


if __name__ == "__main__":
    main()
