"""Several runs side by side: loss over tokens and over cost, end mixtures, and what their settings differ in.

comparison([read_run("runs/a"), read_run("runs/b")]) -> str     # a page, as report.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cheapertraining.errors import UserError
from cheapertraining.observe import charts
from cheapertraining.observe.page import Block, figure, page, paragraph, rows
from cheapertraining.observe.run_folder import Array, RunFolder, Series

__all__ = ["comparison", "differences"]

_EVALUATED = "metrics/{split}/TokenCrossEntropy"
_NATS = "nats / token"
_OverX = Callable[[RunFolder, Series], "Array | None"]


def comparison(runs: Sequence[RunFolder]) -> str:
    """The page of several runs.

    Raises:
        UserError: fewer than two, or two of one name.
    """
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise UserError(f"comparison: expected at least two runs, found {len(runs)}.")
    if len(set(names)) < len(names):
        raise UserError(f"comparison: expected runs of different names, found {', '.join(names)}.")
    return page(
        " · ".join(names),
        f"{len(runs)} runs",
        {
            "Summary": _summary(runs),
            "Loss over tokens": _losses(runs, "tokens", lambda run, series: run.tokens_at(series.steps)),
            "Loss over cost": _over_cost(runs),
            "Mixture": _mixtures(runs),
            "Settings": _settings(runs),
        },
    )


def _summary(runs: Sequence[RunFolder]) -> list[Block]:
    blocks = [paragraph(f"{run.name}: {note}", "warning") for run in runs for note in run.notes]
    labels = list(dict.fromkeys(label for run in runs for label in run.by_place(_EVALUATED)))
    body = [
        ["tokens", *[_last(run.metrics.get("time/token"), ",.0f") for run in runs]],
        ["hours of training", *[_last(run.metrics.get("time/train"), ".3f") for run in runs]],
        ["training loss", *[_last(run.metrics.get("loss/train/total"), ".3f") for run in runs]],
    ]
    body += [[label, *[_last(run.by_place(_EVALUATED).get(label), ".3f") for run in runs]] for label in labels]
    blocks.append(rows(["at the end", *[run.name for run in runs]], body))
    return blocks


def _over_cost(runs: Sequence[RunFolder]) -> list[Block]:
    note = (
        "Cost is wall time spent training, what algorithms measure on the side included and evaluation left out. "
        "Runs on different machines, or on a machine that others used too, are not comparable by it."
    )
    return [paragraph(note), *_losses(runs, "hours", lambda run, series: run.hours_at(series.steps))]


def _losses(runs: Sequence[RunFolder], unit: str, place: _OverX) -> list[Block]:
    labels = list(dict.fromkeys(label for run in runs for label in run.by_place(_EVALUATED)))
    wanted: list[tuple[str, list[Series | None]]] = [
        ("Training loss", [run.metrics.get("loss/train/total") for run in runs]),
        ("Held-out loss, mean over the sources", [_mean(run) for run in runs]),
    ]
    wanted += [(f"Loss on {label}", [run.by_place(_EVALUATED).get(label) for run in runs]) for label in labels]
    blocks = []
    for title, series in wanted:
        traces = []
        for index, (run, own) in enumerate(zip(runs, series, strict=True)):
            at = None if own is None else place(run, own)
            if own is None or at is None:
                continue
            xs, ys = charts.thin(at, own.values)
            traces.append({"x": xs, "y": ys, "name": run.name, "line": {"color": charts.colour(index)}})
        blocks.append(figure(charts.lines(title, traces, _NATS, unit), f"{title}: none of the runs has logged it."))
    return blocks


def _mean(run: RunFolder) -> Series | None:
    """Held-out loss, mean over the sources, where all were evaluated at the same batches."""
    own = [series for label, series in run.by_place(_EVALUATED).items() if label.startswith("heldout/")]
    if not own or any(len(series.steps) != len(own[0].steps) for series in own):
        return None
    return Series(own[0].steps, np.mean([series.values for series in own], axis=0))


def _mixtures(runs: Sequence[RunFolder]) -> list[Block]:
    blocks = []
    for run in runs:
        weights = run.by_place("mixture/sampled/{source}")
        blocks.append(figure(charts.area(run, run.name, weights, run.sources), f"{run.name}: no mixture was logged."))
    return blocks


def _settings(runs: Sequence[RunFolder]) -> list[Block]:
    changed = differences([run.config for run in runs])
    if not changed:
        return [paragraph("The settings of the runs are the same, or not known.")]
    return [
        rows(["setting", *[run.name for run in runs]], [[key, *values] for key, values in changed.items()], texts=True)
    ]


def differences(configs: Sequence[str]) -> dict[str, list[str]]:
    """Dotted keys of yaml texts whose values are not the same in all, with the values.

    Texts that are empty, torn or no mapping know nothing.
    """
    flat = [_flat(_parsed(text)) for text in configs]
    keys = dict.fromkeys(key for each in flat for key in each)
    table = {key: [str(each.get(key, "")) for each in flat] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _parsed(text: str) -> Any:
    from omegaconf import OmegaConf

    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except Exception:  # of its parser, its nodes or its own checks: a torn text is no settings, whatever is said of it
        return {}
    return found if isinstance(found, Mapping) else {}


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    if isinstance(node, Mapping) and node:
        found: dict[str, Any] = {}
        for name, inner in node.items():
            found |= _flat(inner, f"{key}.{name}" if key else str(name))
        return found
    return {key: node} if key else {}


def _last(series: Series | None, form: str) -> str:
    return "" if series is None or not np.isfinite(series.last) else format(series.last, form)
