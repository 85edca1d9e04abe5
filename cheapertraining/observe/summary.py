"""The table at the end: what the mixture became, what was seen of each source, and what it did to held-out loss.

MixtureSummary(mixture, folder=None, stream=None)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from cheapertraining.observe.console import say
from cheapertraining.observe.evaluated import HELDOUT, evaluated_loss

if TYPE_CHECKING:
    from cheapertraining.data.mixing import MixedDataset

__all__ = ["MixtureSummary"]


class MixtureSummary(Callback):
    """Print a table when training has ended, and write it to ``<folder>/summary.json``.

    An evaluator labelled ``heldout/<source>`` fills that source's held-out loss; every other evaluator
    (``probe/<name>``) has a row of its own below. The loss before is that of a label's first evaluation in the whole
    run, the loss after that of its last; both, and the first weights, are kept in the checkpoint. Rank 0 prints and
    writes.

    ``summary.json``: ``{"run_name", "batches", "tokens", "sources": {name: {"weight_start", "weight_end", "tokens",
    "epochs", "loss_before", "loss_after"}}, "evaluations": {label: {"loss_before", "before_batch", "loss_after",
    "after_batch"}}}``; losses are null where nothing was evaluated.

    Args:
        mixture: The training data's mixture; without it only evaluations are reported.
        folder: The run's folder, ``{run_name}`` in it is replaced; None writes no file.
        stream: Where to print; default standard output.
    """

    def __init__(
        self, mixture: MixedDataset | None, folder: str | Path | None = None, stream: TextIO | None = None
    ) -> None:
        self.mixture = mixture
        self.folder = None if folder is None else str(folder)
        self._stream = stream
        self._first_weights: dict[str, float] | None = None
        self._first: dict[str, tuple[int, float]] = {}
        self._last: dict[str, tuple[int, float]] = {}
        self._due = False

    def state_dict(self) -> dict[str, Any]:
        return {"first_weights": self._first_weights, "first": dict(self._first), "last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first_weights = state["first_weights"]
        # An evaluation before loading measured fresh weights, which this run never trained on.
        self._first = {label: (int(batch), float(value)) for label, (batch, value) in state["first"].items()}
        self._last = {label: (int(batch), float(value)) for label, (batch, value) in state["last"].items()}

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        self._due = False
        if self._first_weights is None and self.mixture is not None:
            self._first_weights = self.mixture.weights_at(state.timestamp.batch.value)

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        if (found := evaluated_loss(state)) is not None:
            label, loss = found
            self._first.setdefault(label, (state.timestamp.batch.value, loss))
            self._last[label] = (state.timestamp.batch.value, loss)

    def fit_end(self, state: State, logger: Logger) -> None:
        del logger
        # Composer evaluates for the last time after this event, unless it has just done so.
        self._due = True
        here = state.timestamp.batch.value
        if all(self._last.get(evaluator.label, (-1, 0.0))[0] == here for evaluator in state.evaluators):
            self._report(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        del logger
        if self._due:
            self._report(state)

    def close(self, state: State, logger: Logger) -> None:
        del logger
        if self._due:
            self._report(state)

    def _report(self, state: State) -> None:
        self._due = False
        if dist.get_global_rank() != 0:
            return
        summary = self._summary(state)
        say(f"\n{_table(summary)}\n", self._stream)
        if self.folder is not None:
            folder = Path(format_name_with_dist(self.folder, state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def _summary(self, state: State) -> dict[str, Any]:
        evaluations = {
            label: {
                "loss_before": self._first[label][1],
                "before_batch": self._first[label][0],
                "loss_after": value,
                "after_batch": batch,
            }
            for label, (batch, value) in self._last.items()
        }
        sources: dict[str, Any] = {}
        if self.mixture is not None:
            counts, weights = self.mixture.counts(), self.mixture.get_current_weights()
            for index, name in enumerate(self.mixture.source_names):
                heldout = evaluations.get(HELDOUT + name, {})
                sources[name] = {
                    "weight_start": (self._first_weights or {}).get(name, 0.0),
                    "weight_end": weights.get(name, 0.0),
                    "tokens": int(counts.tokens[index]),
                    "epochs": float(counts.epochs[index]),
                    "loss_before": heldout.get("loss_before"),
                    "loss_after": heldout.get("loss_after"),
                }
        return {
            "run_name": state.run_name,
            "batches": state.timestamp.batch.value,
            "tokens": state.timestamp.token.value,
            "sources": sources,
            "evaluations": evaluations,
        }


def _table(summary: dict[str, Any]) -> str:
    """Return the summary as aligned plain text."""
    rows = [("source", "weight", "tokens", "epochs", "held-out loss")]
    for name, row in summary["sources"].items():
        weights = f"{row['weight_start']:.1%} -> {row['weight_end']:5.1%}"
        rows.append((name, weights, f"{row['tokens']:,}", f"{row['epochs']:.2f}", _losses(row)))
    for label, row in summary["evaluations"].items():
        if label.removeprefix(HELDOUT) not in summary["sources"]:
            rows.append((label, "", "", "", _losses(row)))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [f"{summary['run_name']}: {summary['batches']} batches, {summary['tokens']:,} tokens"]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _losses(row: dict[str, Any]) -> str:
    before, after = row["loss_before"], row["loss_after"]
    return "" if before is None or after is None else f"{before:.3f} -> {after:.3f} ({after - before:+.3f})"
