"""A mixture from a swarm of small runs: plan them, collect what they ended with, fit, and write the weights.

    python tools/fit_mixing_law.py plan mixed_pretrain --runs 32 --out swarm --set max_duration=100ba
    sh swarm/commands.sh       (each line is a run, to be shared out as you like; begun again, it goes on where it was)
    python tools/fit_mixing_law.py collect runs/swarm-* --out swarm.csv
    python tools/fit_mixing_law.py fit swarm.csv --data mixed_pretrain --out mixture.yaml
    composer train.py RUN.yaml compose.data=mixture.yaml algorithms.online_mixing=null

`fit` takes a table (`weight/<source>` and `loss/<target>` columns, CSV or JSON lines), or two CSV files in RegMix's
layout: `fit mixtures.csv --losses losses.csv`. It prints how well runs that were not fitted are ranked, the proposed
weights with their intervals, and what they gain over the prior by the fit's own account. With a rank correlation near 0
the proposal is worth nothing, and it says so.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.config import DataConfig
    from cheapertraining.mixing.offline import CrossValidation, RunTable
    from cheapertraining.mixing.signals import Array

_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_TRUSTED = 0.5


# ---- what the command line says ------------------------------------------------------------------------------
def _number(key: str, text: str) -> float:
    """``20_000_000_000``, ``2e10`` or ``20B``."""
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{key}: expected a number such as 0.3, 2e10 or 20B, found '{text}'.")
    return value


def _pairs(key: str, text: str) -> dict[str, float]:
    """``code=0.3,wiki=0.7``."""
    pairs = [item.rpartition("=") for item in text.split(",")]
    if not all(name and value for name, _, value in pairs):
        raise UserError(f"{key}: expected NAME=NUMBER,… such as code=0.3,wiki=0.7, found '{text}'.")
    return {name.strip(): _number(key, value.strip()) for name, _, value in pairs}


def _load_data(given: argparse.Namespace) -> DataConfig | None:
    from cheapertraining.config import load_data_config

    return None if given.data is None else load_data_config(given.data[0], given.data[1:])


def _prior(text: str | None, sources: Sequence[str], data: DataConfig | None) -> Array:
    """Weights to stay near, ``[K]``: given, or the data yaml's, or even."""
    if text is None and data is not None:
        named = {name: source.weight for name, source in data.sources.items()}
    elif text in (None, "uniform"):
        named = dict.fromkeys(sources, 1.0)
    else:
        named = _pairs("--prior", str(text))
    _check_names("--prior", named, sources)
    weights = np.array([named.get(name, 0.0) for name in sources])
    if not (np.all(weights >= 0) and weights.sum() > 0):
        raise UserError("--prior: expected weights of at least 0, one of them above.")
    return np.asarray(weights / weights.sum())


def _check_names(key: str, named: Mapping[str, float], sources: Sequence[str]) -> None:
    from cheapertraining.errors import nearest

    for name in named:
        if name not in sources:
            raise UserError(f"{key}: no source is named '{name}' ({', '.join(sources)}).{nearest(name, sources)}")


def _bounds(given: argparse.Namespace, sources: Sequence[str], data: DataConfig | None) -> tuple[Array, Array]:
    """Bounds from floor, ceiling, and caps: sizes are given, or read from the data yaml's shards."""
    from cheapertraining.mixing.offline import mixture_bounds

    tokens = None if given.tokens is None else _number("--tokens", given.tokens)
    if given.available is not None and tokens is None:
        raise UserError("--available: caps need the length of the run as well: add --tokens.")
    available = None if given.available is None else _pairs("--available", given.available)
    if available is None and tokens is not None:
        if data is None:
            raise UserError("--tokens: caps need the sizes of the sources: add --available, or --data with shards.")
        from cheapertraining.data.budget import mixture_budget

        budget = mixture_budget(data, int(tokens))
        available = {}
        for name in sources:
            own = data.sources[name].max_epochs or math.inf
            available[name] = budget.sources[name].tokens * min(1.0, own / given.max_epochs)
    return mixture_bounds(
        sources,
        floor=given.floor,
        ceiling=given.ceiling,
        available=available,
        max_epochs=given.max_epochs,
        tokens=tokens,
    )


# ---- fit -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Proposal:
    """What a fit proposes; `interval` are 5 % and 95 % quantiles ``[2, K]``, `gain` mean and the same of a loss."""

    method: str
    weights: Array
    interval: Array
    loss: float
    loss_at_prior: float
    gain: tuple[float, float, float] | None
    checked: CrossValidation
    coefficients: dict[str, dict[str, Any]]


def _by_law(
    table: RunTable, v: Array, prior: Array, bounds: tuple[Array, Array], given: argparse.Namespace
) -> Proposal:
    from cheapertraining.mixing.offline import bootstrap, cross_validate, fit_law, propose_by_laws

    best = propose_by_laws(table, prior, bounds, kl=given.kl, target_weights=v)
    laws = best.models
    draws = bootstrap(
        table,
        laws,
        draws=given.bootstrap,
        seed=given.seed,
        target_weights=v,
        within=(prior, *bounds, given.kl),
    )
    gains = draws.losses(prior) - draws.losses(best.weights)
    at_prior, loss = best.predict(prior), best.predict(best.weights)
    return Proposal(
        method="law",
        weights=best.weights,
        interval=np.quantile(draws.optima, [0.05, 0.95], axis=0),
        loss=loss,
        loss_at_prior=at_prior,
        gain=(at_prior - loss, *np.quantile(gains, [0.05, 0.95]).tolist()),
        checked=cross_validate(table, fit_law, seed=given.seed),
        coefficients={
            target: {"floor": law.floor, "exponents": dict(zip(table.sources, law.exponents.tolist(), strict=True))}
            for target, law in zip(table.targets, laws, strict=True)
        },
    )


def _by_trees(
    table: RunTable, v: Array, prior: Array, bounds: tuple[Array, Array], given: argparse.Namespace
) -> Proposal:
    from cheapertraining.mixing.offline import cross_validate, fit_boosted_trees, propose_by_trees

    best = propose_by_trees(table, prior, bounds, target_weights=v, seed=given.seed)
    return Proposal(
        method="regmix",
        weights=best.weights,
        interval=np.quantile(best.candidates, [0.05, 0.95], axis=0),
        loss=best.predict(best.weights),
        loss_at_prior=best.predict(prior),
        gain=None,
        checked=cross_validate(table, functools.partial(fit_boosted_trees, seed=given.seed), folds=5, seed=given.seed),
        coefficients={},
    )


def _warnings(table: RunTable, proposal: Proposal) -> list[str]:
    warnings = []
    for target, rank in zip(table.targets, proposal.checked.spearman, strict=True):
        if not rank >= _TRUSTED:
            warnings.append(
                f"target '{target}': runs that were not fitted are ranked with a correlation of {rank:.2f}. Do not "
                "follow this proposal; make more or longer runs."
            )
    if proposal.gain is not None and proposal.gain[1] <= 0:
        warnings.append("the gain over the prior is not beyond chance: the interval reaches 0.")
    for name, weight, most in zip(table.sources, proposal.weights, table.weights.max(axis=0), strict=True):
        if weight > most + 1e-6:
            warnings.append(f"source '{name}': no run had more than {most:.2f} of it; {weight:.2f} is extrapolated.")
    return warnings


def _report(table: RunTable, v: Array, prior: Array, proposal: Proposal) -> str:
    """The proposal as text for people."""
    from tools.mix_report import table as aligned

    checked = proposal.checked
    rows: list[tuple[str, ...]] = [("target", "counts", "Spearman", "Pearson", "RMSE")]
    figures = zip(table.targets, v / v.sum(), checked.spearman, checked.pearson, checked.rmse, strict=True)
    rows += [(name, f"{share:.0%}", f"{rank:.3f}", f"{r:.3f}", f"{rmse:.4f}") for name, share, rank, r, rmse in figures]
    spread = "90 % interval" if proposal.method == "law" else "in the best 90 %"
    shares: list[tuple[str, ...]] = [("source", "prior", "weight", spread)]
    shares += [
        (name, f"{prior[k]:.3f}", f"{proposal.weights[k]:.3f}", f"{low:.3f} to {high:.3f}")
        for k, (name, (low, high)) in enumerate(zip(table.sources, proposal.interval.T, strict=True))
    ]
    lines = [
        f"{proposal.method}: {len(table.runs)} runs, {len(table.sources)} sources. Predictions of runs not fitted:",
        aligned(rows),
        "",
        *_coefficient_lines(table, proposal, aligned),
        aligned(shares),
        "",
        f"predicted mean loss: {proposal.loss_at_prior:.4f} at the prior, {proposal.loss:.4f} at these weights"
        + ("" if proposal.gain is None else "; gain {:.4f} ({:.4f} to {:.4f})".format(*proposal.gain)),
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in _warnings(table, proposal))])


def _coefficient_lines(table: RunTable, proposal: Proposal, aligned: Any) -> list[str]:
    """The laws' coefficients; smaller is better for the target."""
    if not proposal.coefficients:
        return []
    rows = [("loss = c + exp(sum of a * weight)", "c", *(f"a {name}" for name in table.sources))]
    rows += [
        (target, f"{law['floor']:.3f}", *(f"{a:.2f}" for a in law["exponents"].values()))
        for target, law in proposal.coefficients.items()
    ]
    turned = list(zip(*rows, strict=True)) if len(table.sources) > len(table.targets) else rows
    text = aligned(turned)
    narrow = max(map(len, text.splitlines())) <= 120
    return [text if narrow else "(--json has the coefficients: they are too many for a table)", ""]


def _as_json(table: RunTable, prior: Array, proposal: Proposal) -> dict[str, Any]:
    def by_source(values: Array) -> dict[str, float]:
        return dict(zip(table.sources, values.tolist(), strict=True))

    checked = proposal.checked
    return {
        "method": proposal.method,
        "runs": len(table.runs),
        "targets": {
            target: {
                "spearman": float(checked.spearman[m]),
                "pearson": float(checked.pearson[m]),
                "rmse": float(checked.rmse[m]),
                **proposal.coefficients.get(target, {}),
            }
            for m, target in enumerate(table.targets)
        },
        "prior": by_source(prior),
        "weights": by_source(proposal.weights),
        "interval": [by_source(quantile) for quantile in proposal.interval],
        "predicted_loss": proposal.loss,
        "predicted_loss_at_prior": proposal.loss_at_prior,
        "gain": None if proposal.gain is None else list(proposal.gain),
        "warnings": _warnings(table, proposal),
    }


def _chosen_targets(table: RunTable, chosen: Sequence[str] | None) -> tuple[RunTable, Array]:
    """The table of the targets ``NAME`` or ``NAME=WEIGHT``, and their weights."""
    if not chosen:
        return table, np.ones(len(table.targets))
    weights: dict[str, float] = {}
    for text in chosen:
        name, _, value = text.rpartition("=") if text not in table.targets else (text, "", "1")
        name, value = (name, value) if name else (text, "1")
        weights[name] = _number("--target", value)
        if not weights[name] > 0:
            raise UserError(f"--target: expected a positive weight of '{name}', found {value}.")
    return table.of_targets(list(weights)), np.array(list(weights.values()))


def fit(given: argparse.Namespace) -> None:
    """Read a table, fit, report, write."""
    from cheapertraining.mixing.offline import read_table, read_two_tables

    if given.bootstrap < 2 or given.kl < 0 or given.seed < 0:
        raise UserError("expected --bootstrap of at least 2, --kl and --seed of at least 0.")
    table = read_table(given.table) if given.losses is None else read_two_tables(given.table, given.losses)
    table, v = _chosen_targets(table, given.target)
    table.check_identified()
    data = _load_data(given)
    if data is not None:
        _check_names(str(given.table), dict.fromkeys(table.sources, 0.0), list(data.sources))
    prior = _prior(given.prior, table.sources, data)
    by = {"law": _by_law, "regmix": _by_trees}[given.method]
    proposal = by(table, v, prior, _bounds(given, table.sources, data), given)
    weights = dict(zip(table.sources, proposal.weights.tolist(), strict=True))
    print(json.dumps(_as_json(table, prior, proposal), indent=2) if given.json else _report(table, v, prior, proposal))
    if given.out is not None:
        write_mixture(
            given.out, weights, data, f"Fitted by {proposal.method} to {len(table.runs)} runs ({given.table})."
        )
        if not given.json:
            print(f"written: {given.out}. {_how_to_use(given.out, data is not None)}")


def _how_to_use(out: Path, whole: bool) -> str:
    if out.suffix == ".json":
        return "One weight a source, as data.sources.<name>.weight takes it."
    if whole:
        return f"Train with: train.py RUN.yaml compose.data={out} algorithms.online_mixing=null"
    return "Put these weights into your data yaml, or name that with --data to get a whole one."


def write_mixture(out: Path, weights: Mapping[str, float], data: DataConfig | None, comment: str) -> None:
    """Write weights as JSON, as a data yaml, or (without the config of the sources) as the part of one.

    In a data yaml, sources without a weight get 0.
    """
    from cheapertraining.config import resolved_yaml

    rounded = _rounded(weights)
    if out.suffix == ".json":
        text = json.dumps(rounded, indent=2) + "\n"
    elif data is None:
        lines = [f"    {json.dumps(name)}: {{weight: {weight}}}" for name, weight in rounded.items()]
        text = "\n".join([f"# {comment}", "data:", "  sources:", *lines, ""])
    else:
        sources = {name: replace(source, weight=rounded.get(name, 0.0)) for name, source in data.sources.items()}
        body = textwrap.indent(resolved_yaml(replace(data, sources=sources)), "  ")
        text = f"# {comment}\ndata:\n{body}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def _rounded(weights: Mapping[str, float]) -> dict[str, float]:
    """To six places, cut off rather than rounded up, so that no cap is passed; the sum stays within 1e-4 of 1."""
    return {name: int(weight * 1e6 + 1e-6) / 1e6 for name, weight in weights.items()}


# ---- plan, collect -------------------------------------------------------------------------------------------
def plan(given: argparse.Namespace) -> None:
    """Draw mixtures and write a data yaml for each, and the commands that train on them."""
    from cheapertraining.config import load_run_config
    from cheapertraining.mixing.offline import sample_mixtures

    data = _load_data(given)
    assert data is not None
    sources = list(data.sources)
    lower, upper = _bounds(given, sources, data)
    if given.seed < 0:
        raise UserError("expected --seed of at least 0.")
    mixtures = sample_mixtures(
        _prior(given.prior, sources, data),
        given.runs,
        lower=lower,
        upper=upper,
        seed=given.seed,
        temperature=given.temperature,
        concentration=None if given.concentration is None else tuple(given.concentration),
    )
    commands = []
    digits = len(str(given.runs - 1))
    for number, mixture in enumerate(mixtures):
        name = f"{given.name}-{number:0{digits}}"
        file = given.out / f"{name}.yaml"
        comment = f"Mixture {number} of {given.runs}, drawn around the prior (seed {given.seed})."
        write_mixture(file, dict(zip(sources, mixture.tolist(), strict=True)), data, comment)
        settings = [f"compose.data={file}", f"run_name={name}", "algorithms.online_mixing=null", "autoresume=true"]
        settings += given.set or []
        if number == 0:  # what is wrong with the run is said now, not by each of the runs
            load_run_config(given.run, settings)
        commands.append(shlex.join(["python", "train.py", given.run, *settings]))
    script = given.out / "commands.sh"
    script.write_text("\n".join(["#!/bin/sh", "set -e", *commands, ""]), encoding="utf-8")
    print(f"written: {given.runs} mixtures of {len(sources)} sources and {script}")
    if given.runs < 2 * len(sources):
        print(f"warning: a law has {len(sources) + 1} parameters; two to four times {len(sources)} runs rank well.")


def collect(given: argparse.Namespace) -> None:
    """Read finished runs into a table."""
    from cheapertraining.mixing.offline.collected import SUMMARY, collect_runs
    from cheapertraining.mixing.offline.table import write_table

    folders = [folder for folder in given.folders if folder.is_dir()]
    finished = [folder for folder in folders if (folder / SUMMARY).is_file()]
    if left := len(given.folders) - len(finished):
        print(f"fit_mixing_law: {left} of {len(given.folders)} have no {SUMMARY} and are left out", file=sys.stderr)
    table = collect_runs(finished, given.labels)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, given.out)
    targets = ", ".join(table.targets)
    print(f"written: {given.out}: {len(table.runs)} runs, {len(table.sources)} sources, targets {targets}")


# ---- command line --------------------------------------------------------------------------------------------
def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prior", help="NAME=WEIGHT,… or uniform (default: the data yaml's weights, else uniform)")
    parser.add_argument("--floor", type=float, default=0.0, help="least weight of a source (default: %(default)s)")
    parser.add_argument("--ceiling", type=float, default=1.0, help="largest (default: %(default)s)")
    parser.add_argument("--tokens", help="length of the run that the mixture is for: 2e10 or 20B; caps need it")
    parser.add_argument("--max-epochs", type=float, default=4.0, help="passes over a source (default: %(default)s)")
    parser.add_argument("--available", metavar="NAME=TOKENS,…", help="a pass's tokens (default: the shards of --data)")
    parser.add_argument("--seed", type=int, default=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fit", help="a table of runs to a mixture")
    one.add_argument("table", help="CSV or JSON lines, a row a run; with --losses the mixtures' CSV")
    one.add_argument("--losses", help="CSV of losses whose rows belong to the table's (RegMix's layout)")
    one.add_argument("--method", choices=["law", "regmix"], default="law")
    one.add_argument(
        "--target", action="append", metavar="NAME[=WEIGHT]", help="again for more (default: all, equally)"
    )
    one.add_argument(
        "--kl", type=float, default=0.1, help="price of a nat from the prior, in loss (default: %(default)s)"
    )
    one.add_argument("--bootstrap", type=int, default=200, help="draws behind the intervals (default: %(default)s)")
    one.add_argument(
        "--data",
        nargs="+",
        metavar=("DATA_YAML", "KEY=VALUE"),
        help="path or name, and what is on top of it: prior, sizes, and what --out is made from",
    )
    one.add_argument("--out", type=Path, help="mixture.yaml or mixture.json")
    one.add_argument("--json", action="store_true", help="print JSON in place of tables")
    _add_limits(one)
    one.set_defaults(call=fit)
    two = commands.add_parser("plan", help="mixtures to try, as data yamls and commands")
    two.add_argument("data", nargs="+", metavar="DATA_YAML", help="path or name, and KEY=VALUE … on top of it")
    two.add_argument("--runs", type=int, required=True)
    two.add_argument("--out", type=Path, required=True, help="folder for the yamls and commands.sh")
    two.add_argument("--run", default="mixed_pretrain", help="run yaml of the small runs (default: %(default)s)")
    two.add_argument("--set", action="append", metavar="KEY=VALUE", help="for each run, e.g. max_duration=100ba")
    two.add_argument("--name", default="swarm", help="of the runs, a number is added (default: %(default)s)")
    two.add_argument("--temperature", type=float, default=1.0, help="above 1 the prior becomes more even")
    two.add_argument("--concentration", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(default: 1, sources)")
    _add_limits(two)
    two.set_defaults(call=plan)
    three = commands.add_parser("collect", help="finished runs to a table")
    three.add_argument("folders", type=Path, nargs="+", help="runs/swarm-*")
    three.add_argument("--labels", default="probe/*", help="evaluations that are targets (default: %(default)s)")
    three.add_argument("--out", type=Path, required=True, help="table.csv or table.jsonl")
    three.set_defaults(call=collect)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do it; 2 on bad input."""
    given = _parser().parse_args(arguments)
    try:
        given.call(given)
    except UserError as error:
        print(f"fit_mixing_law: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
