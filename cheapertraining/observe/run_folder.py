"""Reads the folder that a run leaves, whole or not: log, ledger, summary, settings.

read_run("runs/mine") -> RunFolder      # needs neither Composer nor torch
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.errors import UserError
from cheapertraining.observe.vocabulary import find

__all__ = ["LOG_VERSION", "RunFolder", "Series", "read_run"]

LOG_VERSION = 2
"""Of ``metrics.jsonl``, in ``run.json``. 1 had no version, norms, events, shares and fidelity."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One metric over the run.

    Attributes:
        steps: batches trained, rising, ``[n]``.
        values: ``[n]``; NaN where the log has null.
    """

    steps: Array
    values: Array

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass
class RunFolder:
    """What a run's folder says.

    Attributes:
        path: of the folder.
        name: of the run.
        metrics: by name.
        ledger: decisions, one mapping each.
        summary: the table at the end; None before it is written.
        config: the resolved config's text, or "".
        environment: what it ran on.
        notes: what is missing, odd or old, a sentence each.
    """

    path: Path
    name: str
    metrics: dict[str, Series]
    ledger: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of the config."""
        found = self.by_place("mixture/weight/{source}") or self.by_place("loss/train/{source}")
        if not found and self.summary is not None:
            return list(self.summary.get("sources", {}))
        return list(found)

    def by_place(self, pattern: str) -> dict[str, Series]:
        """Series of a vocabulary pattern with one place, by what stands there."""
        return {places[-1]: series for places, series in self.matching(pattern)}

    def matching(self, pattern: str) -> Iterator[tuple[tuple[str, ...], Series]]:
        """Series of a vocabulary pattern, with what stands in its places."""
        for name, series in self.metrics.items():
            entry = find(name)
            if entry is not None and entry.pattern == pattern:
                yield entry.match(name) or (), series

    def tokens_at(self, steps: Array) -> Array:
        """Tokens trained on after each of ``steps``; the steps themselves where tokens were not logged."""
        counted = self.metrics.get("time/token")
        if counted is None:
            return steps
        return np.interp(steps, np.append(0.0, counted.steps), np.append(0.0, counted.values))

    def hours_at(self, steps: Array) -> Array | None:
        """Hours spent training after each of ``steps``, measuring included and evaluation not; None: not logged."""
        spent = self.metrics.get("time/train")
        if spent is None:
            return None
        return np.interp(steps, np.append(0.0, spent.steps), np.append(0.0, spent.values))


def read_run(path: str | Path) -> RunFolder:
    """Read the folder of a run that has ended, runs, or was killed.

    Raises:
        UserError: it is not a run's folder, its log has no step, or a newer version wrote it.
    """
    folder = Path(path)
    log = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{path}: expected the folder of a run (runs/NAME), found {_kind(folder)}.{_runs_near(folder)}")
    if not log.is_file():
        raise UserError(
            f"{log}: expected the log of a run, found none. Turn loggers.jsonl on, or name another folder."
            f"{_runs_near(folder)}"
        )
    notes: list[str] = []
    metrics = _metrics(log, notes)
    settings = _mapping(folder / "run.json", notes)
    _check_version(settings, folder, notes)
    summary = _mapping(folder / "summary.json", [])
    sources = summary.get("sources", {})
    if not summary:
        notes.append("summary.json is not there: the run has not ended, or did not get to its end.")
    elif not isinstance(sources, dict) or not all(_numbers(own) for own in sources.values()):
        notes.append("summary.json is not one of a run, and left out.")
        summary = {}
    config = folder / "config.yaml"
    if not config.is_file():
        notes.append("config.yaml is not there, so the settings of the run are not known.")
    unknown = [name for name in metrics if find(name) is None]
    if unknown:
        notes.append(f"{len(unknown)} names in the log are not in the vocabulary: {', '.join(unknown[:5])}.")
    return RunFolder(
        folder,
        folder.resolve().name,
        metrics,
        _ledger(folder / "mixture.jsonl", notes),
        summary or None,
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        {str(key): str(value) for key, value in _mapping(folder / "environment.json", []).items()},
        notes,
    )


def _metrics(log: Path, notes: list[str]) -> dict[str, Series]:
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for record in _lines(log, notes):
        step = record.get("step")
        if not isinstance(step, int | float):
            notes.append(f"{log.name} has a line without a step, which is left out.")
            continue
        for name, value in record.items():
            if name in ("step", "time") or not (value is None or isinstance(value, int | float)):
                continue
            steps.setdefault(name, []).append(float(step))
            values.setdefault(name, []).append(math.nan if value is None else float(value))
    if not steps:
        raise UserError(f"{log}: expected a line of JSON for each step, found none. The run has not begun to train.")
    return {name: Series(np.array(steps[name]), np.array(values[name])) for name in steps}


def _ledger(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    found = _lines(path, notes)
    whole = [e for e in found if _numbers(e.get("weights", {})) and _numbers({"batch": e.get("batch", 0)})]
    if len(whole) < len(found):
        notes.append(f"{path.name}: {len(found) - len(whole)} of {len(found)} lines are no decisions, and left out.")
    return whole


def _numbers(content: Any) -> bool:
    """Whether it is a mapping to numbers (or null)."""
    return isinstance(content, dict) and all(each is None or isinstance(each, int | float) for each in content.values())


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; torn and foreign lines are noted."""
    if not path.is_file():
        return []
    found, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            bad += 1
    if bad:
        what = "line is" if bad == 1 else "lines are"
        notes.append(f"{path.name}: {bad} {what} not whole and left out (the run was writing, or was killed).")
    return found


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    if not path.is_file():
        notes.append(f"{path.name} is not there.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is not readable.")
        return {}
    return content


def _check_version(settings: Mapping[str, Any], folder: Path, notes: list[str]) -> None:
    version = settings.get("log_version", 1)
    if not isinstance(version, int) or version > LOG_VERSION:
        raise UserError(
            f"{folder / 'run.json'}: expected a log of version {LOG_VERSION} or older, found {version}. Use the "
            "cheapertraining that made it, or a newer one."
        )
    if version < LOG_VERSION:
        notes.append(
            f"The log is of version {version} (now {LOG_VERSION}): norms, events, token shares and fidelity "
            "are not in it."
        )


def _kind(path: Path) -> str:
    return "a file" if path.is_file() else "nothing"


def _runs_near(folder: Path) -> str:
    """Folders of runs in or beside ``folder``, for the message."""
    for place in (folder, folder.parent):
        if place.is_dir():
            names = sorted(str(log.parent) for log in place.glob("*/metrics.jsonl"))[:5]
            if names:
                return f" Runs near it: {', '.join(names)}."
    return ""
