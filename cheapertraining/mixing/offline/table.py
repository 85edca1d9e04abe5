"""A table of finished runs: what each was mixed of, and the losses it ended with.

One file, ``.csv`` or ``.jsonl``: a row (a JSON object) a run, with a column ``weight/<source>`` for each source and a
column ``loss/<target>`` for each target, and ``run`` for its name if wanted. Or two CSV files whose rows belong
together by their order, one with a column a source, the other with a column a target: RegMix publishes its runs so
(``train_<source>`` and ``metric/<target>``), and Olmix without the prefixes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.signals import Array

__all__ = ["LOSS", "WEIGHT", "RunTable", "read_table", "read_two_tables", "write_table"]

WEIGHT, LOSS = "weight/", "loss/"
_SUM_TOLERANCE = 0.01
"""Published tables are rounded: RegMix's rows sum to 0.996 to 1.003."""
_IDENTIFIERS = ("run", "name", "index")
_Row = Mapping[str, object]


@dataclass(frozen=True)
class RunTable:
    """Runs of equal length that differ in their mixture.

    Attributes:
        sources: names, ``[K]``.
        targets: names of what was measured, ``[M]``.
        weights: ``[N, K]``, sampling weights; each row sums to 1.
        losses: ``[N, M]``, at the end of each run; nats per token, or any other quantity to be minimised.
        runs: names, ``[N]``.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    weights: Array
    losses: Array
    runs: tuple[str, ...]

    def of_targets(self, names: Sequence[str]) -> RunTable:
        """The same runs with these targets alone.

        Raises:
            UserError: an unknown name.
        """
        for name in names:
            if name not in self.targets:
                known = ", ".join(self.targets)
                raise UserError(f"target '{name}': not in the table ({known}).{nearest(name, self.targets)}")
        chosen = [self.targets.index(name) for name in names]
        return replace(self, targets=tuple(names), losses=self.losses[:, chosen])

    def check_identified(self) -> None:
        """Raise a UserError where the runs cannot tell the effects of the sources apart."""
        parameters = len(self.sources) + 1
        if len(self.runs) < parameters:
            raise UserError(
                f"table: {len(self.runs)} runs cannot fix the {parameters} parameters that a law of "
                f"{len(self.sources)} sources has. Make at least {parameters}, better two to four times as many."
            )
        for k, name in enumerate(self.sources):
            if np.ptp(self.weights[:, k]) == 0:
                raise UserError(
                    f"table: source '{name}' has the weight {self.weights[0, k]:g} in every run, so its effect cannot "
                    "be seen. Leave its column out, or add runs that vary it."
                )
        for m, name in enumerate(self.targets):
            if np.ptp(self.losses[:, m]) == 0:
                raise UserError(f"table: target '{name}' is {self.losses[0, m]:g} in every run. Leave it out.")


def read_table(path: str | Path) -> RunTable:
    """Read one file with ``weight/<source>`` and ``loss/<target>`` columns.

    Raises:
        UserError: unreadable, no such columns, a cell that is no number, weights that do not sum to 1.
    """
    rows = _read_json_lines(path) if Path(path).suffix in (".jsonl", ".json") else _read_csv(path)
    columns = list(rows[0])
    sources = [name for name in columns if name.startswith(WEIGHT)]
    targets = [name for name in columns if name.startswith(LOSS)]
    for found, prefix, what in ((sources, WEIGHT, "source"), (targets, LOSS, "target")):
        if not found:
            raise UserError(
                f"{path}: expected a column '{prefix}<{what}>' for each {what}, found {', '.join(columns)}. "
                "(A table in two files: give the second with --losses.)"
            )
    return RunTable(
        tuple(name.removeprefix(WEIGHT) for name in sources),
        tuple(name.removeprefix(LOSS) for name in targets),
        _weights(path, rows, sources),
        _numbers(path, rows, targets),
        _names(rows),
    )


def read_two_tables(mixtures: str | Path, losses: str | Path) -> RunTable:
    """Read RegMix's layout: mixtures and losses in a CSV file each, row i of one with row i of the other.

    Columns ``run``, ``name`` and ``index`` name the run; where both files have one, they must agree. A prefix
    ``train_`` or ``metric/`` that all others share is left out.

    Raises:
        UserError: as :func:`read_table`, or files that do not belong together.
    """
    first, second = _read_csv(mixtures), _read_csv(losses)
    if len(first) != len(second):
        raise UserError(
            f"{losses}: expected a row for each of the {len(first)} runs of {mixtures}, found {len(second)}."
        )
    for key in _IDENTIFIERS:
        if key in first[0] and key in second[0]:
            for number, (one, other) in enumerate(zip(first, second, strict=True), start=2):
                if one[key] != other[key]:
                    raise UserError(
                        f"{losses}, line {number}: expected {key} {one[key]}, as in {mixtures}, found {other[key]}. "
                        "Rows must be in the same order."
                    )
    sources = [name for name in first[0] if name not in _IDENTIFIERS]
    targets = [name for name in second[0] if name not in _IDENTIFIERS]
    for path, found, what in ((mixtures, sources, "source"), (losses, targets, "target")):
        if not found:
            raise UserError(f"{path}: expected a column for each {what}, found none.")
    return RunTable(
        _without_prefix(sources, "train_"),
        _without_prefix(targets, "metric/"),
        _weights(mixtures, first, sources),
        _numbers(losses, second, targets),
        _names(first),
    )


def write_table(table: RunTable, path: str | Path) -> None:
    """Write what :func:`read_table` reads: JSON lines for ``.jsonl``, else CSV."""
    header = ["run", *(WEIGHT + name for name in table.sources), *(LOSS + name for name in table.targets)]
    rows = [
        [run, *weights, *losses]
        for run, weights, losses in zip(table.runs, table.weights.tolist(), table.losses.tolist(), strict=True)
    ]
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        if Path(path).suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        else:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _read_csv(path: str | Path) -> list[_Row]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error}).") from error
    if len(lines) < 2:
        raise UserError(f"{path}: expected a line of column names and a line a run, found {len(lines)} lines.")
    header = [name.strip() for name in lines[0]]
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise UserError(f"{path}: column '{twice[0]}' is there twice.")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: expected {len(header)} cells, found {len(line)}.")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _read_json_lines(path: str | Path) -> list[_Row]:
    rows: list[_Row] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable file ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object with the columns as keys, found {line[:40]}.")
        if rows and row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())[0]
            raise UserError(f"{path}, line {number}: '{odd}' is not in all lines; every run needs the same columns.")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: expected a JSON object a line, found none.")
    return rows


def _numbers(path: str | Path, rows: Iterable[_Row], columns: Sequence[str]) -> Array:
    """``[N, columns]``; each cell a finite number."""
    result = []
    for number, row in enumerate(rows):
        values = []
        for column in columns:
            cell = row[column]
            try:
                value = math.nan if isinstance(cell, bool) else float(cell)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                found = "nothing" if cell in ("", None) else repr(cell)
                raise UserError(
                    f"{path}, run {number + 1}, column '{column}': expected a finite number, found {found}."
                )
            values.append(value)
        result.append(values)
    return np.array(result)


def _weights(path: str | Path, rows: Sequence[_Row], columns: Sequence[str]) -> Array:
    weights = _numbers(path, rows, columns)
    for number, row in enumerate(weights):
        least = int(row.argmin())
        if row[least] < 0:
            raise UserError(
                f"{path}, run {number + 1}, column '{columns[least]}': expected a weight of at least 0, "
                f"found {row[least]:g}."
            )
        if abs((total := math.fsum(row)) - 1) > _SUM_TOLERANCE:
            raise UserError(f"{path}, run {number + 1}: expected weights that sum to 1, found {total:.6g}.")
    result: Array = weights / weights.sum(axis=1, keepdims=True)
    return result


def _names(rows: Sequence[_Row]) -> tuple[str, ...]:
    key = next((key for key in _IDENTIFIERS if key in rows[0]), None)
    return tuple(str(number + 1 if key is None else row[key]) for number, row in enumerate(rows))


def _without_prefix(names: Sequence[str], prefix: str) -> tuple[str, ...]:
    shared = all(name.startswith(prefix) and name != prefix for name in names)
    return tuple(name.removeprefix(prefix) if shared else name for name in names)
