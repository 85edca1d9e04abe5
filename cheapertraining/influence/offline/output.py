"""From the parts of all checkpoints to one parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import GroupSums
from cheapertraining.influence.store import Records, check_same

__all__ = ["average", "check_finished", "source_table", "unit_tables", "write_parquet"]

_GROUP_ROWS = 1 << 16
_KEY = b"cheapertraining.influence"


def average(checkpoints: Sequence[Records]) -> Records:
    """One part over several checkpoints: the mean of scores and losses; the units are the same."""
    merged: Records = np.array(checkpoints[0])
    for name in ("loss", "values"):
        merged[name] = np.mean([records[name] for records in checkpoints], axis=0)
    return merged


def unit_tables(
    parts: Iterable[Records], sources: Sequence[str], columns: Sequence[str], documents: bool
) -> Iterator[dict[str, Any]]:
    """Columns of a table with a row for each unit, some ten thousands of units at a time."""
    for records in _in_groups(parts):
        table: dict[str, Any] = {"source": np.asarray(sources)[records["source"]], "sample_id": records["sample_id"]}
        if documents:
            table["document"] = records["document"]
        table |= {"tokens": records["tokens"], "loss": records["loss"]}
        yield table | {name: records["values"][:, k] for k, name in enumerate(columns)}


def source_table(
    parts: Iterable[Records], sources: Sequence[str], columns: Sequence[str], by_token: bool
) -> dict[str, Any]:
    """Columns of a table with a row for each source: ``samples``, ``tokens``, mean ``loss``, and means with errors.

    Args:
        parts: of samples.
        sources: names.
        columns: names of the scores.
        by_token: token-weighted means, of scores that belong to summed losses; otherwise means over samples.
    """
    count = len(sources)
    sums = GroupSums(count, len(columns), torch.device("cpu"))
    totals = {name: np.zeros(count) for name in ("samples", "tokens", "loss")}
    for records in parts:
        source, tokens = np.array(records["source"]), np.array(records["tokens"])
        weights = tokens if by_token else (tokens > 0).astype(np.int64)
        sums.add(*(torch.from_numpy(np.array(each)) for each in (records["values"], weights, source)))
        for name, values in (("samples", None), ("tokens", tokens), ("loss", records["loss"])):
            totals[name] += np.bincount(source, values, minlength=count)
    mean, error = sums.means()
    table: dict[str, Any] = {
        "source": np.asarray(sources),
        "samples": totals["samples"].astype(np.int64),
        "tokens": totals["tokens"].astype(np.int64),
        "loss": totals["loss"] / np.where(totals["tokens"] > 0, totals["tokens"], np.nan),
    }
    for k, name in enumerate(columns):
        table |= {name: mean[:, k].numpy(), f"{name}_error": error[:, k].numpy()}
    return table


def write_parquet(out: Path, tables: Iterable[Mapping[str, Any]], identity: Mapping[str, Any]) -> int:
    """Write a parquet file that appears whole or not at all; the number of its rows.

    ``identity`` goes into the file's metadata, so that a later run can tell what it was made with.

    Raises:
        UserError: no unit has a token that counts in the loss.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    metadata = {_KEY: json.dumps(identity).encode()}
    writer, rows, tokens = None, 0, 0
    for columns in tables:
        table = pa.table(dict(columns)).replace_schema_metadata(metadata)
        writer = writer or pq.ParquetWriter(unfinished, table.schema)
        writer.write_table(table)
        rows += len(table)
        tokens += int(np.sum(columns["tokens"]))
    if writer is not None:
        writer.close()
    if tokens == 0:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{out}: expected rows with tokens that count in the loss, found all labels masked.")
    unfinished.replace(out)
    return rows


def check_finished(out: Path, identity: Mapping[str, Any]) -> int:
    """Refuse finished scores that were made otherwise; the number of their rows.

    Raises:
        UserError: they were, or the file is no scores at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(out) as file:
            metadata, rows = file.schema_arrow.metadata or {}, int(file.metadata.num_rows)
        found = json.loads(metadata[_KEY])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{out}: expected scores of this tool, found another file. Name another --out.") from error
    check_same(out, found, identity, "Give what it was made with, another --out, or --overwrite.")
    return rows


def _in_groups(parts: Iterable[Records]) -> Iterator[Records]:
    """Parts put together into runs that are worth a row group."""
    waiting: list[Records] = []
    for records in parts:
        waiting.append(np.array(records))
        if sum(map(len, waiting)) >= _GROUP_ROWS:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)
