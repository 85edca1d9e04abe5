"""A table from the folders of finished runs: ``<run>/summary.json`` and, where the mixture moved, ``mixture.jsonl``.

A run's weights are the sampling weights it was trained with, averaged over its batches. Runs of different length are
refused: a law holds for one budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.mixing.offline.table import RunTable
from cheapertraining.mixing.replay import LEDGER, changes_of, mean_weights, read_ledger

__all__ = ["SUMMARY", "collect_runs"]

SUMMARY = "summary.json"


def collect_runs(folders: Sequence[Path], labels: str = "probe/*") -> RunTable:
    """Read finished runs into a table.

    Args:
        folders: one a run, each with a ``summary.json``.
        labels: which evaluations are targets (a pattern). Held-out losses are for judging the mixture that comes out
            of it, so the default takes the probes alone.

    Raises:
        UserError: a folder without a readable summary, no evaluation that fits, or runs that do not belong together.
    """
    if not folders:
        raise UserError("runs: expected at least one folder of a finished run, found none.")
    summaries = [_summary(folder) for folder in folders]
    lengths = {summary["batches"] for summary in summaries}
    if len(lengths) > 1:
        odd = next(i for i, summary in enumerate(summaries) if summary["batches"] != summaries[0]["batches"])
        raise UserError(
            f"{folders[odd]}: has {summaries[odd]['batches']} batches, {folders[0]} has {summaries[0]['batches']}. "
            "A law holds for one length: leave out the others."
        )
    weights = [_mean_weights(folder, summary) for folder, summary in zip(folders, summaries, strict=True)]
    sources = tuple(dict.fromkeys(name for row in weights for name in row))
    losses = [_losses(folder, summary, labels) for folder, summary in zip(folders, summaries, strict=True)]
    for folder, row in zip(folders, losses, strict=True):
        if row.keys() != losses[0].keys():
            odd_label = sorted(row.keys() ^ losses[0].keys())[0]
            raise UserError(f"{folder}: evaluation '{odd_label}' is not in all runs. Choose others with --labels.")
    targets = tuple(losses[0])
    return RunTable(
        sources,
        targets,
        np.array([[row.get(name, 0.0) for name in sources] for row in weights]),
        np.array([[row[name] for name in targets] for row in losses]),
        tuple(folder.name for folder in folders),
    )


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        found = isinstance(summary["batches"], int) and summary["sources"] and summary["evaluations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SUMMARY}: not the summary of a finished run ({error}).") from error
    if not found:
        raise UserError(f"{folder / SUMMARY}: expected sources and evaluations, found none.")
    return dict(summary)


def _losses(folder: Path, summary: dict[str, Any], labels: str) -> dict[str, float]:
    evaluations = summary["evaluations"]
    losses = {name: row["loss_after"] for name, row in evaluations.items() if fnmatchcase(name, labels)}
    if not losses:
        known = ", ".join(evaluations)
        raise UserError(f"{folder / SUMMARY}: no evaluation is named '{labels}' ({known}). Choose with --labels.")
    for name, loss in losses.items():
        if not (isinstance(loss, float | int) and math.isfinite(loss)):
            raise UserError(f"{folder / SUMMARY}: expected a finite loss of '{name}', found {loss}. Leave the run out.")
    return losses


def _mean_weights(folder: Path, summary: dict[str, Any]) -> dict[str, float]:
    """Sampling weights by source, averaged over the batches of the run."""
    first = {name: float(row["weight_start"]) for name, row in summary["sources"].items()}
    last = {name: float(row["weight_end"]) for name, row in summary["sources"].items()}
    decisions = read_ledger(folder / LEDGER) if (folder / LEDGER).is_file() else []
    changes = changes_of(decisions, first, summary["batches"])
    if len(changes) == 1 and any(abs(changes[0][1][name] - last[name]) > 1e-6 for name in first):
        raise UserError(f"{folder}: its weights changed, and there is no {LEDGER} that says when.")
    return mean_weights(changes, summary["batches"])
