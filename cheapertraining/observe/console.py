"""Lines on the console: how training goes and what the mixture is.

    ConsoleLines(mixture=None, interval=10, stream=None)      # Trainer(callbacks=[...])
    progress_bar_fits(stream=None) -> bool                    # Trainer(progress_bar=wanted and progress_bar_fits())

Lines go to standard output, Composer's progress bar to standard error; on a terminal the bar steps aside for a line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from composer.core import Callback, State, Timestamp
from composer.core.time import TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from tqdm.auto import tqdm

from cheapertraining.observe.evaluated import evaluated_loss

if TYPE_CHECKING:
    from cheapertraining.data.mixing import MixedDataset

__all__ = ["ConsoleLines", "mixture_bar", "progress_bar_fits", "say"]

DIM, BOLD = "2", "1"

BAR_WIDTH = 24
# Of the 256 that terminals have: near those of the report.
_BAR_COLOURS = (25, 214, 36, 166, 175, 74, 143, 245, 61, 94, 29, 162)

SHOWN_SOURCES = 8
"""A line names this many sources, the heaviest first, and counts the others."""


class ConsoleLines(Callback):
    """Print a short line every ``interval`` batches, one for each evaluation, and one when the mixture changes visibly.

        batch 120/300  loss 5.213  9.8k tok/s  eta 2m10s  lr 1.0e-03  math 31% wiki 12% code 9% +4 more
        batch 120: mixture from batch 128 on: math 36% (+5) wiki 10% (-2) code 9% +4 more
        batch 120: evaluated  heldout/math 4.812  heldout/wiki 5.907  probe/reasoning 4.790

    Loss is the mean since the line before, tokens per second exclude evaluation, eta does not. A mixture is shown
    once a source has moved by at least half a percentage point since it was last shown. Only rank 0 prints. Colour is
    used on terminals, unless ``NO_COLOR`` is set; there a mixture also has a bar (:func:`mixture_bar`).

    Args:
        mixture: The training data's mixture; without it no mixture is shown.
        interval: Batches between lines. The first and the last batch always have one.
        stream: Where to print; default standard output.
    """

    def __init__(self, mixture: MixedDataset | None = None, interval: int = 10, stream: TextIO | None = None) -> None:
        self.mixture = mixture
        self.interval = interval
        self._stream = stream
        self._losses: list[float] = []
        self._evaluated: dict[str, float] = {}
        self._since = Timestamp()
        self._began = (0.0, 0.0)
        self._first_batch = 1
        self._shown: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        self._since = state.timestamp
        self._began = (time.monotonic(), _done(state))
        self._first_batch = state.timestamp.batch.value + 1
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        start = (
            f"{state.run_name}: {_short(parameters)} parameters, from batch {self._first_batch} to {state.max_duration}"
        )
        if self.mixture is not None:
            self._shown = self.mixture.get_current_weights()
            start += f", {self._paint(_mixture(self._shown), DIM)}"
        self._print(start)

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if dist.get_global_rank() != 0:
            return
        if "loss/train/total" in state.total_loss_dict:
            self._losses.append(state.total_loss_dict["loss/train/total"])
        batch = state.timestamp.batch.value
        if batch % self.interval == 0 or batch == self._first_batch or _done(state) >= 1.0:
            self._print(self._line(state))
            self._losses, self._since = [], state.timestamp
        self._show_change(batch)

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        if (found := evaluated_loss(state)) is not None:
            label, loss = found
            self._evaluated[label] = loss

    def eval_after_all(self, state: State, logger: Logger) -> None:
        del logger
        if self._evaluated:
            values = "  ".join(f"{label} {value:.3f}" for label, value in self._evaluated.items())
            self._print(f"batch {state.timestamp.batch.value}: evaluated  {values}")
        self._evaluated = {}

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self.eval_after_all(state, logger)

    def _line(self, state: State) -> str:
        now = state.timestamp
        assert state.max_duration is not None
        batch = now.batch.value
        parts = [f"batch {batch}/{state.max_duration.value}"]
        if state.max_duration.unit != TimeUnit.BATCH:
            parts = [f"batch {batch} ({_done(state):.0%})"]
        if self._losses:
            parts.append(f"loss {sum(self._losses) / len(self._losses):.3f}")
        seconds = (now.total_wct - self._since.total_wct).total_seconds()
        tokens = now.token.value - self._since.token.value
        if tokens and seconds > 0:
            parts.append(f"{_short(tokens / seconds)} tok/s")
        began, done_then = self._began
        done = _done(state)
        if done > done_then:
            left = (time.monotonic() - began) * max(0.0, 1.0 - done) / (done - done_then)
            parts.append(f"eta {_clock(left)}")
        rates = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
        parts.append(f"lr {rates[0]:.1e}")
        if self.mixture is not None:
            weights = self.mixture.weights_at(batch)
            stream = self._stream or sys.stdout
            if progress_bar_fits(stream):
                parts.append(mixture_bar(weights, coloured=_colours(stream)))
            parts.append(self._paint(_mixture(weights), DIM))
        return "  ".join(parts)

    def _show_change(self, batch: int) -> None:
        if self.mixture is None:
            return
        newest = self.mixture.get_current_weights()
        if any(abs(weight - self._shown.get(name, 0.0)) >= 0.005 for name, weight in newest.items()):
            start = self.mixture.ledger[-1][0]
            change = self._paint(_mixture(newest, self._shown), BOLD)
            self._print(f"batch {batch}: mixture from batch {start} on: {change}")
            self._shown = newest

    def _print(self, line: str) -> None:
        if dist.get_global_rank() == 0:
            say(line, self._stream)

    def _paint(self, text: str, style: str) -> str:
        return f"\033[{style}m{text}\033[0m" if _colours(self._stream or sys.stdout) else text


def mixture_bar(weights: Mapping[str, float], *, coloured: bool, width: int = BAR_WIDTH) -> str:
    """A mixture as ``width`` cells, the sources in their order: a colour for each, or its first letter.

    Cells are shared out by largest remainder, so a source may have none.
    """
    whole = sum(weights.values())
    exact = {name: width * weight / whole for name, weight in weights.items()}
    cells = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: cells[name] - exact[name])[: width - sum(cells.values())]:
        cells[name] += 1
    if not coloured:
        return "[" + "".join((name[:1] or "?") * count for name, count in cells.items()) + "]"
    colours = {name: _BAR_COLOURS[place % len(_BAR_COLOURS)] for place, name in enumerate(cells)}
    return "".join(f"\033[48;5;{colours[name]}m{' ' * count}" for name, count in cells.items() if count) + "\033[0m"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print above any progress bar, to ``stream`` (standard output), at once even where that is a file or a pipe."""
    stream = stream or sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()


def progress_bar_fits(stream: TextIO | None = None) -> bool:
    """Whether ``stream`` (standard error) is a terminal, where a progress bar can redraw itself."""
    stream = stream or sys.stderr
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _colours(stream: TextIO) -> bool:
    return progress_bar_fits(stream) and not os.environ.get("NO_COLOR")


def _done(state: State) -> float:
    """Return the part of the run that is done, 0 to 1."""
    elapsed = state.get_elapsed_duration()
    return 0.0 if elapsed is None else float(elapsed)


def _mixture(weights: Mapping[str, float], before: Mapping[str, float] | None = None) -> str:
    """Return ``math 36% (+5) wiki 10% +4 more``: weights in percent and, given those before, what changed in points."""
    heaviest = sorted(weights, key=lambda name: (-weights[name], name))
    parts = []
    for name in heaviest[:SHOWN_SOURCES]:
        change = round(100 * (weights[name] - before.get(name, 0.0))) if before is not None else 0
        parts.append(f"{name} {weights[name]:.0%}" + (f" ({change:+d})" if change else ""))
    hidden = len(heaviest) - SHOWN_SOURCES
    return " ".join(parts) + (f" +{hidden} more" if hidden > 0 else "")


def _short(number: float) -> str:
    """Return a count in at most four characters and a unit: ``950``, ``9.8k``, ``1.8M``, ``140M``, ``6.7G``."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if number >= 99.5 or unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}T"


def _clock(seconds: float) -> str:
    """Return a duration such as ``45s``, ``2m10s``, ``3h05m``, ``2d04h``."""
    whole = round(seconds)
    for big, small, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            part = (whole % size) // {"d": 3600, "h": 60, "m": 1}[big]
            return f"{whole // size}{big}{part:02d}{small}"
    return f"{whole}s"
