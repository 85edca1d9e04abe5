"""The course of one run's mixture as the schedule of another: learn it on a small model, replay it on a large one.

A run's ledger is a step function: weights count from a batch until the next change. Replayed on a run of another length
it is the same function of the share of the run that is done. The other way to use it is DoReMi's (Xie et al., arXiv
2305.10429): the mean of the weights over the run, held from the first batch to the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cheapertraining.errors import UserError, nearest

__all__ = ["LEDGER", "changes_of", "mean_weights", "read_ledger", "rename_sources", "replay_points"]

LEDGER = "mixture.jsonl"
Change = tuple[int, Mapping[str, float]]
"""``(from_batch, weights by source)``, as in ``MixedDataset.ledger``."""


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The decisions that a run wrote down, a mapping with ``from_batch`` and ``weights`` each.

    Raises:
        UserError: a line that is no decision.
    """
    entries = []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # What is behind was being written at a kill.
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            start, weights = entry["from_batch"], entry["weights"]
            entry["from_batch"] = None if start is None else int(start)
            entry["weights"] = {name: float(weight) for name, weight in weights.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a decision of a run ({error}).") from error
        entries.append(entry)
    return entries


def changes_of(decisions: Iterable[Mapping[str, Any]], first: Mapping[str, float], batches: int) -> list[Change]:
    """The changes that reached a batch of the run, in order, ``first`` from batch 0 on ahead of them.

    Args:
        decisions: with ``from_batch`` (None where nothing changed) and ``weights``: lines of a ledger, or
            ``Decision.to_dict()`` of a controller's history.
        first: weights that the run began with, on any scale.
        batches: length of the run.
    """
    total = math.fsum(first.values())
    found: dict[int, Mapping[str, float]] = {0: {name: weight / total for name, weight in first.items()}}
    for decision in decisions:
        start = decision["from_batch"]
        if start is not None and start < batches:
            found[int(start)] = dict(decision["weights"])
    return sorted(found.items())


def mean_weights(changes: Sequence[Change], batches: int) -> dict[str, float]:
    """Sampling weights by source, averaged over the ``batches`` of a run; they sum to 1.

    Args:
        changes: as of :func:`changes_of`; the first one at batch 0.
        batches: length of the run; of one without a batch, the first weights.
    """
    ends = [*(start for start, _ in changes[1:]), max(batches, 1)]
    lengths = [max(0, end - start) for (start, _), end in zip(changes, ends, strict=True)]
    names = dict.fromkeys(name for _, weights in changes for name in weights)
    sums = {
        name: math.fsum(length * weights.get(name, 0.0) for length, (_, weights) in zip(lengths, changes, strict=True))
        for name in names
    }
    total = math.fsum(sums.values())
    return {name: value / total for name, value in sums.items()}


def replay_points(
    changes: Sequence[Change], batches: int, length: int, *, unit: str = "batch", mean: bool = False
) -> list[dict[str, Any]]:
    """Points of a :class:`~cheapertraining.mixing.ScheduleStrategy` for a run of ``length``.

    A change at the share ``from_batch / batches`` of the old run comes at the same share of the new one, rounded to the
    nearest batch (or token); changes that fall together are one, the last. The strategy draws lines between points, so
    each stage has a point at its start and one right before the next: at every batch the weights are a stage's own.

    Args:
        changes: as of :func:`changes_of`.
        batches: length of the run they are from.
        length: of the run they are for, in ``unit``.
        unit: ``batch`` or ``tokens``.
        mean: one point, the mean over the old run.

    Returns:
        ``[{unit: int, "weights": {source: weight}}, …]``, rising.

    Raises:
        UserError: an unknown unit, or a run without a batch.
    """
    if unit not in ("batch", "tokens"):
        raise UserError(f"replay: unit: expected batch or tokens, found '{unit}'.{nearest(unit, ('batch', 'tokens'))}")
    for what, found in (("batches of the run that is replayed", batches), ("length", length)):
        if found < 1:
            raise UserError(f"replay: {what}: expected at least 1, found {found}.")
    if mean:
        return [{unit: 0, "weights": mean_weights(changes, batches)}]
    stages: dict[int, dict[str, float]] = {}
    for start, weights in changes:
        stages[(2 * start * length + batches) // (2 * batches)] = dict(weights)
    points: list[dict[str, Any]] = []
    for place, weights in stages.items():
        if points and points[-1][unit] < place - 1:
            points.append({unit: place - 1, "weights": dict(points[-1]["weights"])})
        points.append({unit: place, "weights": weights})
    return points


def rename_sources(
    changes: Sequence[Change],
    *,
    rename: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    sources: Sequence[str] | None = None,
) -> list[Change]:
    """The changes in the names of another run.

    Args:
        changes: as of :func:`changes_of`.
        rename: new names by old ones.
        drop: sources to leave out, old ones, whose weight the others share in proportion; or sources of the other run
            that the old one did not have, which get nothing.
        sources: of the other run; None: whatever comes out is right.

    Raises:
        UserError: names that fit neither run, that meet in one, or that are left over on either side; or nothing left.
    """
    renamed, known = dict(rename or {}), dict.fromkeys(name for _, weights in changes for name in weights)
    others = tuple(sources or ())
    for name in [*renamed, *drop]:
        if name not in known and (name in renamed or name not in others):
            options = [*known, *(others if name not in renamed else ())]
            raise UserError(f"replay: no source is named '{name}' ({', '.join(options)}).{nearest(name, options)}")
    kept = [name for name in known if name not in drop]
    targets = [renamed.get(name, name) for name in kept]
    if twice := sorted({name for name in targets if targets.count(name) > 1}):
        raise UserError(f"replay: more than one source of the ledger becomes '{twice[0]}'. Drop or rename the others.")
    if sources is not None:
        _check_both_sides(targets, others, drop)
    changed: list[Change] = []
    for start, weights in changes:
        total = math.fsum(weights.get(name, 0.0) for name in kept)
        if not total > 0:
            raise UserError(
                f"replay: no weight is left at batch {start} without {', '.join(drop)}. Drop fewer sources."
            )
        changed.append((start, {renamed.get(name, name): weights.get(name, 0.0) / total for name in kept}))
    return changed


def _check_both_sides(targets: Sequence[str], sources: Sequence[str], drop: Sequence[str]) -> None:
    gone = [name for name in targets if name not in sources]
    new = [name for name in sources if name not in targets and name not in drop]
    if not gone and not new:
        return
    parts = [f"the ledger has {', '.join(gone)}, which the other run has not"] if gone else []
    parts += [f"the other run has {', '.join(new)}, which the ledger has not"] if new else []
    raise UserError(
        f"replay: sources differ: {'; '.join(parts)}. Say `--rename OLD=NEW` where one is the other, and "
        "`--drop NAME` for the rest: an old one's weight goes to the others, a new one gets nothing."
    )
