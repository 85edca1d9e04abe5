"""What an evaluation found, for the callbacks that show it."""

from __future__ import annotations

from composer.core import State

__all__ = ["HELDOUT", "evaluated_loss"]

HELDOUT = "heldout/"
"""Label of a source's held-out evaluator: this and the source's name."""

_METRIC = "TokenCrossEntropy"


def evaluated_loss(state: State) -> tuple[str, float] | None:
    """Return label and token cross entropy (nats) of the evaluator that has just ended; None if it measures another.

    Call it on ``Event.EVAL_END`` alone: then the metric has been reduced over the ranks, and asking again is free.
    """
    label = state.dataloader_label
    if label is None or _METRIC not in state.eval_metrics.get(label, {}):
        return None
    return label, float(state.eval_metrics[label][_METRIC].compute())
