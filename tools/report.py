"""The report of a run, or of several side by side, as one HTML file that needs no network.

    python tools/report.py runs/mine                     writes runs/mine/report.html
    python tools/report.py runs/a runs/b --out ab.html   loss over tokens and over cost, mixtures, settings

A run writes its own report when it ends; this draws it while the run goes on, after a kill, or on another machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cheapertraining.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and draw; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/mine")
    parser.add_argument(
        "--out", type=Path, help="default: report.html in the run's folder; of several, comparison.html"
    )
    given = parser.parse_args(arguments)
    try:
        from cheapertraining.observe.comparison import comparison
        from cheapertraining.observe.report import report, write_report
        from cheapertraining.observe.run_folder import read_run

        runs = [read_run(run) for run in given.runs]
        if len(runs) == 1 and given.out is None:
            path = write_report(given.runs[0])
        else:
            path = given.out or Path("comparison.html")
            path.write_text(report(runs[0]) if len(runs) == 1 else comparison(runs), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
