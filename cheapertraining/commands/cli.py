"""`cheapertraining COMMAND …`: doctor, train, convert, inspect, report, completion."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from cheapertraining.errors import UserError, nearest

__all__ = ["build_parser", "main"]

_DESCRIPTION = """\
Pre-training on a mixture of sources that adapts to a target while it trains.

  cheapertraining doctor                                  is this machine fit for it?
  cheapertraining convert text 'my/*.txt' --out shards/my --tokenizer data/sample/tokenizer --seq-len 128
  cheapertraining inspect describe shards/my              what is in the shards
  cheapertraining train yamls/mixed_pretrain.yaml max_duration=50ba
  cheapertraining train -n 2 yamls/mixed_pretrain.yaml    the same in two processes
  cheapertraining report runs/NAME                        one HTML file; of several runs: side by side

COMMAND --help tells more about each."""

_COMMANDS = {
    "doctor": "look at this machine: versions, processors, memory, disk, keys; say what to do about faults",
    "train": "train what a yaml describes (train.py)",
    "convert": "make token shards: `convert text`, `convert chat` (tools/convert_*.py)",
    "inspect": "describe, verify, compare or join shards (tools/inspect_shards.py)",
    "report": "draw the report of a run, or of several side by side (tools/report.py)",
    "completion": "print a completion script for bash, zsh or tcsh",
}
_CONVERSIONS = {"text": "convert_text", "chat": "convert_chat"}
_TOOLS = {"inspect": "inspect_shards", "report": "report"}


def build_parser() -> argparse.ArgumentParser:
    """The parser, for `--help` and for completion; what stands behind a command is read by the tool itself."""
    parser = argparse.ArgumentParser(
        prog="cheapertraining", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in _COMMANDS.items()}
    made["train"].add_argument("-n", "--processes", type=int, default=1, help="processes on this machine")
    _complete_files(made["train"].add_argument("run", metavar="RUN.yaml"))
    made["train"].add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    made["convert"].add_argument("kind", choices=list(_CONVERSIONS))
    _complete_files(made["convert"].add_argument("arguments", nargs="*"))
    made["inspect"].add_argument("action", choices=["describe", "verify", "diff", "merge"])
    _complete_files(made["inspect"].add_argument("folders", nargs="*"))
    _complete_files(made["report"].add_argument("runs", nargs="+", metavar="RUN"))
    made["completion"].add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 2 on bad input, 1 where nobody reads the output to its end (``… | head``)."""
    try:
        code = _answer(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's end would try once more
        return 1
    return code


def _answer(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        build_parser().print_help()
        return 0 if given else 2
    command, rest = given[0], given[1:]
    try:
        if command not in _COMMANDS:
            names = ", ".join(_COMMANDS)
            raise UserError(f"'{command}': expected one of {names}.{nearest(command, _COMMANDS)}")
        return _run(command, rest)
    except UserError as error:
        print(f"cheapertraining: {error}", file=sys.stderr)
        return 2


def _run(command: str, rest: list[str]) -> int:
    if command == "doctor":
        from cheapertraining.observe import doctor

        return doctor.main(rest)
    if command == "train":
        return _train(rest)
    if command == "completion":
        return _completion(rest)
    if command == "convert":
        if not rest or rest[0] not in _CONVERSIONS:
            found = f"found '{rest[0]}'" if rest else "found nothing"
            raise UserError(
                f"convert: expected {' or '.join(_CONVERSIONS)}, {found}. `convert text --help` tells more."
            )
        return _tool(_CONVERSIONS[rest[0]], f"convert {rest[0]}", rest[1:])
    return _tool(_TOOLS[command], command, rest)


def _train(rest: list[str]) -> int:
    """One process: here. Several: by Composer's launcher, which gives this process's place to it."""
    if rest[:1] not in (["-n"], ["--processes"]):
        from cheapertraining.commands.train import main as train

        return train(rest)
    if len(rest) < 2 or not rest[1].isdigit() or int(rest[1]) < 1:
        raise UserError(f"train {rest[0]}: expected a number of processes, found '{' '.join(rest[1:2])}'.")
    launcher = [sys.executable, "-m", "composer.cli", "-n", rest[1]]
    command = [*launcher, "-m", "cheapertraining.commands.train", *rest[2:]]
    sys.stdout.flush()
    return os.execv(command[0], command)


def _tool(module: str, shown: str, arguments: list[str]) -> int:
    """Run a tool as if from the command line."""
    package = Path(__file__).resolve().parents[1]
    homes = [home for home in (package / "scripts", package.parent) if (home / "tools" / f"{module}.py").is_file()]
    if not homes:
        raise UserError(f"tools/{module}.py is not beside the package. Install the wheel again, or use a checkout.")
    sys.path.insert(0, str(homes[0]))
    before = sys.argv
    sys.argv = [f"cheapertraining {shown}", *arguments]
    try:
        code = import_module(f"tools.{module}").main(arguments)
    finally:
        sys.argv = before
        sys.path.remove(str(homes[0]))
    return int(code)


def _completion(rest: list[str]) -> int:
    if len(rest) != 1 or rest[0] not in ("bash", "zsh", "tcsh"):
        raise UserError(
            "completion: expected bash, zsh or tcsh. For bash: "
            "cheapertraining completion bash > ~/.local/share/bash-completion/completions/cheapertraining"
        )
    import shtab

    print(shtab.complete(build_parser(), rest[0]))
    return 0


def _complete_files(argument: argparse.Action) -> None:
    # What shtab looks for; its own constant, so that `--help` does not need it.
    argument.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
