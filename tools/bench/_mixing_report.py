"""What the runs of the mixture benchmark come to: figures with their intervals, tables, plots, JSON.

All figures are paired with uniform at the same seed. ``L*`` is the least loss that uniform came to by the end of its
budget (running minimum of the evaluations, linear in between), ``T`` when a run first comes to it:

    S_steps = T_uniform / T            in steps
    S_cost  = T_uniform / T            in step equivalents, the strategy's own work and what it needs before counted
    S_cpu   = T_uniform / T            in process CPU time, likewise
    gap     = (L_uniform - L) / (L_uniform - L_oracle)   at the end of the budget

A run that never comes to ``L*`` is put at its end, which flatters it, and counted as "never". Intervals are of the mean
over seeds (95 %, percentile bootstrap, seeds drawn with replacement, 10,000 times). A contender *wins* against uniform
where the interval of its final loss less uniform's is below 0, *loses* where it is above, *ties* otherwise.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench._mixing_plan import SWARM_RUNS, SWARM_STEPS, Result
from tools.bench._mixing_run import weights_of
from tools.bench._mixing_settings import CONTENDERS, REFERENCE_STEPS, UNREADABLE, Setting

Float64 = NDArray[np.float64]
Table = dict[str, list[Result]]
"""Results by contender, one a seed, in the order of the seeds."""
_DRAWS = 10_000
_CORRUPTED_BY = 150


def target_loss(result: Result, setting: Setting) -> Float64:
    """Mean held-out loss over the targets at each evaluation."""
    return np.mean([result["course"]["losses"][name] for name in setting.targets], axis=0)  # type: ignore[no-any-return]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its interval."""
    array = np.array(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(array), size=(_DRAWS, len(array)))
    low, high = np.percentile(array[drawn].mean(axis=1), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def reached(axis: Sequence[float], losses: Float64, goal: float) -> float | None:
    """Where on ``axis`` the running minimum first comes to ``goal``; None where it never does."""
    lowest = np.minimum.accumulate(losses)
    if lowest[-1] > goal:
        return None
    at = int(np.argmax(lowest <= goal))
    if at == 0:
        return float(axis[0])
    before, after = float(lowest[at - 1]), float(lowest[at])
    return float(axis[at - 1] + (before - goal) / (before - after) * (axis[at] - axis[at - 1]))


def speedups(uniform: Result, result: Result, setting: Setting, name: str) -> dict[str, Any]:
    """``S_steps``, ``S_cost``, ``S_cpu`` and whether uniform's end was reached."""
    own, base = result["course"], uniform["course"]
    losses, goal = target_loss(result, setting), float(target_loss(uniform, setting).min())
    per_step = base["cpu_seconds"][-1] / base["steps"][-1]
    upfront = _upfront_units(name)
    found: dict[str, Any] = {}
    for figure, key, extra in (
        ("S_steps", "steps", 0.0),
        ("S_cost", "units", upfront),
        ("S_cpu", "cpu_seconds", upfront * per_step),
    ):
        start = reached(base[key], target_loss(uniform, setting), goal)
        mine = reached(own[key], losses, goal)
        found["reached"] = mine is not None
        assert start is not None
        found[figure] = start / ((own[key][-1] if mine is None else mine) + extra)
    return found


def _upfront_units(name: str) -> float:
    """Step equivalents spent before the run."""
    if name in CONTENDERS and CONTENDERS[name].kind == "offline":
        return SWARM_RUNS * SWARM_STEPS
    return REFERENCE_STEPS if name == "doremi" else 0.0


def figures_of(name: str, table: Table, setting: Setting) -> dict[str, Any]:
    """All figures of a contender."""
    runs = table[name]
    base = _same_seeds(table["uniform"], runs)
    last = [float(target_loss(run, setting)[-1]) for run in runs]
    differences = [loss - float(target_loss(other, setting)[-1]) for loss, other in zip(last, base, strict=True)]
    pairs = [speedups(other, run, setting, name) for run, other in zip(runs, base, strict=True)]
    low, high = interval(differences)[1:]
    figures: dict[str, Any] = {
        "seeds": len(runs),
        "loss": interval(last),
        "to_uniform": interval(differences),
        "verdict": "win" if high < 0 else "loss" if low > 0 else "tie",
        "reached": sum(pair["reached"] for pair in pairs),
        "overhead": float(np.mean([run["course"]["units"][-1] / run["course"]["steps"][-1] - 1 for run in runs])),
        "overhead_cpu": float(np.mean([_cpu_share(run) for run in runs])),
        "worst_to_uniform": interval([_worst(run) - _worst(other) for run, other in zip(runs, base, strict=True)]),
        "weights": _mean_weights(runs),
        "epochs": {key: float(np.mean([run["epochs"][key] for run in runs])) for key in runs[0]["epochs"]},
        "fidelity": _fidelity(runs),
    }
    for figure in ("S_steps", "S_cost", "S_cpu"):
        figures[figure] = tuple(math.exp(x) for x in interval([math.log(pair[figure]) for pair in pairs]))
    if "oracle" in table:
        figures["gap"] = _gap(runs, base, _same_seeds(table["oracle"], runs), setting)
    if any(source in UNREADABLE for source in setting.sources):
        figures["corrupted"] = float(np.mean([_corrupted_share(run) for run in runs]))
    return figures


def _same_seeds(others: Sequence[Result], runs: Sequence[Result]) -> list[Result]:
    """Of ``others``, those with the seeds of ``runs``, in that order."""
    by_seed = {other["spec"]["seed"]: other for other in others}
    return [by_seed[run["spec"]["seed"]] for run in runs]


def _gap(runs: Sequence[Result], base: Sequence[Result], oracle: Sequence[Result], setting: Setting) -> Any:
    """Of the means over seeds, and its interval: a ratio, so seeds are drawn for both parts together."""
    count = len(runs)
    ends = np.array([[target_loss(run, setting)[-1] for run in part] for part in (base, runs, oracle)])
    means = ends.mean(axis=1)
    if abs(means[0] - means[2]) < 1e-9:  # Uniform is the oracle.
        return math.nan, math.nan, math.nan
    drawn = np.random.default_rng(0).integers(count, size=(_DRAWS, count))
    uniform, own, best = (row[drawn].mean(axis=1) for row in ends)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanpercentile((uniform - own) / (uniform - best), [2.5, 97.5])
    return float((means[0] - means[1]) / (means[0] - means[2])), float(low), float(high)


def _cpu_share(run: Result) -> float:
    mixing, total = run["course"]["mixing_seconds"][-1], run["course"]["cpu_seconds"][-1]
    return float(mixing / (total - mixing))


def _worst(run: Result) -> float:
    return max(losses[-1] for losses in run["course"]["losses"].values())


def _mean_weights(runs: Sequence[Result]) -> dict[str, float]:
    shares = [weights_of(run) for run in runs]
    return {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}


def _corrupted_share(run: Result) -> float:
    """Share of corrupted sources around step ``_CORRUPTED_BY``: of the 50 batches from there on."""
    rows = np.sum(run["course"]["shares"][_CORRUPTED_BY : _CORRUPTED_BY + 50], axis=0)
    bad = [k for k, name in enumerate(run["sources"]) if name in UNREADABLE]
    return float(rows[bad].sum() / rows.sum())


def _fidelity(runs: Sequence[Result]) -> float | None:
    """Rank correlation of predicted and realized changes of the targets' losses, over all decisions of all seeds."""
    pairs: list[tuple[float, float]] = []
    for run in runs:
        for decision in run["decisions"]:
            realized = decision["realized"] or {}
            for name, predicted in decision["predicted"].items():
                if predicted is not None and realized.get(name) is not None:
                    pairs.append((predicted, realized[name]))
    if len(pairs) < 5:
        return None
    ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0).astype(np.float64)
    if not ranks.std(axis=0).all():
        return None
    return float(np.corrcoef(ranks.T)[0, 1])


def table_of(table: Table, setting: Setting) -> list[list[str]]:
    """Rows of text; the first is the head."""
    head = [
        "",
        "seeds",
        "loss",
        "to uniform",
        "",
        "S_steps",
        "S_cost",
        "S_cpu",
        "gap",
        "worst",
        "corrupted",
        "work",
        "fidelity",
    ]
    rows = [head]
    for name in table:
        figures = figures_of(name, table, setting)
        never = "" if figures["reached"] == figures["seeds"] else f" ({figures['seeds'] - figures['reached']} never)"
        rows.append(
            [
                name,
                str(figures["seeds"]),
                f"{figures['loss'][0]:.3f}",
                _shown(figures["to_uniform"], "+.3f") if name != "uniform" else "",
                figures["verdict"] if name != "uniform" else "",
                _shown(figures["S_steps"], ".2f") + never,
                _shown(figures["S_cost"], ".2f"),
                f"{figures['S_cpu'][0]:.2f}",
                _shown(figures["gap"], ".0%") if "gap" in figures and not math.isnan(figures["gap"][0]) else "",
                _shown(figures["worst_to_uniform"], "+.3f")
                if len(setting.judged) > 1 and len(setting.targets) > 1
                else "",
                f"{figures['corrupted']:.1%}" if "corrupted" in figures else "",
                f"{figures['overhead']:.1%}",
                "" if figures["fidelity"] is None else f"{figures['fidelity']:.2f}",
            ]
        )
    return rows


def _shown(figure: tuple[float, float, float], form: str) -> str:
    mean, low, high = figure
    if math.isnan(low):
        return f"{mean:{form}}"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def print_tables(
    tables: Mapping[str, Table],
    settings: Mapping[str, Setting],
    transfers: Mapping[str, Table],
    write: Callable[[str], None] = print,
) -> None:
    """All tables as text."""
    for name, table in tables.items():
        setting = settings[name]
        write(f"\n{name}: {', '.join(setting.sources)} -> {', '.join(setting.targets)}; {setting.steps} steps")
        _print(table_of(table, setting), write)
    for name, table in transfers.items():
        write(f"\nA1's schedule of {name}, replayed on the larger model")
        _print(table_of(table, settings["A1"]), write)


def _print(rows: Sequence[Sequence[str]], write: Callable[[str], None]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_report(
    folder: Path,
    tables: Mapping[str, Table],
    settings: Mapping[str, Setting],
    weights: Mapping[tuple[str, str], Mapping[str, float]],
    trials: Mapping[str, int],
    transfers: Mapping[str, Table],
) -> None:
    """``tables.txt``, ``figures.json`` and a plot a setting."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    print_tables(tables, settings, transfers, lines.append)
    (folder / "tables.txt").write_text("\n".join(lines) + "\n")
    content = {
        "settings": {
            name: {contender: figures_of(contender, table, settings[name]) for contender in table}
            for name, table in tables.items()
        },
        "transfer": {
            name: {each: figures_of(each, table, settings["A1"]) for each in table} for name, table in transfers.items()
        },
        "searched": {f"{setting} {method}": dict(found) for (setting, method), found in weights.items()},
        "trials": {name: CONTENDERS[name].trials[trial] for name, trial in trials.items()},
    }
    (folder / "figures.json").write_text(json.dumps(content, indent=1))
    for name, table in tables.items():
        plot(folder / f"{name}.png", table, settings[name])


def plot(path: Path, table: Table, setting: Setting) -> None:
    """Loss over cost of all contenders (mean over seeds), and the weights of our own over steps (first seed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    adaptive = [name for name in table if CONTENDERS.get(name) and CONTENDERS[name].kind == "ours"]
    figure, axes = pyplot.subplots(1, 1 + len(adaptive), figsize=(7 + 4 * len(adaptive), 5), squeeze=False)
    styles = itertools.cycle(["-", "--", ":", "-."])
    for (name, runs), style in zip(table.items(), styles, strict=False):
        units = np.mean([run["course"]["units"] for run in runs], axis=0)
        losses = np.mean([target_loss(run, setting) for run in runs], axis=0)
        axes[0][0].plot(units, losses, style, label=name, linewidth=1.5)
    axes[0][0].set(xlabel="step equivalents", ylabel="held-out loss of the target, nats per token", title=setting.name)
    axes[0][0].legend(fontsize=7, ncols=2)
    for axis, name in zip(axes[0][1:], adaptive, strict=True):
        run = table[name][0]
        shares = np.array(run["course"]["shares"], np.float64)
        width = max(1, len(shares) // 30)
        stages = [part.sum(axis=0) / part.sum() for part in np.array_split(shares, len(shares) // width)]
        axis.stackplot(np.arange(len(stages)) * width, np.array(stages).T, labels=run["sources"])
        axis.set(xlabel="step", ylabel="share of samples", ylim=(0, 1), title=name)
        axis.legend(fontsize=6, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
