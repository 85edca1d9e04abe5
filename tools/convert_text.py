"""Documents to token shards: JSON lines, parquet, plain text, folders of code, or a Hugging Face data set.

    python tools/convert_text.py 'raw/wiki-*.jsonl.gz' --tokenizer tokenizers/mine --seq-len 2048 --out shards/wiki \\
        --split-by-hash train:0.98,probe:0.01,heldout:0.01 --workers 8

Makes <out>/<split>/, which a data yaml names as a source. A conversion that was stopped in any way goes on with the
same command and --resume; the shards are the same bytes for any number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.data.conversion import Job
    from cheapertraining.data.conversion.encoders import Encoder


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all conversions have."""
    add = parser.add_argument
    add("inputs", nargs="*", help="files, globs (quoted) or folders")
    add("--dataset", metavar="NAME", help="a data set of the Hugging Face hub, or a folder that it saved to disk")
    add("--dataset-config", metavar="NAME", help="configuration of the data set")
    add("--dataset-split", metavar="NAME", default="train", help="split of the data set (default: %(default)s)")
    add("--tokenizer", required=True, help="folder with tokenizer.json, or a name on the hub")
    add("--seq-len", type=int, required=True, help="tokens in a row: what the model is trained on")
    add("--out", required=True, help="folder or address (s3://…, gs://…, oci://…) of the source")
    add("--work", type=Path, help="folder for what is not finished (default: <out>/.conversion; local for an address)")
    add("--source", help="name of the source (default: the last part of --out)")
    add("--split-by-hash", default="train:1", metavar="NAME:SHARE,…", help="splits by document (default: %(default)s)")
    add("--packing", default="best_fit", metavar="best_fit|concat|pad", help="documents to rows (default: %(default)s)")
    add("--token-dtype", default="auto", metavar="auto|uint16|uint32", help="of the shards (default: %(default)s)")
    add("--compression", metavar="NAME[:LEVEL]", help="of the shards, such as zstd:3 (default: none)")
    add("--hashes", default="xxh64", metavar="NAME,…", help="digests of the shards (default: %(default)s)")
    add("--shard-size", default="64mb", help="of a shard before compression (default: %(default)s)")
    add("--window-tokens", type=int, default=1 << 24, help="tokens packed together, in memory (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides the order of rows (default: %(default)s)")
    add("--license", default="unknown", help="for meta.json")
    add("--origin", default="unknown", help="for meta.json: where the documents come from")
    add("--part", default="1/1", metavar="I/N", help="do part I of N on this machine; then inspect_shards.py merge")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add(
        "--on-error",
        default="fail",
        metavar="fail|skip",
        help="at a bad record: stop, or count it (default: %(default)s)",
    )
    add("--deduplicate", action="store_true", help="keep the first of documents that say the same")
    add("--resume", action="store_true", help="go on with what was begun, or leave alone what is finished")
    add("--dry-run", action="store_true", help="try a few documents and report; write nothing")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of plain documents."""
    parser.add_argument("--text-column", default="text", help="of JSON lines and parquet (default: %(default)s)")
    parser.add_argument(
        "--format", default="auto", metavar="auto|jsonl|parquet|text", help="of the files (default: by their names)"
    )
    parser.add_argument(
        "--text-unit", default="file", metavar="file|line|paragraph", help="a document in text (default: %(default)s)"
    )


def job_of(given: argparse.Namespace, encoder: Encoder) -> Job:
    """The conversion that the options describe."""
    from streaming.base.util import bytes_to_int

    from cheapertraining.data.conversion import Job, Settings
    from cheapertraining.data.conversion.destination import Destination
    from cheapertraining.data.conversion.job import WORK_FOLDER
    from cheapertraining.data.pieces import HubData, list_pieces

    hub = HubData(given.dataset, given.dataset_config, given.dataset_split) if given.dataset else None
    destination = Destination(given.out)
    name = given.source or destination.root.rsplit("/", 1)[-1]
    part = _part(given.part)
    try:
        shard_bytes = bytes_to_int(given.shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size: expected a size such as 64mb, found '{given.shard_size}'.") from error
    settings = Settings(
        source=name,
        seq_len=given.seq_len,
        splits=_splits(given.split_by_hash),
        packing=given.packing,
        token_dtype=given.token_dtype,
        shard_bytes=shard_bytes,
        window_tokens=given.window_tokens,
        compression=given.compression,
        hashes=tuple(name for name in given.hashes.split(",") if name),
        seed=given.seed,
        part=part,
        deduplicate=given.deduplicate,
        license=given.license,
        origin=given.origin,
    )
    place = hashlib.sha256(given.out.encode()).hexdigest()[:8]
    work = given.work or Path(f".conversion-{name}-{place}" if destination.is_remote else Path(given.out, WORK_FOLDER))
    if part[1] > 1 and given.work is None:
        work = work / f"{part[0]:04}-of-{part[1]:04}"
    pieces = tuple(list_pieces(given.inputs, hub, given.format, given.text_unit))
    return Job(settings, encoder, pieces, destination, work)


def run(given: argparse.Namespace, encoder: Encoder) -> None:
    """Do, or try out, what the options describe, and print what came of it."""
    from cheapertraining.data.conversion import convert, try_out

    job = job_of(given, encoder)
    if given.dry_run:
        print(try_out(job))
        return
    report = convert(job, workers=given.workers, resume=given.resume, progress=sys.stderr.isatty())
    print(report)
    if report.metas:
        tokens = sum(meta.tokens for meta in report.metas.values())
        print(f"{tokens / max(report.seconds, 1e-9):,.0f} tokens/s, {report.seconds:.1f} s; shards in {given.out}")


def _splits(text: str) -> tuple[tuple[str, float], ...]:
    try:
        pairs = [item.split(":") for item in text.split(",")]
        return tuple((name.strip(), float(share)) for name, share in pairs)
    except ValueError as error:
        raise UserError(
            f"--split-by-hash: expected NAME:SHARE,… such as train:0.98,probe:0.01,heldout:0.01, found '{text}'."
        ) from error


def _part(text: str) -> tuple[int, int]:
    try:
        number, count = text.split("/")
        return int(number), int(count)
    except ValueError as error:
        raise UserError(f"--part: expected I/N such as 3/8, found '{text}'.") from error


def exit_code(tool: str, work: Callable[[], None]) -> int:
    """Do the work of a command: 0, or 2 on bad input and 130 when interrupted, with a line on standard error."""
    try:
        work()
    except UserError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{tool}: stopped; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert; see :func:`exit_code`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_text_options(parser)
    given = parser.parse_args(arguments)

    def work() -> None:
        from cheapertraining.data.conversion import TextEncoder

        run(given, TextEncoder(given.tokenizer, given.text_column, given.on_error))

    return exit_code("convert_text", work)


if __name__ == "__main__":
    sys.exit(main())
