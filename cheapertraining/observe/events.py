"""Events that a run counts, and what to do about them: the same words on the console and in the report."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EVENTS", "NONFINITE", "SPIKES", "Event"]


@dataclass(frozen=True)
class Event:
    """A kind of event.

    Attributes:
        what: happened.
        advice: a sentence or two.
    """

    what: str
    advice: str


SPIKES = "event/loss_spikes"
NONFINITE = "event/nonfinite"
"""Metrics that count them."""

EVENTS = {
    SPIKES: Event(
        "loss spike",
        "A single one heals. If the loss stays up or more of them come, go back to a checkpoint from before with a "
        "lower optimizer.lr or algorithms.gradient_clipping.threshold.",
    ),
    NONFINITE: Event(
        "loss or gradient not finite",
        "Weights do not recover from it, but for single steps of amp_fp16, which are skipped: stop, point "
        "checkpoints/latest-rank0.pt at a checkpoint from before, and resume with a lower optimizer.lr.",
    ),
}
