"""What a mixture would give: tokens and epochs of each source for a number of tokens, before anyone trains.

    python tools/mix_report.py mixed_pretrain --tokens 20_000_000_000 [--weights code=0.3,wiki=0.7] [data.KEY=VALUE …]

Reads the data yaml (a path, or a name in yamls/data) and of its shards only meta.json and index.json, which are
downloaded where the shards are remote. The rows are those that the training plan draws with weights that stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.data.budget import MixtureBudget

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_COLUMNS = (
    "source",
    "weight",
    "tokens a pass",
    "padding",
    "drawn",
    "share",
    "epochs",
    "pass ends",
    "used up",
    "held-out",
)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows under a heading, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def human(number: int | None) -> str:
    """``12_300_000_000`` as ``12.3B``; ``-`` for None."""
    if number is None:
        return "-"
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if number >= unit), (1, ""))
    return f"{number / unit:.3g}{letter}" if number < 999.5 * unit else f"{number / unit:.0f}{letter}"


def report(budget: MixtureBudget) -> str:
    """The budget as text for people."""
    rows = [_COLUMNS]
    for name, source in budget.sources.items():
        cap = "" if source.max_epochs is None else f"/{source.max_epochs:g}"
        rows.append(
            (
                name,
                f"{source.weight:.1%}",
                human(source.tokens),
                f"{source.padding_share:.2%}",
                human(source.drawn_tokens),
                f"{source.share:.1%}",
                f"{source.epochs:.2f}{cap}",
                human(source.first_pass_ends),
                human(source.runs_out),
                f"{source.heldout.rows:,} rows" if source.heldout else "none",
            )
        )
    lines = [
        f"{human(budget.drawn_tokens)} of {human(budget.tokens)} tokens in {budget.batches:,} batches of "
        f"{budget.global_batch_size:,} rows of {budget.seq_len:,}; on_exhaustion: {budget.on_exhaustion}",
        table(rows),
        "pass ends, used up: at which token of the whole mixture. Tokens are without padding.",
    ]
    lines += [
        f"probe {name}: {probe.rows:,} rows, {probe.documents:,} documents, {human(probe.tokens)} tokens"
        for name, probe in budget.probes.items()
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in budget.warnings)])


def _number(text: str) -> int:
    """``20_000_000_000``, ``2e10`` or ``20B``."""
    unit = {letter.lower(): unit for unit, letter in _UNITS}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
        return int(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"--tokens: expected a number such as 20_000_000_000 or 20B, found '{text}'.") from error


def _weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {name.strip(): float(weight) for name, weight in pairs}
    except ValueError as error:
        raise UserError(f"--weights: expected NAME=WEIGHT,… such as code=0.3,wiki=0.7, found '{text}'.") from error


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and report; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA_YAML", help="path of a data yaml, or a name in yamls/data")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="on top of it, such as data.local=shards")
    parser.add_argument("--tokens", required=True, help="the budget: 20_000_000_000, 2e10 or 20B")
    parser.add_argument(
        "--weights", metavar="NAME=WEIGHT,…", help="in place of the yaml's; a source that is not named gets nothing"
    )
    parser.add_argument("--global-batch-size", type=int, default=512, help="rows in a batch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    given = parser.parse_intermixed_args(arguments)
    try:
        from cheapertraining.config import load_data_config

        data = load_data_config(given.data, given.overrides)
        tokens, weights = _number(given.tokens), _weights(given.weights)
        from cheapertraining.data.budget import mixture_budget

        budget = mixture_budget(data, tokens, weights=weights, global_batch_size=given.global_batch_size)
    except UserError as error:
        print(f"mix_report: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(budget), indent=2, ensure_ascii=False) if given.json else report(budget))
    return 0


if __name__ == "__main__":
    sys.exit(main())
