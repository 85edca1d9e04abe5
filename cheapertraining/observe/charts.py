"""Figures of a run, as Plotly's plain JSON: ``{"data": [...], "layout": {...}}``.

Colours of text and grid are the page's. Long series are thinned to some hundred points, each the mean of the steps that
it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.observe.run_folder import RunFolder, Series

__all__ = [
    "Figure",
    "area",
    "bars_of_score",
    "heat_map",
    "lines",
    "points_of",
    "run_lines",
    "thin",
]

Figure = dict[str, Any]
Array = NDArray[np.float64]

POINTS = 400
"""Of a line, at most."""

# Okabe and Ito's eight colours for all kinds of sight, then lighter ones for sources beyond (jfly.uni-koeln.de/color).
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#b8a800",
    "#7f7f7f",
    "#5e3c99",
    "#8c510a",
    "#1b7837",
    "#c51b7d",
    "#4393c3",
    "#f4a582",
    "#66c2a5",
    "#a6761d",
    "#e78ac3",
    "#8da0cb",
    "#a6d854",
    "#fc8d62",
)


def colour(index: int) -> str:
    """The colour of the source (or run) with this index."""
    return COLOURS[index % len(COLOURS)]


def thin(x: Array, y: Array, most: int = POINTS) -> tuple[list[float], list[float | None]]:
    """At most ``most`` points: means over runs of neighbours, each at its last ``x``; rounded to what can be seen."""
    if len(x) > most:
        bounds = np.linspace(0, len(x), most + 1).astype(int)
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(y)
            sums = np.add.reduceat(np.where(finite, y, 0.0), bounds[:-1])
            counts = np.add.reduceat(finite.astype(float), bounds[:-1])
            y = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        x = x[bounds[1:] - 1]
    return [_rounded(value) for value in x], [_rounded(value) if np.isfinite(value) else None for value in y]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def points_of(run: RunFolder, series: Series) -> tuple[list[float], list[float | None]]:
    """A series over the tokens of its run."""
    return thin(run.tokens_at(series.steps), series.values)


def lines(title: str, traces: Sequence[Mapping[str, Any]], y: str, x: str = "tokens", **layout: Any) -> Figure | None:
    """Lines in one frame; None where there is none.

    Args:
        title: of the figure.
        traces: Plotly's, without a type.
        y, x: titles of the axes, units included.
        layout: on top.
    """
    if not traces:
        return None
    drawn = [{"type": "scatter", "mode": "lines+markers" if len(t["x"]) < 40 else "lines"} | dict(t) for t in traces]
    axes = {"xaxis": {"title": {"text": x}, "rangemode": "tozero"}, "yaxis": {"title": {"text": y}}}
    return {"data": drawn, "layout": {"title": {"text": title}, "hovermode": "x unified", **axes, **layout}}


def run_lines(
    run: RunFolder, title: str, wanted: Mapping[str, Series], y: str, order: Sequence[str] = (), **layout: Any
) -> Figure | None:
    """Series of one run over its tokens, by name; those of ``order`` (the sources) keep their colour in all figures."""
    traces = []
    for place, (name, series) in enumerate(wanted.items()):
        xs, ys = points_of(run, series)
        own = order.index(name) if name in order else place
        traces.append({"x": xs, "y": ys, "name": name, "line": {"color": colour(own)}})
    return lines(title, traces, y, **layout)


def area(run: RunFolder, title: str, wanted: Mapping[str, Series], order: Sequence[str]) -> Figure | None:
    """Shares that make up a whole, stacked, over tokens."""
    traces = []
    for name in order:
        if name not in wanted:
            continue
        xs, ys = points_of(run, wanted[name])
        traces.append(
            {
                "x": xs,
                "y": ys,
                "name": name,
                "mode": "lines",
                "stackgroup": "shares",
                "line": {"width": 0.5, "shape": "hv", "color": colour(order.index(name))},
                "hovertemplate": "%{y:.1%}",
            }
        )
    return lines(title, traces, "share", yaxis={"title": {"text": "share"}, "tickformat": ".0%", "range": [0, 1]})


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Array, errors: Array) -> Figure:
    """A matrix ``[rows, columns]`` of scores in standard errors, blue where it helps; scores and errors on hover."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(errors > 0, values / errors, np.nan)
    shown = [[None if not np.isfinite(v) else _rounded(v) for v in row] for row in ratio]
    told = [
        [[_finite(value), _finite(error)] for value, error in zip(*both, strict=True)]
        for both in zip(values, errors, strict=True)
    ]
    data = {
        "type": "heatmap",
        "x": list(columns),
        "y": list(rows),
        "z": shown,
        "customdata": told,
        "zmid": 0,
        "colorscale": [[0, "#d55e00"], [0.5, "#f2f2f2"], [1, "#0072b2"]],
        "colorbar": {"title": {"text": "standard<br>errors"}, "thickness": 12, "lenmode": "pixels", "len": 130},
        "hovertemplate": "%{x} → %{y}<br>score %{customdata[0]} ± %{customdata[1]}<br>%{z:.1f} errors<extra></extra>",
    }
    height = 230 + 34 * len(rows)
    axes = {"xaxis": {"tickangle": -40, "automargin": True}, "yaxis": {"automargin": True, "autorange": "reversed"}}
    return {"data": [data], "layout": {"title": {"text": title}, "height": height, "margin": {"b": 60}, **axes}}


def bars_of_score(
    run: RunFolder, title: str, scores: Mapping[str, Series], errors: Mapping[str, Series], order: Sequence[str]
) -> Figure | None:
    """Scores of each source over tokens, with a standard error up and down."""
    traces: list[dict[str, Any]] = []
    for name, series in scores.items():
        xs, ys = points_of(run, series)
        trace: dict[str, Any] = {"x": xs, "y": ys, "name": name, "mode": "lines+markers"}
        trace["line"] = {"color": colour(order.index(name) if name in order else len(traces))}
        if name in errors and len(errors[name].values) == len(series.values):
            _, spread = points_of(run, errors[name])
            trace["error_y"] = {"type": "data", "array": spread, "thickness": 1, "width": 2}
        traces.append(trace)
    return lines(title, traces, "nats / step size")


def _finite(value: float) -> float | None:
    return _rounded(value) if np.isfinite(value) else None
