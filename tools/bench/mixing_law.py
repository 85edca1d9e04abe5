"""How well a mixing law ranks mixtures from few runs: RegMix's published tables, the law beside boosted trees.

    python tools/bench/mixing_law.py [--tables FOLDER] [--runs 34 64 128 256 512] [--subsets 5]
        [--targets pile_cc | all] [--json FILE]

512 runs of 1M parameters over 17 sources are fitted; predicted are other runs: 256 of 1M, 256 of 60M and 64 of 1B
parameters. Printed is Spearman's rank correlation of predicted and measured loss, mean over random subsets of the runs
(lowest in brackets), the predictions' rank correlation in cross-validation, and CPU seconds a fit. `all` averages over
the 13 targets. Also printed: how often the law's 90 % interval for a new run holds the measured loss.
The tables are those of the repository sail-sg/regmix, folder `data`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.offline import (
    RunTable,
    bootstrap,
    cross_validate,
    fit_boosted_trees,
    fit_law,
    read_two_tables,
    spearman,
)
from cheapertraining.mixing.offline.fidelity import Predicts
from cheapertraining.mixing.signals import Array

TABLES = Path(__file__).resolve().parents[3] / "shared" / "regmix_tables"
SIZES = ("1m", "60m", "1B")
TARGET = "the_pile_pile_cc_val_loss"
METHODS: dict[str, Callable[[Array, Array], Predicts]] = {"law": fit_law, "regmix": fit_boosted_trees}


@dataclass(frozen=True)
class Row:
    """Figures of one method and number of runs; means (and minima) over subsets and targets."""

    method: str
    runs: int
    spearman: dict[str, float]
    lowest: dict[str, float]
    cross_validated: float | None
    cpu_seconds: float


def read_tables(folder: Path) -> tuple[RunTable, dict[str, RunTable]]:
    """Return the runs to fit, and the runs to predict by size."""
    train = read_two_tables(folder / "train_mixture_1m.csv", folder / "train_pile_loss_1m.csv")
    tests = {
        size: read_two_tables(folder / f"test_mixture_{size}.csv", folder / f"test_pile_loss_{size}.csv")
        for size in SIZES
    }
    return train, tests


def subset(table: RunTable, runs: int, seed: int) -> RunTable:
    """So many of the runs, at random."""
    chosen = np.random.default_rng(seed).choice(len(table.runs), runs, replace=False)
    return RunTable(
        table.sources, table.targets, table.weights[chosen], table.losses[chosen],
        tuple(table.runs[i] for i in chosen),
    )  # fmt: skip


def measure(method: str, train: RunTable, tests: dict[str, RunTable], runs: int, subsets: int, folds: int) -> Row:
    """Fit on random subsets, and rank the runs of the test tables."""
    fit = METHODS[method]
    found: dict[str, list[float]] = {size: [] for size in tests}
    inside, seconds = [], 0.0
    for seed in range(subsets if runs < len(train.runs) else 1):
        part = subset(train, runs, seed)
        start = time.process_time()
        models = [fit(part.weights, part.losses[:, m]) for m in range(len(part.targets))]
        seconds += time.process_time() - start
        for size, test in tests.items():
            ranks = [
                spearman(model.predict(test.weights), test.losses[:, m]) for m, model in enumerate(models)
            ]  # fmt: skip
            found[size].append(float(np.mean(ranks)))
        if folds:
            inside.append(float(np.mean(cross_validate(part, fit, folds=folds).spearman)))
    return Row(
        method,
        runs,
        {size: float(np.mean(values)) for size, values in found.items()},
        {size: min(values) for size, values in found.items()},
        float(np.mean(inside)) if inside else None,
        seconds / len(found[SIZES[0]]) / len(train.targets),
    )


def coverage(train: RunTable, test: RunTable, runs: int, subsets: int) -> float:
    """Share of new runs of the same size whose loss the law's 90 % interval holds; mean over subsets and targets."""
    held = []
    for seed in range(subsets):
        part = subset(train, runs, seed)
        for m, target in enumerate(part.targets):
            one = part.of_targets([target])
            laws = [fit_law(one.weights, one.losses[:, 0])]
            residuals = one.losses - cross_validate(one, fit_law).predicted
            draws = bootstrap(one, laws, draws=100)
            for mixture, loss in zip(test.weights, test.losses[:, m], strict=True):
                low, high = np.quantile(draws.prediction(mixture, residuals), [0.05, 0.95])
                held.append(low <= loss <= high)
    return float(np.mean(held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--runs", type=int, nargs="+", default=[34, 64, 128, 256, 512])
    parser.add_argument("--subsets", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation; 0 for none")
    parser.add_argument("--targets", choices=["pile_cc", "all"], default="pile_cc")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    try:
        train, tests = read_tables(given.tables)
    except UserError as error:
        said = f"mixing_law: {error}\nThe tables are in the folder data of github.com/sail-sg/regmix."
        if given.tables != TABLES:
            sys.exit(said)
        print(said)  # nobody asked for them by name: the other benchmarks go on
        return
    if given.targets == "pile_cc":
        train, tests = train.of_targets([TARGET]), {size: test.of_targets([TARGET]) for size, test in tests.items()}
    print(f"{len(train.sources)} sources, {len(train.targets)} targets, rank correlation with runs of size")
    print(f"{'method':8}{'runs':>6}" + "".join(f"{size:>16}" for size in SIZES) + f"{'cross-val.':>12}{'CPU s':>8}")
    rows = []
    for runs in given.runs:
        for method in METHODS:
            row = measure(method, train, tests, runs, given.subsets, given.folds)
            rows.append(row)
            cells = "".join(f"{row.spearman[size]:8.3f} ({row.lowest[size]:.3f})" for size in SIZES)
            inside = "-" if row.cross_validated is None else f"{row.cross_validated:.3f}"
            print(f"{method:8}{runs:6}{cells}{inside:>12}{row.cpu_seconds:8.2f}", flush=True)
    runs = given.runs[min(1, len(given.runs) - 1)]
    held = coverage(train, tests["1m"], runs, min(given.subsets, 2))
    print(f"90 % interval of the law for a new run of 1M, from {runs} runs: holds {held:.1%}")
    if given.json:
        given.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "coverage": held}, indent=2) + "\n")


if __name__ == "__main__":
    main()
