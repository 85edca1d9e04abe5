"""Mixture strategies side by side: which reaches the target with the fewest steps, its own work counted?

    python tools/bench/mixing.py                       all settings on the embedded sample, five seeds
    python tools/bench/mixing.py --corpora DIR         with further text: DIR/<source>/{train,probe,heldout}.jsonl.gz
    python tools/bench/mixing.py --settings A1 C --seeds 3 --only influence matching oracle
    python tools/bench/mixing.py --report              no further runs: print and draw what is there

The settings are described in tools/bench/_mixing_settings.py, a run and its two units of cost in _mixing_run.py, the
figures in _mixing_report.py. Small Llamas (163,000 parameters; with `--transfer` also 0.9 million) train on rows of 64
tokens, 16 a batch. All contenders of a seed begin with the same model and meet each source's samples in the same order.
Strategies read train and probe splits; held-out is read here alone. Every finished run is kept under `--out`, by the
hash of all that decides it, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cheapertraining.mixing.replay import changes_of, replay_points
from tools.bench._mixing_corpus import Corpus, make_corpus
from tools.bench._mixing_plan import (
    SEARCH_SEED,
    Result,
    Results,
    offline_weights,
    oracle_candidates,
    spec_of,
    swarm_fidelity,
    swarm_specs,
)
from tools.bench._mixing_report import Table, print_tables, target_loss, write_report
from tools.bench._mixing_run import RunSpec
from tools.bench._mixing_settings import CONTENDERS, IDEAS, REFERENCE_STEPS, Setting, make_settings

SCORED = ("A1", "A3", "C", "B", "A2")
CORE = ("uniform", "oracle", "influence", "matching")
"""Run for all seeds; the others for the first ``PORT_SEEDS``."""
PORT_SEEDS = 3
TUNING = ("T", "U")
_HARMLESS = 0.01
CHANGING = ("uniform", "unimax", "influence", "matching", "odm", "ado")
CAPPED = {"uniform": (), "uncapped": (), "capped": ("algorithms.online_mixing.constraints.max_epochs=4.0",)}
LARGE = {"hidden": 128, "layers": 4}


class Benchmark:
    """The runs that were asked for, and what one needs of another."""

    def __init__(self, corpus: Corpus, results: Results, names: Sequence[str]) -> None:
        self.corpus, self.results = corpus, results
        self.settings = make_settings(corpus)
        self.names = [name for name in CONTENDERS if name in names]
        self.trials = dict.fromkeys(self.names, 0)
        self.weights: dict[tuple[str, str], dict[str, float]] = {}

    def tune(self) -> None:
        """Freeze a trial of each contender, on the settings that nobody is scored on.

        First, do no harm: of the trials that are at most ``_HARMLESS`` nats worse than uniform where the mean over all
        sources is the target, the one that is best on the scarce target; where none is, the least harmful.
        """
        target, average = (self.settings[name] for name in TUNING)
        uniform = self._plain(average, "uniform", SEARCH_SEED, 0)
        tuned = [name for name in self.names if len(CONTENDERS[name].trials) > 1]
        specs = {
            (name, trial, setting.name): self._plain(setting, name, SEARCH_SEED, trial)
            for name in tuned
            for trial in range(len(CONTENDERS[name].trials))
            for setting in (target, average)
        }
        self.results.make([uniform, *specs.values()])
        bound = self._loss(uniform, average) + _HARMLESS
        for name in tuned:
            trials = range(len(CONTENDERS[name].trials))
            harm = [max(0.0, self._loss(specs[name, trial, average.name], average) - bound) for trial in trials]
            losses = [self._loss(specs[name, trial, target.name], target) for trial in trials]
            self.trials[name] = min(trials, key=lambda trial: (harm[trial], losses[trial]))

    def search(self, names: Sequence[str]) -> None:
        """Swarm, offline methods, oracle and reference of each setting."""
        settings = [self.settings[name] for name in names]
        swarms = {setting.name: swarm_specs(self.corpus, setting) for setting in settings}
        references = {setting.name: self._reference(setting) for setting in settings}
        self.results.make([spec for swarm in swarms.values() for spec in swarm])
        self.results.make(references.values())
        candidates: dict[tuple[str, str], tuple[dict[str, float], RunSpec]] = {}
        for setting in settings:
            swarm = [self._result(spec) for spec in swarms[setting.name]]
            print(f"{setting.name}: rank correlation on runs not fitted to: {swarm_fidelity(setting, swarm)}")
            for method, weights in offline_weights(setting, swarm, "probe").items():
                self.weights[setting.name, method] = weights
            for name, weights in oracle_candidates(setting, swarm).items():
                spec = spec_of(self.corpus, setting, "oracle", SEARCH_SEED, weights=weights)
                candidates[setting.name, name] = weights, spec
        self.results.make(spec for _, spec in candidates.values())
        for setting in settings:
            own = {key: pair for key, pair in candidates.items() if key[0] == setting.name}
            best = min(own, key=lambda key: self._loss(own[key][1], setting))
            self.weights[setting.name, "oracle"] = own[best][0]

    def compare(self, names: Sequence[str], seeds: int, *, core_only: bool = False) -> dict[str, Table]:
        """Results by contender of each setting, one a seed."""
        core = [name for name in self.names if name in CORE]
        others = [] if core_only else [name for name in self.names if name not in CORE]
        order = [(setting, name, seed) for seed in range(seeds) for setting in names for name in core]
        order += [
            (setting, name, seed) for seed in range(min(seeds, PORT_SEEDS)) for setting in names for name in others
        ]
        specs = {key: self._spec(self.settings[key[0]], key[1], key[2]) for key in order}
        self.results.make(specs.values())
        return {setting: self._table(specs, setting) for setting in names}

    def exhaust(self, seeds: int) -> Table:
        """D: influence with and without a cap on passes over a source, and uniform."""
        setting, specs = self.settings["D"], {}
        for name, extra in CAPPED.items():
            contender = name if name in CONTENDERS else "matching"
            for seed in range(seeds):
                trial = self.trials.get(contender, 0)
                specs["D", name, seed] = spec_of(
                    self.corpus, setting, contender, seed, trial=trial, extra=extra, evaluate_every=50
                )
        self.results.make(specs.values())
        return self._table(specs, "D")

    def change(self, seeds: int) -> dict[str, Table]:
        """E: sources that come and run out, for who can be surprised by it."""
        setting = self.settings["E"]
        names = [name for name in self.names if name in CHANGING]
        specs = {
            ("E", name, seed): self._plain(setting, name, seed, self.trials[name])
            for seed in range(seeds)
            for name in names
        }
        self.results.make(specs.values())
        return {"E": self._table(specs, "E")}

    def ideas(self, name: str, seeds: int) -> Table:
        """Variants on a setting, beside uniform, the oracle and what they vary."""
        setting, tried = self.settings[name], IDEAS[name]
        keys = {idea: [f"algorithms.online_mixing.{key}" for key in keys] for idea, (_, keys) in tried.items()}
        base = dict.fromkeys(contender for contender, _ in tried.values())
        specs = {
            (name, each, seed): self._spec(setting, each, seed)
            for each in ("uniform", "oracle", *base)
            for seed in range(seeds)
        }
        for idea, (contender, _) in tried.items():
            for seed in range(seeds):
                trial = self.trials[contender]
                specs[name, idea, seed] = spec_of(self.corpus, setting, contender, seed, trial=trial, extra=keys[idea])
        self.results.make(specs.values())
        return self._table(specs, name)

    def transfer(self, seeds: int) -> dict[str, Table]:
        """The schedules of A1's small runs, replayed on a model more than five times larger."""
        setting, tables = self.settings["A1"], {}
        for name in ("matching",):
            specs = {
                ("A1", each, seed): self._large(setting, each, name, seed)
                for seed in range(seeds)
                if self.results.get(self._spec(setting, name, seed)) is not None
                for each in _TRANSFERRED
            }
            self.results.make(specs.values())
            tables[name] = self._table(specs, "A1")
        return tables

    def _large(self, setting: Setting, kind: str, name: str, seed: int) -> RunSpec:
        if kind == "uniform":
            return spec_of(self.corpus, setting, "uniform", seed, **LARGE)
        small = self._result(self._spec(setting, name, seed))
        first = dict.fromkeys(setting.sources, 1.0)
        points = replay_points(changes_of(small["decisions"], first, setting.steps), setting.steps, setting.steps)
        keys = ["strategy=schedule", f"schedule.points={json.dumps(points)}", "interval=1ba"]
        keys += ["constraints.floor=0.0", "constraints.kl_step=null"]
        extra = [f"algorithms.online_mixing.{key}" for key in keys]
        return spec_of(self.corpus, setting, "uniform", seed, extra=extra, **LARGE)

    def _spec(self, setting: Setting, name: str, seed: int) -> RunSpec:
        if CONTENDERS[name].kind == "offline" or name == "oracle":
            return spec_of(self.corpus, setting, name, seed, weights=self.weights[setting.name, name])
        return self._plain(setting, name, seed, self.trials[name])

    def _plain(self, setting: Setting, name: str, seed: int, trial: int, **more: int) -> RunSpec:
        extra = []
        if name == "doremi":
            extra.append(f"algorithms.online_mixing.doremi.reference={{root}}/models/{self._reference(setting).key}")
        return spec_of(self.corpus, setting, name, seed, trial=trial, extra=extra, **more)

    def _reference(self, setting: Setting) -> RunSpec:
        return spec_of(
            self.corpus, setting, "uniform", SEARCH_SEED, steps=min(setting.steps, REFERENCE_STEPS), save=True
        )

    def _result(self, spec: RunSpec) -> Result:
        found = self.results.get(spec)
        assert found is not None, spec.label
        return found

    def _loss(self, spec: RunSpec, setting: Setting) -> float:
        return float(target_loss(self._result(spec), setting)[-1])

    def _table(self, specs: dict[tuple[str, str, int], RunSpec], setting: str) -> Table:
        table: Table = {}
        for (of, contender, _), spec in specs.items():
            if of == setting and (found := self.results.get(spec)) is not None:
                table.setdefault(contender, []).append(found)
        return table


_TRANSFERRED = ("uniform", "replayed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of further sources")
    parser.add_argument("--out", type=Path, default=Path("data/bench_mixing"), help="keeps shards, runs and the report")
    parser.add_argument("--settings", nargs="+", default=[*SCORED, "D", "E"], choices=[*SCORED, "D", "E"])
    parser.add_argument(
        "--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="beside uniform and oracle"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="run nothing, report on what is there")
    parser.add_argument("--no-tuning", action="store_true", help="the first trial of each contender")
    parser.add_argument("--ideas", action="store_true", help="what was tried on A3 and C, and nothing else")
    parser.add_argument("--transfer", action="store_true", help="also replay A1's schedules on a larger model")
    given = parser.parse_args()
    root = given.out.resolve()
    corpus = make_corpus(root, given.corpora)
    results = Results(root, 0 if given.report else given.processes)
    bench = Benchmark(corpus, results, ["uniform", "oracle", *given.only])
    if not given.no_tuning:
        for name in TUNING:
            bench.results.make([bench._reference(bench.settings[name])])
        bench.tune()
        print("frozen:", {name: CONTENDERS[name].trials[trial] for name, trial in bench.trials.items() if trial})
    scored = [name for name in SCORED if name in given.settings]
    bench.search(scored)
    if given.ideas:
        print_tables({name: bench.ideas(name, min(given.seeds, PORT_SEEDS)) for name in IDEAS}, bench.settings, {})
        return
    bench.compare(scored, given.seeds, core_only=True)  # What the other parts build on comes first.
    tables: dict[str, Table] = {}
    if "D" in given.settings:
        tables["D"] = bench.exhaust(min(given.seeds, PORT_SEEDS))
    if "E" in given.settings:
        tables |= bench.change(min(given.seeds, PORT_SEEDS))
    transfers = bench.transfer(min(given.seeds, PORT_SEEDS)) if given.transfer else {}
    tables = bench.compare(scored, given.seeds) | tables
    print_tables(tables, bench.settings, transfers)
    write_report(root / "report", tables, bench.settings, bench.weights, bench.trials, transfers)


if __name__ == "__main__":
    main()
