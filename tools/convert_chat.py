"""Conversations to token shards with a loss mask, so that only the assistant's turns are trained.

    python tools/convert_chat.py 'raw/chats-*.jsonl.gz' --tokenizer tokenizers/mine --seq-len 2048 --out shards/chats \\
        --split-by-hash train:0.98,heldout:0.02 --workers 8 --on-error skip

A record has messages (role: system, user, assistant, tool; content), or prompt and response, or instruction, output
and perhaps input. They are rendered with the tokenizer's own chat template, with --chat-template, or with ChatML where
there is neither. All else is as in convert_text.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cheapertraining.errors import UserError
from tools.convert_text import add_options, exit_code, run


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert; see :func:`~tools.convert_text.exit_code`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template in place of the tokenizer's own"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="longer conversations are bad records (default: --seq-len)"
    )
    parser.add_argument(
        "--format", default="auto", metavar="auto|jsonl|parquet", help="of the files (default: by their names)"
    )
    parser.set_defaults(text_unit="file")
    given = parser.parse_args(arguments)

    def work() -> None:
        from cheapertraining.data.conversion import ChatEncoder

        template = None if given.chat_template is None else _read(given.chat_template)
        length = given.seq_len if given.max_length is None else given.max_length
        run(given, ChatEncoder.of(given.tokenizer, template, length, given.on_error))

    return exit_code("convert_chat", work)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template: expected a text file with a Jinja template, cannot read {file}.") from error


if __name__ == "__main__":
    sys.exit(main())
