"""Look at token shards: what they hold, whether they are whole, how two folders differ; join parts of a conversion.

    python tools/inspect_shards.py describe shards/wiki/train [--samples 3] [--tokenizer PATH]
    python tools/inspect_shards.py verify shards/wiki [MORE …] [--workers 4]
    python tools/inspect_shards.py diff old/wiki new/wiki
    python tools/inspect_shards.py merge shards/wiki

A folder is one of shards (with index.json), or one above such: a source with its splits, or all sources. Exit codes:
verify gives 1 where something is wrong, diff 1 where they differ, all of them 2 on bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.data.inspection import Description
    from cheapertraining.data.rows import TokenRows
    from cheapertraining.data.tokenization import TokenizerWrapper

_BAR = 40  # characters of the longest bar of a histogram
_SHOWN = 300  # characters of a run of text, at most
_COLOURS = {"bound": "\x1b[1;33m", "loss": "\x1b[4;32m", "padding": "\x1b[2m"}
_MARKS = {"loss": ("⟦", "⟧")}


class Style:
    """Colours on a terminal, marks elsewhere."""

    def __init__(self, coloured: bool) -> None:
        self.coloured = coloured

    def __call__(self, kind: str, text: str) -> str:
        if self.coloured:
            return f"{_COLOURS[kind]}{text}\x1b[0m"
        before, after = _MARKS.get(kind, ("", ""))
        return f"{before}{text}{after}"


def readable(text: str) -> str:
    """A run of text in one line, shortened in the middle; what could command a terminal is replaced."""
    text = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", "→")
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"


def describe_text(found: Description, tokenizer: TokenizerWrapper | None) -> Iterator[str]:
    """What a folder holds, as lines for people."""
    meta = found.meta
    yield f"{found.folder}: source '{meta.source}', split '{meta.split}', packing {meta.packing}"
    yield f"  made from   {meta.origin} (license: {meta.license})"
    yield f"  tokenizer   {meta.tokenizer_fingerprint}, vocabulary {meta.vocab_size:,}"
    counted = {
        "samples": found.samples,
        "documents": found.documents,
        "tokens": found.tokens,
        "padding": found.padding,
        "loss_tokens": found.loss_tokens,
    }
    cells = max(1, found.samples * meta.seq_len)
    shares = {"padding": found.padding / cells}
    if found.loss_tokens is not None:
        shares["loss_tokens"] = found.loss_tokens / max(1, found.tokens)
    for name, number in counted.items():
        if number is None:
            continue
        share = f"  {shares[name]:.2%}" if name in shares else ""
        row = f"  of {meta.seq_len:,} {meta.token_dtype} tokens" if name == "samples" else ""
        stated = getattr(meta, name)
        note = "" if stated == number else f"  but meta.json says {stated:,}"
        yield f"  {name:<11} {number:,}{share}{row}{note}"
    yield f"  pieces      {found.pieces:,} of documents; {meta.cut_documents:,} documents lie in more than one row"
    yield (
        f"  on disk     {found.disk_bytes:,} bytes in {found.shards:,} shards"
        f" ({found.raw_bytes:,} without compression, ratio {found.compression_ratio:.2f})"
    )
    yield f"  vocabulary  {found.distinct_ids:,} ids occur, {found.distinct_ids / max(1, meta.vocab_size):.1%} of it"
    yield "  most often  " + ", ".join(_id_text(i, n, found.tokens, tokenizer) for i, n in found.most_frequent(10))
    yield "  length of pieces"
    most = max((row.pieces for row in found.lengths), default=1)
    for row in found.lengths:
        bar = "█" * max(1, round(_BAR * row.pieces / most)) if row.pieces else ""
        share = row.tokens / max(1, found.tokens)
        yield f"  {row.low:>9,} to {row.high:<9,} {row.pieces:>11,}  {share:>6.1%} of tokens  {bar}".rstrip()


def _id_text(token: int, count: int, total: int, tokenizer: TokenizerWrapper | None) -> str:
    text = f" {readable(tokenizer.decode([token]))!r}" if tokenizer is not None else ""
    return f"{token}{text} {count / max(1, total):.1%}"


def sample_text(rows: TokenRows, row: int, tokenizer: TokenizerWrapper | None, style: Style) -> str:
    """One row: its pieces between bounds, what is predicted marked (where not all is), and the padding."""
    first = int(rows.pieces[:row].sum())
    lengths = rows.doc_lengths[first : first + int(rows.pieces[row])].astype(np.int64)
    ends = np.cumsum(lengths)
    parts = []
    for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        mask = None if rows.loss_mask is None else rows.loss_mask[row, start:end]
        parts.append(_piece_text(rows.tokens[row, start:end], mask, tokenizer, style))
    text = style("bound", "│").join(parts)
    padding = rows.tokens.shape[1] - int(lengths.sum())
    return text + style("bound", "│") + (style("padding", f" {padding} padding") if padding else "")


def _piece_text(ids: np.ndarray, mask: np.ndarray | None, tokenizer: TokenizerWrapper | None, style: Style) -> str:
    """The text of a piece, run by run of what is predicted and what is not."""
    cuts = np.zeros(0, np.int64) if mask is None else np.flatnonzero(np.diff(mask)) + 1
    text, start = "", 0
    for run in np.split(ids, cuts):
        words = tokenizer.decode(run.tolist()) if tokenizer is not None else " ".join(map(str, run.tolist()))
        predicted = mask is not None and bool(mask[start])
        text += style("loss", readable(words)) if predicted else readable(words)
        start += len(run)
    return text


def find_tokenizer(found: Description, path: str | None) -> TokenizerWrapper | None:
    """The tokenizer at ``path``, or else ``../../tokenizer`` where it is the one that made the shards.

    Raises:
        UserError: the tokenizer at ``path`` is another.
    """
    from cheapertraining.data.shards import check_compatible
    from cheapertraining.data.tokenization import TokenizerWrapper

    if path is not None:
        tokenizer = TokenizerWrapper(path)
        check_compatible(found.folder, found.meta, seq_len=found.meta.seq_len, tokenizer=tokenizer)
        return tokenizer
    beside = found.folder.resolve().parents[1] / "tokenizer"
    if not (beside / "tokenizer.json").is_file():
        return None
    tokenizer = TokenizerWrapper(beside)
    return tokenizer if tokenizer.fingerprint == found.meta.tokenizer_fingerprint else None


def describe(given: argparse.Namespace) -> int:
    """Print what folders hold, with some rows spread over each."""
    from cheapertraining.data.inspection import describe, read_rows

    style = Style(sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
    for found in describe(given.folder):
        tokenizer = find_tokenizer(found, given.tokenizer)
        for line in describe_text(found, tokenizer):
            print(line)
        count = min(given.samples, found.samples)
        chosen = np.linspace(0, found.samples - 1, count).astype(np.int64).tolist() if count > 0 else []
        rows = read_rows(found.folder, chosen)
        if tokenizer is None and chosen:
            print("  (ids: no tokenizer at ../../tokenizer made these shards; name it with --tokenizer)")
        for number, sample in enumerate(chosen):
            print(f"  sample {sample}: {sample_text(rows, number, tokenizer, style)}")
    return 0


def verify(given: argparse.Namespace) -> int:
    """Print what is wrong, and how much was checked how fast; 1 if anything is."""
    from cheapertraining.data.verification import verify

    wrong = 0
    for folder in given.folders:
        result = verify(folder, workers=given.workers)
        for finding in result.findings:
            print(finding)
        if result.unhashed:
            print(f"{folder}: {result.unhashed} shards have no hash in index.json; only their rows were checked.")
        wrong += len(result.findings)
        print(
            f"{folder}: {'WRONG' if result.findings else 'ok'}: {len(result.findings)} findings in {result.folders} "
            f"folders, {result.shards:,} shards, {result.samples:,} samples; {result.bytes / 1e9:.3f} GB at "
            f"{result.gigabytes_per_second:.2f} GB/s"
        )
    return 1 if wrong else 0


def diff(given: argparse.Namespace) -> int:
    """Print in what two folders differ; 1 if they do."""
    from cheapertraining.data.inspection import diff

    differences = diff(given.a, given.b)
    for difference in differences:
        print(difference)
    if not differences:
        print("no difference")
    return 1 if differences else 0


def merge(given: argparse.Namespace) -> int:
    """Make shard folders of the parts that machines have converted."""
    from cheapertraining.data.conversion import merge_parts

    for split, meta in merge_parts(given.out).items():
        print(f"{split}: {meta.samples:,} samples, {meta.documents:,} documents, {meta.tokens:,} tokens")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do it; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="describe|verify|diff|merge")
    one = commands.add_parser("describe", help="counts, lengths, use of the vocabulary, decoded samples")
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one.add_argument("--samples", type=int, default=3, help="rows to show of each folder (default: %(default)s)")
    one.add_argument("--tokenizer", help="default: FOLDER/../../tokenizer, if it made the shards")
    one.set_defaults(run=describe)
    one = commands.add_parser("verify", help="every file against its hashes, every sample against the schema")
    one.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    one.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: %(default)s)")
    one.set_defaults(run=verify)
    one = commands.add_parser("diff", help="in what two folders differ")
    one.add_argument("a", type=Path, metavar="A")
    one.add_argument("b", type=Path, metavar="B")
    one.set_defaults(run=diff)
    one = commands.add_parser("merge", help="make one source of the parts of convert_*.py --part I/N")
    one.add_argument("out", metavar="OUT", help="folder or address, as given to the conversion")
    one.set_defaults(run=merge)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except UserError as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
