"""The mixture that one run found, as the schedule of another run, by source name.

    python tools/replay_mixture.py runs/small --for mixed_pretrain max_duration=5000ba run_name=big -o big.yaml
    composer train.py big.yaml
    python tools/replay_mixture.py runs/small --length 5000ba -o schedule.yaml    (the section alone, to paste)

Reads what the old run left in its folder: mixture.jsonl (absent: the mixture never changed), and summary.json or
config.yaml for its first weights and its length. A change at 30 % of the old run comes at 30 % of the new one; `--mean`
holds the mean over the old run instead, as DoReMi does. A source that has another name in the new run needs
`--rename OLD=NEW`, one that is in only one of them `--drop NAME`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.config import RunConfig
    from cheapertraining.mixing.replay import Change

_SUMMARY, _CONFIG = "summary.json", "config.yaml"


@dataclass(frozen=True)
class Replayed:
    """An old run: the changes of its mixture and its length in batches."""

    folder: Path
    changes: list[Change]
    batches: int


def read_run(path: Path) -> Replayed:
    """The run that a folder, or a file in it (ledger, checkpoint), belongs to.

    Raises:
        UserError: nothing of a run is there, or it cannot be read.
    """
    from cheapertraining.mixing.replay import LEDGER, changes_of, read_ledger

    around = [path, *path.resolve().parents[:2]]
    folder = next((place for place in around if any((place / name).is_file() for name in (_SUMMARY, _CONFIG))), None)
    if folder is None:
        raise UserError(
            f"{path}: expected the folder of a run or a file in it, found no {_SUMMARY} and no {_CONFIG} there, which "
            "say what it began with and how long it is."
        )
    first, batches = _beginning(folder)
    ledger = path if path.suffix == ".jsonl" else folder / LEDGER
    if path.suffix == ".jsonl" and not path.is_file():
        raise UserError(f"{path}: no such file.")
    return Replayed(folder, changes_of(read_ledger(ledger) if ledger.is_file() else [], first, batches), batches)


def _beginning(folder: Path) -> tuple[dict[str, float], int]:
    """First weights and length in batches, as trained (summary) or as planned (config)."""
    from cheapertraining.config import load_run_config

    if (folder / _SUMMARY).is_file():
        try:
            summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
            first = {name: float(row["weight_start"]) for name, row in summary["sources"].items()}
            return first, int(summary["batches"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _SUMMARY}: not the summary of a run ({error}).") from error
    config = load_run_config(folder / _CONFIG)
    return {name: source.weight for name, source in config.data.sources.items()}, _planned_batches(config)


def _planned_batches(config: RunConfig) -> int:
    from cheapertraining.config import planned_tokens

    return max(1, planned_tokens(config) // (config.train_loader.global_batch_size * config.data.seq_len))


def _length(text: str) -> tuple[int, str]:
    """``5000ba`` or ``2_000_000tok`` as a number and the unit of a schedule."""
    from cheapertraining.config import split_duration

    try:
        value, unit = split_duration(text)
        return int(value), {"ba": "batch", "tok": "tokens"}[unit]
    except (ValueError, KeyError):
        raise UserError(f"--length: expected batches or tokens such as 5000ba or 2e9tok, found '{text}'.") from None


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    if not all(old and new for old, _, new in pairs):
        raise UserError(f"--rename: expected OLD=NEW, found {' '.join(given)}.")
    return {old: new for old, _, new in pairs}


def section(points: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``algorithms.online_mixing`` has to say to follow ``points`` and nothing else."""
    return {
        "strategy": "schedule",
        "interval": "1ba",
        "warmup": "0ba",
        "constraints": {"floor": 0.0, "ceiling": 1.0, "kl_step": None, "kl_prior": None},
        "schedule": {"points": points},
    }


def _run_yaml(config: RunConfig, points: list[dict[str, Any]]) -> str:
    """The whole new run, its repetition caps kept."""
    from cheapertraining.config import (
        ConstraintsConfig,
        OnlineMixingConfig,
        ScheduleConfig,
        SchedulePointConfig,
        resolved_yaml,
    )

    before = config.algorithms.online_mixing
    own = section(points)
    mixing = OnlineMixingConfig(
        strategy="schedule",
        interval=own["interval"],
        warmup=own["warmup"],
        constraints=ConstraintsConfig(
            **own["constraints"], max_epochs=None if before is None else before.constraints.max_epochs
        ),
        schedule=ScheduleConfig([SchedulePointConfig(**point) for point in points]),
    )
    return resolved_yaml(replace(config, algorithms=replace(config.algorithms, online_mixing=mixing)))


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def replay(given: argparse.Namespace) -> None:
    """Read, rename, stretch, write."""
    from cheapertraining.config import load_run_config
    from cheapertraining.mixing.replay import rename_sources, replay_points

    old = read_run(given.run)
    target = None if given.target is None else load_run_config(given.target[0], given.target[1:])
    if target is not None:
        length, unit = _planned_batches(target), "batch"
    else:
        length, unit = (old.batches, "batch") if given.length is None else _length(given.length)
    sources = None if target is None else tuple(target.data.sources)
    changes = rename_sources(old.changes, rename=_pairs(given.rename), drop=given.drop, sources=sources)
    points = replay_points(changes, old.batches, length, unit=unit, mean=given.mean)
    what = "the mean" if given.mean else f"{len(changes) - 1} changes"
    comment = f"# The mixture of {old.folder.name} ({what} over {old.batches} batches), for {length} {unit}.\n"
    if target is not None:
        _write(comment + _run_yaml(target, points), given.out)
    else:
        from omegaconf import OmegaConf

        _write(comment + OmegaConf.to_yaml({"algorithms": {"online_mixing": section(points)}}), given.out)
    if given.out is not None:
        print(f"written: {given.out}: {len(points)} points")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the old run, or its ledger or a checkpoint in it")
    parser.add_argument(
        "--for",
        dest="target",
        nargs="+",
        metavar=("RUN_YAML", "KEY=VALUE"),
        help="the new run, path or name, and what is on top of it: written whole, its length and sources respected",
    )
    parser.add_argument("--length", help="of the new run without --for: 5000ba or 2000000tok (default: the old one's)")
    parser.add_argument("--mean", action="store_true", help="the mean weights of the old run, from the first batch on")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="again for more")
    parser.add_argument("--drop", action="append", default=[], metavar="NAME", help="again for more")
    parser.add_argument("-o", "--out", type=Path, help="yaml to write (default: printed)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do it; 2 on bad input."""
    given = _parser().parse_args(arguments)
    try:
        replay(given)
    except UserError as error:
        print(f"replay_mixture: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
