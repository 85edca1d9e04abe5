"""Every number that a run logs: its name, its unit, the panel it belongs to, and what it means.

The same names are in W&B, in ``metrics.jsonl`` and in the local report. A name pattern such as
``loss/train/{source}`` stands for one name a source; ``docs/metrics.md`` is written from this list
(``python -m cheapertraining.observe.vocabulary``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

__all__ = ["GROUPS", "VOCABULARY", "Entry", "find", "markdown", "table"]

When = Literal["always", "cuda", "window", "strategy", "option"]

GROUPS: dict[str, str] = {
    "loss": "Is it learning?",
    "mixture": "On what?",
    "influence": "Why did the mixture move?",
    "distillation": "What does the teacher add?",
    "speed": "What does it cost?",
    "optimization": "Is anything wrong?",
    "progress": "How far is it?",
}
"""Group names and the question that each answers, in the order of dashboards and reports."""

_PLACES = {
    "source": r"[^/]+(?:/[^/]+)*?",
    "probe": r"[^/]+",
    "direction": r"[^/]+",
    "split": r"(?:heldout|probe)/.+",
    "group": r"\d+",
    "optimizer": r"[^/]+",
    "stat": r"\w+",
    "position": r"\d+",
    "what": r".+",
}


@dataclass(frozen=True)
class Entry:
    """One metric, or one for each source, probe, ….

    Attributes:
        pattern: name with places in braces, such as ``mixture/weight/{source}``.
        unit: of the number; "" for plain counts and ratios says so in words.
        group: a key of :data:`GROUPS`.
        description: one sentence.
        when: ``always`` in a run with mixing, console and the usual callbacks; on ``cuda`` alone; once the speed
            monitor's ``window`` of batches is full; with a ``strategy`` that measures it; with the ``option`` that
            the description names.
    """

    pattern: str
    unit: str
    group: str
    description: str
    when: When = "always"

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", self.pattern)
        text = [f"({_PLACES[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)]
        return re.compile("".join(text))

    @property
    def wandb_regex(self) -> str:
        """The pattern as W&B's panels take it (RE2)."""
        parts = re.split(r"\{(\w+)\}", self.pattern)
        return "^" + "".join(".+" if i % 2 else re.escape(part) for i, part in enumerate(parts)) + "$"

    def match(self, name: str) -> tuple[str, ...] | None:
        """What stands in the pattern's places in ``name``; None where it is another metric."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groups()


VOCABULARY: tuple[Entry, ...] = (
    Entry("loss/train/total", "nats/token", "loss", "Training loss of the batch, mean over its tokens."),
    Entry("loss/train/{source}", "nats/token", "loss", "Training loss of a source, mean since the line before."),
    Entry(
        "metrics/{split}/TokenCrossEntropy",
        "nats/token",
        "loss",
        "Loss on a split that is not trained on: `heldout/<source>` or `probe/<name>`.",
    ),
    Entry("mixture/weight/{source}", "share", "mixture", "Newest sampling weight; used after the lag."),
    Entry("mixture/sampled/{source}", "share", "mixture", "Sampling weight that this batch was drawn with."),
    Entry(
        "mixture/objective/{source}",
        "share",
        "mixture",
        "Weight of the source in the training loss: its share of the tokens that this was taken over since the line "
        "before, which padding and masked questions keep from being the sampling weight.",
    ),
    Entry("mixture/share/{source}", "share", "mixture", "Share of all tokens so far that were of the source."),
    Entry("mixture/tokens/{source}", "tokens", "mixture", "Tokens (padding included) seen of the source."),
    Entry("mixture/epochs/{source}", "passes", "mixture", "Passes over the source so far."),
    Entry(
        "mixture/tokens_left/{source}",
        "tokens",
        "mixture",
        "Tokens until the source's `max_epochs` are used up; where it has none, until its present pass ends.",
    ),
    Entry(
        "mixture/score/{direction}/{source}",
        "nats/step size",
        "influence",
        "Influence of a source on a probe: how fast the probe's loss falls along the source's gradient; above 0 helps.",
        "strategy",
    ),
    Entry(
        "mixture/score_se/{direction}/{source}",
        "nats/step size",
        "influence",
        "Standard error of the score.",
        "strategy",
    ),
    Entry("mixture/probe_loss/{probe}", "nats/token", "influence", "Probe loss at a decision.", "strategy"),
    Entry(
        "mixture/probe_weight/{probe}",
        "share",
        "influence",
        "Weight of the probe in what a decision works towards; `grape` and `influence.robust` move it.",
        "strategy",
    ),
    Entry(
        "mixture/gradient_norm2/{source}", "1", "influence", "Squared norm of the source's mean gradient.", "strategy"
    ),
    Entry("mixture/gradient_variance/{source}", "1", "influence", "Variance of one sample's gradient.", "strategy"),
    Entry(
        "fidelity/predicted/{direction}",
        "nats/token",
        "influence",
        "Change of the probe loss that the decision before expected until now (first order).",
        "strategy",
    ),
    Entry(
        "fidelity/realized/{direction}",
        "nats/token",
        "influence",
        "Change of the probe loss that came, on the probe samples of the measurements.",
        "strategy",
    ),
    Entry(
        "influence/score/{probe}/{source}",
        "nats/step size",
        "influence",
        "Mean influence of the trained samples (`algorithms.influence_scores`).",
        "option",
    ),
    Entry(
        "influence/score_se/{probe}/{source}",
        "nats/step size",
        "influence",
        "Its standard error (`algorithms.influence_scores`).",
        "option",
    ),
    Entry(
        "influence/total/{probe}/{source}",
        "nats/token",
        "influence",
        "Sum of influence times learning rate over the run (`algorithms.influence_scores`).",
        "option",
    ),
    Entry(
        "influence/probe_loss/{probe}",
        "nats/token",
        "influence",
        "Probe loss when a direction was made (`algorithms.influence_scores`).",
        "option",
    ),
    Entry(
        "distillation/overhead",
        "share",
        "speed",
        "Wall time of all steps so far that the teacher took: its passes, texts of the student's own, averages of its "
        "weights; not the loss, which stands in place of cross-entropy (`algorithms.distillation`).",
        "option",
    ),
    Entry(
        "distillation/{what}",
        "nats/token",
        "distillation",
        "Divergence, entropy and cross-entropy, in all and by source; `agreement` and `acceptance` are shares, "
        "`alpha`, `temperature` and `weight/<source>` (`source_weights`) plain numbers (`algorithms.distillation`).",
        "option",
    ),
    Entry("throughput/batches_per_sec", "batches/s", "speed", "Over the window, evaluation left out.", "window"),
    Entry("throughput/samples_per_sec", "samples/s", "speed", "Over the window.", "window"),
    Entry("throughput/tokens_per_sec", "tokens/s", "speed", "Over the window, all devices.", "window"),
    Entry("throughput/flops_per_sec", "FLOP/s", "speed", "Over the window, all devices.", "window"),
    Entry("throughput/device/{what}", "1/s", "speed", "The same a device; `mfu` is a share of its peak.", "window"),
    Entry(
        "mixture/overhead",
        "share",
        "speed",
        "Wall time of all steps so far that mixing took (`algorithms.online_mixing`).",
        "option",
    ),
    Entry(
        "influence/overhead",
        "share",
        "speed",
        "Wall time of all steps so far that directions and reading scores took; scoring itself makes training's passes "
        "slower, by what docs/influence.md measures (`algorithms.influence_scores`).",
        "option",
    ),
    Entry("time/data_wait", "share", "speed", "Wall time since the line before spent waiting for batches."),
    Entry("memory/host_peak", "GB", "speed", "Most main memory that the process of rank 0 has held (resident)."),
    Entry("memory/{stat}", "GB or count", "speed", "CUDA's allocator, as Composer's MemoryMonitor names it.", "cuda"),
    Entry("time/train", "hours", "speed", "Wall time spent training."),
    Entry("time/val", "hours", "speed", "Wall time spent evaluating."),
    Entry("time/total", "hours", "speed", "Both."),
    Entry("gradient/norm", "1", "optimization", "Norm of the gradient of all parameters together, before clipping."),
    Entry("weight/norm", "1", "optimization", "Norm of all parameters together."),
    Entry("lr-{optimizer}/group{group}", "1", "optimization", "Learning rate (`callbacks.lr_monitor`)."),
    Entry(
        "event/loss_spikes",
        "count",
        "optimization",
        "Batches so far whose loss stood 6 standard deviations above its moving mean.",
    ),
    Entry("event/nonfinite", "count", "optimization", "Batches so far whose loss or gradient was not finite."),
    Entry("trainer/device_train_microbatch_size", "samples", "optimization", "Rows per forward pass."),
    Entry("time/epoch", "count", "progress", "Composer's epochs; a mixture is endless, so it stays 0."),
    Entry("time/{stat}", "count", "progress", "Batches, samples and tokens so far, in the run and in the epoch."),
)
"""In the order of dashboards and reports; of two patterns that match a name, the first counts."""


def find(name: str) -> Entry | None:
    """The entry of a logged name; None where the vocabulary does not know it."""
    return next((entry for entry in VOCABULARY if entry.match(name) is not None), None)


def table(names: Iterable[str]) -> dict[str, list[str]]:
    """``{pattern: [names]}`` of the names that are known, both in the order of the vocabulary and of ``names``."""
    found: dict[str, list[str]] = {}
    names = list(names)
    by_name = {name: find(name) for name in names}
    for entry in VOCABULARY:
        own = [name for name in names if by_name[name] is entry]
        if own:
            found[entry.pattern] = own
    return found


_WHEN = {
    "always": "always",
    "cuda": "on CUDA",
    "window": "once the speed monitor's window is full",
    "strategy": "with a strategy that measures it",
    "option": "with the option named",
}


def markdown() -> str:
    """The tables of ``docs/metrics.md``, one a group."""
    lines: list[str] = []
    for group, question in GROUPS.items():
        lines += [f"## {group}: {question}", "", "| name | unit | logged | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{entry.pattern.replace('{', '<').replace('}', '>')}` | {entry.unit} | {_WHEN[entry.when]} | "
            f"{entry.description} |"
            for entry in VOCABULARY
            if entry.group == group
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
