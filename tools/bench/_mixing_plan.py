"""Which runs the mixture benchmark needs, and how they are shared out over processes and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from cheapertraining.mixing.offline import (
    RunTable,
    best_simulated,
    cross_validate,
    fit_boosted_trees,
    fit_law,
    mixture_bounds,
    optimal_mixture,
    sample_mixtures,
)
from cheapertraining.mixing.offline.fidelity import Predicts
from cheapertraining.mixing.signals import Array
from tools.bench._mixing_corpus import Corpus
from tools.bench._mixing_run import RunSpec, execute
from tools.bench._mixing_settings import CONTENDERS, Setting

SEARCH_SEED = 100
"""Of all runs that are not scored: the swarm, the search for the oracle, tuning, references."""
SWARM_RUNS, SWARM_STEPS = 16, 150
_SIMULATED = 4096

Result = dict[str, Any]
Weights = Mapping[str, float]


class Results:
    """Finished runs on disk, by the hash of all that decides them."""

    def __init__(self, root: Path, processes: int, report: Callable[[str], None] = print) -> None:
        """``processes`` side by side; 0 makes none, and what is missing stays missing."""
        self.root = root
        self.processes = processes
        self.report = report
        (root / "results").mkdir(parents=True, exist_ok=True)

    def get(self, spec: RunSpec) -> Result | None:
        """The result of a run that was made, else None."""
        path = self._path(spec)
        return json.loads(path.read_text()) if path.is_file() else None

    def make(self, specs: Iterable[RunSpec]) -> None:
        """Run what is missing, in this order, side by side; each result is kept as soon as it is there."""
        missing = list({spec.key: spec for spec in specs if not self._path(spec).is_file()}.values())
        if not missing or not self.processes:
            return
        # Fresh interpreters: a fork would inherit threads, and CPU time is counted by process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, mp_context=context) as pool:
            waiting = {pool.submit(execute, spec, self.root): spec for spec in missing}
            for number, future in enumerate(as_completed(waiting), start=1):
                spec = waiting[future]
                self._keep(spec, future.result())
                self.report(f"  {number}/{len(missing)} {spec.label}")

    def _keep(self, spec: RunSpec, result: Result) -> None:
        path = self._path(spec)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result))
        os.replace(unfinished, path)

    def _path(self, spec: RunSpec) -> Path:
        return self.root / "results" / f"{spec.key}.json"


def spec_of(
    corpus: Corpus,
    setting: Setting,
    contender: str,
    seed: int,
    *,
    weights: Weights | None = None,
    trial: int = 0,
    steps: int | None = None,
    extra: Sequence[str] = (),
    **more: Any,
) -> RunSpec:
    """The run of a contender (a name of ``CONTENDERS``) on a setting; ``weights`` are those at the start."""
    sources: dict[str, dict[str, Any]] = {}
    for name in setting.sources:
        sources[name] = {"weight": 1.0 if weights is None else round(weights.get(name, 0.0), 6)}
        if name in setting.cut:
            sources[name]["local"] = str(corpus.cut(name, setting.cut[name]).relative_to(corpus.folder.parent))
        if name in setting.max_epochs:
            sources[name]["max_epochs"] = setting.max_epochs[name]
        if name == setting.late:
            sources[name]["from_batch"] = setting.steps // 2
    data = {"sources": sources, "probes": {name: {"source": name} for name in setting.targets}}
    if setting.max_epochs:
        data["on_exhaustion"] = "renormalize"
    overrides = (*CONTENDERS[contender].overrides(setting, trial), *extra)
    judged = setting.judged if len(setting.targets) > 1 else setting.targets
    more.setdefault("evaluate_every", 25 if len(judged) == 1 else 50)
    label = f"{setting.name} {contender} seed {seed}"
    return RunSpec(corpus.fingerprint, data, judged, steps or setting.steps, seed, overrides, label=label, **more)


def swarm_specs(corpus: Corpus, setting: Setting) -> list[RunSpec]:
    """Short runs with random mixtures, for the oracle and the offline methods."""
    count = len(setting.sources)
    lower, upper = np.zeros(count), np.ones(count)
    mixtures = sample_mixtures(np.ones(count), SWARM_RUNS, lower=lower, upper=upper, seed=0)
    return [
        spec_of(
            corpus,
            setting,
            "uniform",
            SEARCH_SEED,
            weights=dict(zip(setting.sources, mixture.tolist(), strict=True)),
            steps=SWARM_STEPS,
            evaluate_every=SWARM_STEPS,
            probe=True,
        )
        for mixture in mixtures
    ]


def offline_weights(setting: Setting, swarm: Sequence[Result], losses: str) -> dict[str, dict[str, float]]:
    """What the offline methods make of the swarm: ``mixing_law`` and ``regmix``, by source.

    Args:
        losses: ``probe``, which a method may read; or ``heldout``, for the oracle.
    """
    table = _table(setting, swarm, losses)
    prior = np.full(len(table.sources), 1 / len(table.sources))
    lower, upper = mixture_bounds(table.sources)
    laws = [fit_law(table.weights, column) for column in table.losses.T]
    law = optimal_mixture(laws, prior, lower, upper, kl=0.1 if losses == "probe" else 0.0).weights
    simulated = sample_mixtures(prior, _SIMULATED, lower=lower, upper=upper, seed=1)
    trees, _ = best_simulated([fit_boosted_trees(table.weights, column) for column in table.losses.T], simulated)
    return {
        "mixing_law": dict(zip(table.sources, law.tolist(), strict=True)),
        "regmix": dict(zip(table.sources, trees.tolist(), strict=True)),
    }


def swarm_fidelity(setting: Setting, swarm: Sequence[Result]) -> dict[str, float]:
    """Rank correlation of predicted and true held-out losses, each run predicted from the others; mean over targets."""
    table = _table(setting, swarm, "heldout")
    fits: dict[str, Callable[[Array, Array], Predicts]] = {"mixing_law": fit_law, "regmix": fit_boosted_trees}
    return {
        method: float(np.mean(cross_validate(table, fit, folds=len(swarm)).spearman)) for method, fit in fits.items()
    }


def _table(setting: Setting, swarm: Sequence[Result], losses: str) -> RunTable:
    names = setting.sources
    mixtures = np.array([[run["spec"]["data"]["sources"][name]["weight"] for name in names] for run in swarm])
    ends = np.array([[_final(run, target, losses) for target in setting.targets] for run in swarm])
    runs = tuple(run["spec"]["label"] for run in swarm)
    return RunTable(names, setting.targets, mixtures / mixtures.sum(axis=1, keepdims=True), ends, runs)


def _final(run: Result, target: str, losses: str) -> float:
    if losses == "probe":
        return float(run["probe_losses"][target])
    return float(run["course"]["losses"][target][-1])


def oracle_candidates(setting: Setting, swarm: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Static mixtures of which the best, at full length, is called the oracle: fitted, sampled and by hand."""
    fitted = offline_weights(setting, swarm, "heldout")
    best = min(swarm, key=lambda run: np.mean([run["course"]["losses"][target][-1] for target in setting.targets]))
    present = [name for name in setting.targets if name in setting.sources]
    found = {
        "law": fitted["mixing_law"],
        "trees": fitted["regmix"],
        "swarm": {name: source["weight"] for name, source in best["spec"]["data"]["sources"].items()},
        "uniform": dict.fromkeys(setting.sources, 1 / len(setting.sources)),
    }
    if present:
        found["targets"] = {name: 1.0 if name in present else 0.0 for name in setting.sources}
        found["mostly targets"] = {name: 1.0 if name in present else 0.02 for name in setting.sources}
    # Between a fitted corner and the middle.
    found["softened law"] = {name: 0.75 * found["law"][name] + 0.25 / len(setting.sources) for name in setting.sources}
    return found
