"""From scores to new shards: the chosen rows, as they are, in the order they were in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cheapertraining.data.rows import TokenRows
from cheapertraining.data.shards import (
    DEFAULT_SHARD_BYTES,
    INDEX_FILE,
    ShardMeta,
    index_json,
    read_document_hashes,
    rows_in_shard,
    sync_folder,
    write_shard,
    write_sidecars,
)
from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.offline.rows import ShardSet, open_sets, read_rows_of
from cheapertraining.influence.selection import above_threshold, top_fraction
from cheapertraining.influence.store import check_same

__all__ = ["Rule", "select_shards"]

Int64 = NDArray[np.int64]

SELECTION_FILE = "selection.json"
RULES = ("top_fraction", "threshold")
_CHUNK = 1024


class Rule:
    """``top_fraction=0.2`` or ``threshold=0``: see :mod:`cheapertraining.influence.selection`.

    Raises:
        UserError: the text is neither.
    """

    def __init__(self, text: str) -> None:
        name, _, value = text.partition("=")
        if name not in RULES:
            raise UserError(f"--select: expected top_fraction=… or threshold=…, found '{text}'.{nearest(name, RULES)}")
        try:
            self.value = float(value)
        except ValueError as error:
            raise UserError(f"--select {name}: expected a number, found '{value}'.") from error
        self.name = name
        if name == "top_fraction" and not 0 < self.value <= 1:
            raise UserError(f"--select {name}: expected a share above 0 and up to 1, found {value}.")

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool ``[N]``: which samples to take."""
        choose = top_fraction if self.name == "top_fraction" else above_threshold
        return choose(scores, self.value)


def select_shards(
    scores: Path, shards: Sequence[Path], rule: Rule, column: str, out: Path, *, resume: bool, overwrite: bool
) -> dict[str, int]:
    """Write the chosen samples as shards, ``<out>/<source>/<split>``, and say how many are of each source.

    A data yaml with ``local: <out>`` has them as its sources. A source of which nothing is chosen has no folder.
    ``documents.u64`` is that of the whole folder, since rows do not know whose pieces they hold: two splits that
    shared no document share none afterwards. The folder ``out`` appears whole or not at all.

    Args:
        scores: parquet file with a row for each sample.
        shards: what was scored.
        rule: says which.
        column: of the scores to go by.
        out: new folder.
        resume: leave alone a folder that was made so.
        overwrite: replace the folder.

    Raises:
        UserError: nothing is chosen, no such column, scores of other shards, or something is there already.
    """
    sets = open_sets(shards, "--shards")
    chosen = _chosen(scores, sets, rule, column)
    about = {"select": str(rule), "column": column, "shards": {each.name: each.digest for each in sets}}
    about["chosen"] = {name: len(rows) for name, rows in chosen.items()}
    if out.exists() and not overwrite:
        if not resume or not (out / SELECTION_FILE).is_file():
            raise UserError(f"--select-out: expected no folder at {out}, found one. Name another, or use --overwrite.")
        found = json.loads((out / SELECTION_FILE).read_text(encoding="utf-8"))
        check_same(out, found, about, "Name another --select-out, or use --overwrite.")
        return dict(about["chosen"])  # type: ignore[arg-type]
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for shard_set in sets:
        if len(chosen[shard_set.name]):
            place = unfinished / shard_set.meta.source / shard_set.meta.split
            _write_set(place, shard_set, chosen[shard_set.name])
    (unfinished / SELECTION_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(unfinished, out)
    return {name: len(rows) for name, rows in chosen.items()}


def _chosen(scores: Path, sets: Sequence[ShardSet], rule: Rule, column: str) -> dict[str, Int64]:
    """Rows to take of each shard set, in order."""
    sources, samples, values = _read_scores(scores, column)
    names = [shard_set.name for shard_set in sets]
    if unknown := sorted(set(sources.tolist()) - set(names)):
        raise UserError(
            f"{scores}: expected scores of {', '.join(names)}, found some of '{unknown[0]}'. Name its shards."
        )
    chosen = rule(torch.from_numpy(values)).numpy()
    found = {}
    for shard_set in sets:
        mine = sources == shard_set.name
        if not np.array_equal(np.sort(samples[mine]), np.arange(shard_set.samples)):
            raise UserError(
                f"{scores}: expected a score for each of the {shard_set.samples} samples of '{shard_set.name}', found "
                f"{int(mine.sum())}. Score these shards by sample first."
            )
        found[shard_set.name] = np.sort(samples[mine & chosen])
    return found


def _read_scores(file: Path, column: str) -> tuple[NDArray[Any], Int64, NDArray[np.float64]]:
    import pyarrow.parquet as pq

    fixed = ("source", "sample_id", "document", "tokens", "loss", "samples")
    names = pq.read_schema(file).names
    probes = [name for name in names if name not in fixed]
    if column not in probes:
        raise UserError(
            f"--probe-column: expected one of {', '.join(probes)}, found '{column}'.{nearest(column, probes)}"
        )
    if "sample_id" not in names or "document" in names:
        raise UserError(f"{file}: expected scores by sample, found others. Score with --by sample to select.")
    table = pq.read_table(file, columns=["source", "sample_id", column])
    source, sample, values = (table.column(name).to_numpy() for name in ("source", "sample_id", column))
    return source.astype(str), sample.astype(np.int64), values.astype(np.float64)


def _write_set(folder: Path, shard_set: ShardSet, rows: Int64) -> None:
    """The shard folder of some rows."""
    folder.mkdir(parents=True)
    per_shard = rows_in_shard(shard_set.meta, DEFAULT_SHARD_BYTES)
    counts = {"tokens": 0, "loss_tokens": 0}
    entries = []
    for number, first in enumerate(range(0, len(rows), per_shard)):
        part = _counted(_chunks(shard_set, rows[first : first + per_shard]), counts)
        entries.append(write_shard(folder, number, part, shard_set.meta.columns))
    write_sidecars(folder, _meta_of(shard_set.meta, len(rows), counts), read_document_hashes(shard_set.folder))
    (folder / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")
    sync_folder(folder)


def _chunks(shard_set: ShardSet, rows: Int64) -> Iterator[TokenRows]:
    """The rows, some at a time, each run from one shard."""
    ends = np.cumsum(shard_set.shards)
    shards = np.searchsorted(ends, rows, side="right")
    for shard in np.unique(shards).tolist():
        within = rows[shards == shard] - (ends[shard] - shard_set.shards[shard])
        for first in range(0, len(within), _CHUNK):
            yield read_rows_of(shard_set, shard, within[first : first + _CHUNK])


def _counted(parts: Iterator[TokenRows], counts: dict[str, int]) -> Iterator[TokenRows]:
    """The same rows; ``counts`` grows by their tokens."""
    for rows in parts:
        counts["tokens"] += int(rows.doc_lengths.sum())
        counts["loss_tokens"] += 0 if rows.loss_mask is None else int(rows.loss_mask.sum())
        yield rows


def _meta_of(meta: ShardMeta, samples: int, counts: Mapping[str, int]) -> ShardMeta:
    return replace(
        meta,
        samples=samples,
        tokens=counts["tokens"],
        padding=samples * meta.seq_len - counts["tokens"],
        loss_tokens=None if meta.loss_tokens is None else counts["loss_tokens"],
    )
