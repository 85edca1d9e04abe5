"""What a conversion did, or would do."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cheapertraining.data.conversion.job import Job
from cheapertraining.data.conversion.windows import piece_report
from cheapertraining.data.documents import Problems
from cheapertraining.data.packing import pack
from cheapertraining.data.records import read_piece
from cheapertraining.data.shards import ShardMeta
from cheapertraining.errors import UserError

__all__ = ["Report", "Trial", "collect_report", "try_out"]

_TRIED_PIECES = 8
_TRIED_RECORDS = 250


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        metas: by split; empty where the conversion was finished before.
        records: read from the input; documents, ``problems``, ``empty`` and ``duplicates`` sum to it.
        problems: records that could not be used, of which ``messages`` has the first.
        empty: records without text.
        duplicates: documents left out because they came before.
        seconds: wall time of this run.
    """

    metas: dict[str, ShardMeta]
    records: int
    problems: int
    messages: tuple[str, ...]
    empty: int
    duplicates: int
    seconds: float

    def __str__(self) -> str:
        if not self.metas:
            return "Nothing to do: this conversion is finished."
        lines = [f"{'split':<10} {'documents':>11} {'samples':>10} {'tokens':>14} {'padding':>8} {'cut':>7}"]
        for split, meta in self.metas.items():
            padding = meta.padding / max(1, meta.tokens + meta.padding)
            cut = meta.cut_documents / max(1, meta.documents)
            counts = f"{meta.documents:>11,} {meta.samples:>10,} {meta.tokens:>14,}"
            lines.append(f"{split:<10} {counts} {padding:>8.2%} {cut:>7.1%}")
        documents = sum(meta.documents for meta in self.metas.values())
        left = [
            f"{count:,} {what}"
            for count, what in ((self.empty, "empty"), (self.duplicates, "duplicates"), (self.problems, "unusable"))
            if count
        ]
        lines.append(
            f"{self.records:,} records read: {documents:,} documents written{', ' if left else ''}{', '.join(left)}"
        )
        lines += [f"  unusable: {message}" for message in self.messages]
        if self.problems > len(self.messages):
            lines.append(f"  … and {self.problems - len(self.messages):,} more")
        return "\n".join(lines)


def collect_report(job: Job, metas: dict[str, ShardMeta], seconds: float) -> Report:
    """Sum up the reports of the pieces, and check that each record is accounted for."""
    totals: Counter[str] = Counter()
    messages: list[str] = []
    for number in job.my_pieces:
        report = piece_report(job, number) or {}
        messages += report["messages"]
        totals.update({key: value for key, value in report.items() if isinstance(value, int)})
    documents = sum(meta.documents for meta in metas.values())
    accounted = documents + totals["problems"] + totals["empty"] + totals["dropped"]
    if accounted != totals["records"]:
        raise RuntimeError(f"{totals['records']} records were read, but {accounted} are accounted for")
    return Report(
        metas,
        totals["records"],
        totals["problems"],
        tuple(messages[: Problems.KEPT]),
        totals["empty"],
        totals["dropped"],
        seconds,
    )


@dataclass(frozen=True)
class Trial:
    """What a conversion would do, judged by a few documents from all over the input.

    Attributes:
        documents, tokens: in the sample.
        bytes: of input in all.
        bytes_per_token: of text, in UTF-8.
        tokens_per_second: of one process, tokenization alone.
        padding: share of the rows if the sample alone were packed.
        longer: share of the documents that are longer than a row.
        problems: records of the sample that could not be used, of which ``messages`` has the first.
    """

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    tokens_per_second: float
    padding: float
    longer: float
    problems: int
    messages: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"Tried {self.documents:,} documents of {self.tokens:,} tokens; nothing was written.",
            f"input           {self.bytes / 1e6:,.1f} MB as stored",
            f"tokenizer       {self.bytes_per_token:.2f} bytes of text a token, "
            f"{self.tokens_per_second:,.0f} tokens/s a process",
            f"documents       {self.tokens / self.documents:,.0f} tokens on average, "
            f"{self.longer:.1%} longer than a row",
            f"padding         {self.padding:.2%} of this sample's rows (less of the whole input)",
        ]
        if self.problems:
            lines.append(f"unusable        {self.problems:,} records of the sample")
        return "\n".join([*lines, *(f"  unusable: {message}" for message in self.messages)])


def try_out(job: Job) -> Trial:
    """Read and tokenize a few documents from all over the input; writes nothing.

    Raises:
        UserError: no document is found, or a bad record where these are fatal.
    """
    step = max(1, len(job.pieces) // _TRIED_PIECES)
    lengths: list[int] = []
    texts: list[str] = []
    problems = Problems("skip")
    seconds = 0.0
    for piece in job.pieces[::step][:_TRIED_PIECES]:
        records = list(islice(read_piece(piece, columns=job.encoder.columns or None), _TRIED_RECORDS))
        started = time.perf_counter()
        source = job.encoder.documents(records)
        lengths += [len(document.ids) for document in source]
        seconds += time.perf_counter() - started
        texts += job.encoder.texts(records)
        problems.count += source.problems.count
        problems.messages += source.problems.messages
    if not lengths:
        raise UserError("no documents with text among the records that were tried. Check the input and its column.")
    rows = pack(np.array(lengths, np.int64), job.settings.seq_len, job.settings.packing)
    return Trial(
        documents=len(lengths),
        tokens=sum(lengths),
        bytes=sum(piece.bytes for piece in job.pieces),
        bytes_per_token=sum(len(text.encode("utf-8")) for text in texts) / sum(lengths),
        tokens_per_second=sum(lengths) / max(seconds, 1e-9),
        padding=rows.padding / (len(rows) * job.settings.seq_len),
        longer=sum(length > job.settings.seq_len for length in lengths) / len(lengths),
        problems=problems.count,
        messages=tuple(problems.messages[: Problems.KEPT]),
    )
