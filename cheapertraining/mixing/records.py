"""What a decision leaves behind: metrics for the log, lines in the ledger."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.gram import SourceGradients
from cheapertraining.mixing.controller import Decision
from cheapertraining.mixing.signals import Array, ProbeReading

__all__ = ["append_lines", "drop_later", "metrics_of", "note_source_changes"]


def metrics_of(
    measured: SourceInfluence | None,
    gradients: SourceGradients | None,
    reading: ProbeReading | None,
    importance: Mapping[str, float],
) -> dict[str, float]:
    """What a decision's measurements add to the log, by metric name.

    Args:
        measured, gradients, reading: as far as the strategy needs them.
        importance: weights of probes in the objective that the strategy has in place of those given.
    """
    metrics: dict[str, float] = {}
    if measured is not None:
        for row, direction in enumerate(measured.directions):
            for k, source in enumerate(measured.sources):
                metrics[f"mixture/score/{direction}/{source}"] = float(measured.scores[row, k])
                metrics[f"mixture/score_se/{direction}/{source}"] = float(measured.errors[row, k])
        metrics |= _probes(measured, importance, measured.probe_weights, measured.probe_losses)
    if gradients is not None:
        for k, source in enumerate(gradients.sources):
            metrics[f"mixture/gradient_norm2/{source}"] = float(gradients.squared_norms[k])
            metrics[f"mixture/gradient_variance/{source}"] = float(gradients.variances[k])
    if reading is not None:
        metrics |= _probes(reading, importance, reading.weights, reading.losses)
    return metrics


def _probes(
    seen: SourceInfluence | ProbeReading, importance: Mapping[str, float], weights: Array, losses: Array
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for probe, weight, loss in zip(seen.probes, weights, losses, strict=True):
        metrics[f"mixture/probe_weight/{probe}"] = float(importance.get(probe, weight))
        metrics[f"mixture/probe_loss/{probe}"] = float(loss)
    return metrics


def append_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add decisions to a ledger, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def note_source_changes(path: Path, batch: int, changes: Sequence[Decision]) -> None:
    """Write down the mixture that other sources have made, unless an earlier start from here has done so."""
    written = path.read_text().splitlines() if path.exists() else []
    last = json.loads(written[-1]) if written else {"batch": -1}
    if not changes or (last["batch"] == batch and last["weights"] == changes[-1].weights):
        return
    entries = [change.to_dict() for change in changes]
    append_lines(path, [{key: value for key, value in entry.items() if key != "realized"} for entry in entries])


def drop_later(path: Path, batch: int) -> None:
    """Keep the decisions up to ``batch`` (a checkpoint is saved after the batch's decision); at 0, none."""
    if not path.exists():
        return
    kept = [] if batch == 0 else [line for line, made in _entries(path) if made <= batch]
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(kept))
    os.replace(scratch, path)


def _entries(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines(keepends=True):
        try:
            yield line, int(json.loads(line)["batch"])
        except (ValueError, KeyError, TypeError):
            continue  # The line that was being written when the process was killed.
