"""What online mixing costs: its share of step time, and the batches from a change of weights to the first batch drawn.

    python tools/bench/mixing_overhead.py [--rounds 5] [key=value ...]

The run is `yamls/mixed_pretrain.yaml` on shards of the embedded sample's shapes (8 sources, rows of 128 tokens,
vocabulary 8,192), made from the standard library. Three trainers take turns of one interval each, on one thread:
strategy influence, strategy static (which keeps the books but does not measure), and no online mixing at all. Printed
are medians over the rounds of CPU time; a decision comes at the end of each turn, so what it costs is seen within a run
as well. Wanted is less than 5 % of step time. The lag is counted in runs whose weights jump from one source to another,
with and without a worker; wanted is `train_loader.lag` to the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from cheapertraining.config import RunConfig, load_run_config, split_duration
from cheapertraining.data import MixedDataset
from tools.bench._shards import library_texts, write_sources
from tools.bench._trainer import StepClock, build_trainer, close_quietly, fit_quietly

SOURCES, VOCAB, SEQ_LEN = 8, 8192, 128
TEXT_BYTES = 2_000_000
MIXING = "algorithms.online_mixing"
CONTENDERS = {
    "influence": [f"{MIXING}.strategy=influence"],
    "static": [f"{MIXING}.strategy=static"],
    "none": [f"{MIXING}=null"],
}
LAG_INTERVAL, LAG_CHANGES = 5, 6


def run_config(folder: Path, name: str, overrides: list[str]) -> RunConfig:
    """`yamls/mixed_pretrain.yaml` on the shards in ``folder``, without a console and without end."""
    return load_run_config(
        "mixed_pretrain",
        [
            f"compose.data={folder}/data.yaml",
            f"save_folder={folder}/runs",
            f"run_name={name}",
            "device=cpu",
            "max_duration=100000ba",
            "save_interval=100000ba",
            # Each turn ends as a run does, with an evaluation that is not measured.
            "eval_loader.interval=100000ba",
            "eval_loader.first=false",
            "eval_loader.batch_size=1",
            "eval_loader.subset_num_batches=1",
            "loggers.console=null",
            "loggers.wandb=null",
            *overrides,
        ],
    )


def interval_of(config: RunConfig) -> int:
    assert config.algorithms.online_mixing is not None
    return int(split_duration(config.algorithms.online_mixing.interval)[0])


def compare_costs(folder: Path, overrides: list[str], rounds: int) -> None:
    """Print the cost of an interval with each contender, and of a decision."""
    clocks = {name: StepClock() for name in CONTENDERS}
    configs = {name: run_config(folder, name, [*own, *overrides]) for name, own in CONTENDERS.items()}
    trainers = {name: build_trainer(config, clocks[name]) for name, config in configs.items()}
    interval = interval_of(configs["influence"])
    plain: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    last: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            fit_quietly(trainer, interval)
            *others, end = clocks[name].steps()
            if number:  # the first turn warms up
                plain[name].append(statistics.fmean(others))
                last[name].append(end)
    for trainer in trainers.values():
        close_quietly(trainer)
    # The first step of a turn, which also starts a fit, is not among those measured: it is put at their mean.
    whole = {
        name: [(interval - 1) * mean + end for mean, end in zip(plain[name], last[name], strict=True)]
        for name in CONTENDERS
    }
    print(f"CPU-ms a step over an interval of {interval} batches, and the share that is added to the row below")
    names = list(CONTENDERS)
    for name, below in zip(names, [*names[1:], None], strict=True):
        added = [1 - base / mine for mine, base in zip(whole[name], whole[below], strict=True)] if below else [0.0]
        milliseconds = 1e3 * statistics.median(whole[name]) / interval
        print(f"  {name:10s} {milliseconds:8.1f} {statistics.median(added):8.1%}")
    decisions = zip(plain["influence"], last["influence"], whole["influence"], strict=True)
    share = statistics.median((end - mean) / total for mean, end, total in decisions)
    print(f"share of a decision, against the other steps of the same turn: {share:.1%}")
    print(f"share as logged (mixture/overhead, wall time): {logged_overhead(configs['influence']):.1%}")


def logged_overhead(config: RunConfig) -> float:
    """The last ``mixture/overhead`` of a run."""
    log = Path(config.save_folder) / str(config.run_name) / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return next(float(record["mixture/overhead"]) for record in reversed(records) if "mixture/overhead" in record)


class LagCounter(Callback):
    """Counts the batches from each change of weights to the first batch that shows it."""

    def __init__(self) -> None:
        self.mixture: MixedDataset | None = None
        self.lags: list[int] = []
        self._waiting: list[tuple[int, str]] = []
        self._newest: str | None = None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer's event; the batch is whole again, and the decision has been made."""
        assert self.mixture is not None
        batch = int(state.timestamp.batch) - 1  # the one just trained on, counted from 0
        seen = {self.mixture.source_names[i] for i in state.batch["source"].unique().tolist()}
        while self._waiting and self._waiting[0][1] in seen:
            # Decided after batch `decided`: were the next one drawn with the new weights, the lag would be 0.
            self.lags.append(batch - self._waiting.pop(0)[0] - 1)
        weights = self.mixture.get_current_weights()
        newest = max(weights, key=lambda name: weights[name])
        if self._newest not in (None, newest):
            self._waiting.append((batch, newest))
        self._newest = newest


def count_lags(folder: Path, overrides: list[str], workers: int) -> None:
    """Print the lags of a short run whose weights move from one source to the next at each decision."""
    lag = run_config(folder, "lag", overrides).train_loader.lag
    places = [0, *(LAG_INTERVAL * (i + 1) + lag for i in range(LAG_CHANGES))]
    names = [f"part{i % SOURCES}" for i in range(len(places))]
    points = ", ".join(
        f"{{batch: {place}, weights: {{{name}: 1.0}}}}" for place, name in zip(places, names, strict=True)
    )
    counter = LagCounter()
    config = run_config(
        folder,
        f"lag{workers}",
        [
            *overrides,
            f"train_loader.num_workers={workers}",
            f"{MIXING}.strategy=schedule",
            f"{MIXING}.schedule.points=[{points}]",
            f"{MIXING}.interval={LAG_INTERVAL}ba",
            f"{MIXING}.constraints.floor=0.0",
            f"{MIXING}.constraints.kl_step=null",
            "model.hidden_size=16",
            "model.intermediate_size=32",
            "model.num_layers=1",
        ],
    )
    trainer = build_trainer(config, counter)
    counter.mixture = trainer.state.train_dataloader.dataset
    fit_quietly(trainer, places[-1] + 2)
    close_quietly(trainer)
    print(f"lag of {lag} batches, {workers} workers: {counter.lags}")
    if counter.lags != [lag] * LAG_CHANGES:
        raise SystemExit(f"expected {LAG_CHANGES} changes, each after {lag} batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the run")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        texts = library_texts(TEXT_BYTES)
        sources = {f"part{i}": texts[i::SOURCES] for i in range(SOURCES)}
        write_sources(Path(name), sources, "part0", vocab_size=VOCAB, seq_len=SEQ_LEN)
        compare_costs(Path(name), given.overrides, given.rounds)
        for workers in (0, 1):
            count_lags(Path(name), given.overrides, workers)


if __name__ == "__main__":
    main()
