"""What a person looks at: the log on disk, lines on the console, the report, the table at the end, an orderly stop.

The callbacks bring Composer with them, so they are loaded when they are first asked for; reading a run's folder and
drawing its report (``run_folder``, ``report``, ``vocabulary``) needs neither Composer nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cheapertraining.observe.console import ConsoleLines, progress_bar_fits
    from cheapertraining.observe.course import MixtureCourse
    from cheapertraining.observe.generations import Generations
    from cheapertraining.observe.health import RunHealth
    from cheapertraining.observe.jsonl import JsonlLogger
    from cheapertraining.observe.pictures import Pictures
    from cheapertraining.observe.stop import GracefulStop
    from cheapertraining.observe.summary import MixtureSummary

__all__ = [
    "ConsoleLines",
    "Generations",
    "GracefulStop",
    "JsonlLogger",
    "MixtureCourse",
    "MixtureSummary",
    "Pictures",
    "RunHealth",
    "progress_bar_fits",
]

_HOME = {
    "ConsoleLines": "console",
    "Generations": "generations",
    "GracefulStop": "stop",
    "JsonlLogger": "jsonl",
    "MixtureCourse": "course",
    "MixtureSummary": "summary",
    "Pictures": "pictures",
    "RunHealth": "health",
    "progress_bar_fits": "console",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
