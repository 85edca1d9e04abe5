"""The report of one run, ``report.html``, and of several side by side.

    write_report("runs/mine")                       # runs/mine/report.html
    comparison([read_run(a), read_run(b)]) -> str   # a page

Neither Composer nor torch is needed, so a report can be drawn while the run goes on, or elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cheapertraining.observe import charts
from cheapertraining.observe.events import EVENTS
from cheapertraining.observe.page import Block, figure, page, paragraph, preformatted, rows
from cheapertraining.observe.run_folder import RunFolder, Series, read_run

__all__ = ["report", "write_report"]

_HELDOUT = "heldout/"
_NATS = "nats / token"


def write_report(folder: str | Path) -> Path:
    """Draw the report of the run in ``folder``, whole or not at all, and return its path.

    Raises:
        UserError: as :func:`~cheapertraining.observe.run_folder.read_run`.
        OSError: it cannot be written.
    """
    run = read_run(folder)
    path = run.path / "report.html"
    unfinished = path.with_name(".report.html.unfinished")
    unfinished.write_text(report(run), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def report(run: RunFolder) -> str:
    """The page of one run."""
    return page(
        run.name,
        _headline(run),
        {
            "Summary": _summary(run),
            "Loss": _losses(run),
            "Mixture": _mixture(run),
            "Influence": _influence(run),
            "Distillation": _distillation(run),
            "Speed": _speed(run),
            "Health": _health(run),
            "Events": _events(run),
            "Ledger": _ledger(run),
            "Config": [preformatted(run.config)] if run.config else [],
            "Environment": [rows(["what", "found"], list(run.environment.items()), texts=True)]
            if run.environment
            else [],
        },
    )


def _headline(run: RunFolder) -> str:
    steps = max(float(series.steps[-1]) for series in run.metrics.values())
    parts = [f"{steps:,.0f} batches"]
    if (tokens := run.metrics.get("time/token")) is not None:
        parts.append(f"{tokens.last:,.0f} tokens")
    if (hours := run.metrics.get("time/total")) is not None:
        parts.append(f"{hours.last * 60:.1f} minutes" if hours.last < 2 else f"{hours.last:.1f} hours")
    if (loss := run.metrics.get("loss/train/total")) is not None:
        parts.append(f"training loss {np.nanmean(loss.values[-10:]):.3f}")
    return " · ".join(parts)


def _summary(run: RunFolder) -> list[Block]:
    blocks = [paragraph(note, "warning") for note in run.notes]
    body = list(_summary_rows(run))
    if body:
        head = ["source", "weight at start", "at end", "tokens", "epochs", "held-out loss before", "after", "change"]
        blocks.append(rows(head, body))
    blocks.append(figure(_one(run, "Training loss", "loss/train/total", _NATS), "No training loss was logged."))
    return blocks


def _summary_rows(run: RunFolder) -> Iterator[list[str]]:
    """A row a source, then one for each evaluation that is of no source; from the log where no summary is there yet."""
    evaluated = run.by_place("metrics/{split}/TokenCrossEntropy")
    weights, tokens = run.by_place("mixture/weight/{source}"), run.by_place("mixture/tokens/{source}")
    epochs = run.by_place("mixture/epochs/{source}")
    told: Mapping[str, Any] = (run.summary or {}).get("sources", {})
    for name in run.sources:
        own = told.get(name, {})
        start = own.get("weight_start", _first(weights.get(name)))
        end = own.get("weight_end", _last(weights.get(name)))
        yield [
            name,
            _text(start, ".1%"),
            _text(end, ".1%"),
            _text(own.get("tokens", _last(tokens.get(name))), ",.0f"),
            _text(own.get("epochs", _last(epochs.get(name))), ".2f"),
            *_before_after(evaluated.get(_HELDOUT + name)),
        ]
    for label, series in evaluated.items():
        if label.removeprefix(_HELDOUT) not in run.sources:
            yield [label, "", "", "", "", *_before_after(series)]


def _losses(run: RunFolder) -> list[Block]:
    evaluated = run.by_place("metrics/{split}/TokenCrossEntropy")
    heldout = {name.removeprefix(_HELDOUT): s for name, s in evaluated.items() if name.startswith(_HELDOUT)}
    probes = {name: s for name, s in evaluated.items() if not name.startswith(_HELDOUT)}
    by_source = {name: s for name, s in run.by_place("loss/train/{source}").items() if name != "total"}
    return [
        figure(
            charts.run_lines(run, "Training loss by source", by_source, _NATS, run.sources),
            "No loss by source was logged.",
        ),
        figure(
            charts.run_lines(run, "Held-out loss by source", heldout, _NATS, run.sources), "No held-out evaluation."
        ),
        figure(charts.run_lines(run, "Loss on the probes", probes, _NATS, showlegend=True), "No evaluation of probes."),
    ]


def _mixture(run: RunFolder) -> list[Block]:
    order = run.sources
    missing = "The mixture was not logged."
    weights, share = run.by_place("mixture/sampled/{source}"), run.by_place("mixture/share/{source}")
    objective = run.by_place("mixture/objective/{source}")
    epochs, left = run.by_place("mixture/epochs/{source}"), run.by_place("mixture/tokens_left/{source}")
    return [
        figure(charts.area(run, "What batches are drawn with", weights, order), missing),
        figure(charts.area(run, "Share of all tokens so far", share, order), missing),
        *([figure(charts.area(run, "Weights in the training loss", objective, order), "")] if objective else []),
        figure(charts.run_lines(run, "Passes over each source", epochs, "passes", order), missing),
        figure(charts.run_lines(run, "Tokens left of each source", left, "tokens", order), missing),
    ]


def _influence(run: RunFolder) -> list[Block]:
    blocks: list[Block] = []
    for title, score, error in (
        ("of decisions", "mixture/score/{direction}/{source}", "mixture/score_se/{direction}/{source}"),
        ("of trained samples", "influence/score/{probe}/{source}", "influence/score_se/{probe}/{source}"),
    ):
        scores, errors = _matrix(run, score), _matrix(run, error)
        if not scores:
            continue
        blocks += [figure(_last_matrix(run, f"Last scores {title}: source → probe", scores, errors), "")]
        blocks += [
            figure(
                charts.bars_of_score(
                    run, f"Scores {title}, probe {probe}", by_source, errors.get(probe, {}), run.sources
                ),
                "",
            )
            for probe, by_source in scores.items()
        ]
    changes = {
        f"{what} {name}": series
        for what in ("predicted", "realized")
        for name, series in run.by_place(f"fidelity/{what}/{{direction}}").items()
    }
    importance = run.by_place("mixture/probe_weight/{probe}")
    if len(importance) > 1:
        blocks.append(figure(charts.run_lines(run, "Weights of the probes in decisions", importance, "share"), ""))
    if changes:
        title = "Change of the probe loss between decisions"
        blocks.append(figure(charts.run_lines(run, title, changes, _NATS), ""))
    return blocks


def _matrix(run: RunFolder, pattern: str) -> dict[str, dict[str, Series]]:
    found: dict[str, dict[str, Series]] = {}
    for (probe, source), series in run.matching(pattern):
        found.setdefault(probe, {})[source] = series
    return found


def _last_matrix(
    run: RunFolder, title: str, scores: Mapping[str, Mapping[str, Series]], errors: Mapping[str, Mapping[str, Series]]
) -> charts.Figure:
    columns = run.sources or list(dict.fromkeys(name for row in scores.values() for name in row))
    shape = (len(scores), len(columns))
    values, spread = np.full(shape, np.nan), np.full(shape, np.nan)
    for i, (probe, row) in enumerate(scores.items()):
        for j, name in enumerate(columns):
            if name in row:
                values[i, j] = row[name].last
            if name in errors.get(probe, {}):
                spread[i, j] = errors[probe][name].last
    return charts.heat_map(title, list(scores), columns, values, spread)


def _distillation(run: RunFolder) -> list[Block]:
    found = run.by_place("distillation/{what}")
    whole = {name: series for name, series in found.items() if "/" not in name}
    by_source: dict[str, dict[str, Series]] = {}
    for name, series in found.items():
        what, slash, source = name.partition("/")
        if slash:
            by_source.setdefault(what, {})[source] = series
    blocks = [figure(charts.run_lines(run, name, {name: series}, ""), "") for name, series in whole.items()]
    blocks += [
        figure(charts.run_lines(run, f"{what} by source", own, "", run.sources), "") for what, own in by_source.items()
    ]
    return blocks


def _speed(run: RunFolder) -> list[Block]:
    shares = {
        "mixing": "mixture/overhead",
        "influence scores": "influence/overhead",
        "teacher": "distillation/overhead",
        "waiting for data": "time/data_wait",
    }
    memory = {n.removeprefix("memory/"): s for n, s in run.metrics.items() if re.fullmatch("memory/.*(mem|peak)", n)}
    hours = {name: run.metrics[f"time/{name}"] for name in ("train", "val", "total") if f"time/{name}" in run.metrics}
    figures = [
        _one(run, "Tokens per second", "throughput/tokens_per_sec", "tokens / s"),
        charts.run_lines(
            run,
            "Share of the time that is not training",
            {label: run.metrics[name] for label, name in shares.items() if name in run.metrics},
            "share",
            yaxis={"title": {"text": "share"}, "tickformat": ".1%", "rangemode": "tozero"},
        ),
        _one(run, "Model FLOPs utilization", "throughput/device/mfu", "share of the peak"),
        charts.run_lines(run, "Memory", memory, "GB"),
        charts.run_lines(run, "Time", hours, "hours"),
    ]
    drawn = [figure(each, "") for each in figures if each is not None]
    if figures[0] is None:
        drawn.insert(0, paragraph("No throughput: the run was shorter than the speed monitor's window, or had none."))
    return drawn


def _health(run: RunFolder) -> list[Block]:
    events = {name: s for name, s in run.metrics.items() if name.startswith("event/")}
    rates = {name: s for name, s in run.metrics.items() if name.startswith("lr-")}
    figures = [
        _one(run, "Norm of the gradient, before clipping", "gradient/norm", "", kind="log"),
        _one(run, "Norm of the weights", "weight/norm", ""),
        charts.run_lines(run, "Learning rate", rates, ""),
        charts.run_lines(run, "Events so far", events, "batches"),
    ]
    return [figure(each, "") for each in figures if each is not None]


def _one(run: RunFolder, title: str, name: str, unit: str, kind: str = "linear") -> charts.Figure | None:
    if name not in run.metrics:
        return None
    axis = {"title": {"text": unit}, "type": kind}
    return charts.run_lines(run, title, {name: run.metrics[name]}, unit, yaxis=axis)


def _events(run: RunFolder) -> list[Block]:
    """What happened, in order: changes of the mixture, spikes, numbers that were not finite, notes."""
    found: list[tuple[float, str]] = []
    for entry in run.ledger:
        if entry.get("from_batch") is not None:
            weights = sorted(entry.get("weights", {}).items(), key=lambda pair: -pair[1])[:4]
            shown = ", ".join(f"{name} {weight:.0%}" for name, weight in weights)
            found.append((float(entry.get("batch", 0)), f"mixture from batch {entry['from_batch']} on: {shown}"))
    for name, event in EVENTS.items():
        if name in run.metrics:
            series = run.metrics[name]
            rises = np.diff(np.append(0.0, series.values))
            found += [
                (float(step), f"{event.what}{f' in {rise:.0f} batches' if rise > 1 else ''}. {event.advice}")
                for step, rise in zip(series.steps, rises, strict=True)
                if rise > 0
            ]
    if not found:
        return [paragraph("Nothing but training: no change of the mixture, no loss spike, every number finite.")]
    return [rows(["batch", "what"], [[f"{batch:,.0f}", what] for batch, what in sorted(found)], texts=True)]


def _ledger(run: RunFolder) -> list[Block]:
    if not run.ledger:
        return []
    names = run.sources or list(run.ledger[-1].get("weights", {}))
    body = []
    for entry in run.ledger:
        weights = entry.get("weights", {})
        cells = [_text(weights.get(name), ".1%") for name in names]
        start = entry.get("from_batch")
        body.append([str(entry.get("batch", "")), "as before" if start is None else str(start), *cells])
    return [
        paragraph("Every decision: when it was made, the first batch drawn with it, and the weights from there on."),
        rows(["batch", "from batch", *names], body),
    ]


def _text(value: float | None, form: str) -> str:
    return "" if value is None or not np.isfinite(value) else format(value, form)


def _first(series: Series | None) -> float | None:
    return None if series is None else float(series.values[0])


def _last(series: Series | None) -> float | None:
    return None if series is None else series.last


def _before_after(series: Series | None) -> list[str]:
    if series is None:
        return ["", "", ""]
    before, after = float(series.values[0]), series.last
    return [_text(before, ".3f"), _text(after, ".3f"), _text(after - before, "+.3f")]
