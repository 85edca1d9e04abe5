"""What a person looks at: the log on disk, lines on the console, the table at the end, an orderly stop."""

from cheapertraining.observe.console import ConsoleLines, progress_bar_fits
from cheapertraining.observe.jsonl import JsonlLogger
from cheapertraining.observe.stop import GracefulStop
from cheapertraining.observe.summary import MixtureSummary

__all__ = ["ConsoleLines", "GracefulStop", "JsonlLogger", "MixtureSummary", "progress_bar_fits"]
