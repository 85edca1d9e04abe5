"""What looking costs: CPU time of logging and monitoring to that of the steps, and sizes of what a run leaves.

    python tools/bench/observing.py [--batches 300] [--steps 10000] [--sources 20] [key=value ...]

First a log of --steps steps with --sources sources, written by the logger of runs, its report, and the pictures of such
a run for W&B. Then the run of `make train` without mixing, its evaluations left out: CPU time inside callbacks and
loggers that watch (ours, Composer's monitors, W&B offline with its pictures), and of W&B's own process, against that of
the whole steps; and the process's peak of memory against the estimate that start-up prints.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast


class Watch:
    """CPU time of this thread inside the watched calls, nested ones once."""

    def __init__(self) -> None:
        self.by_name: dict[str, float] = {}
        # (process time, time in calls, time of processes that this one has started) after each batch
        self.marks: list[tuple[float, float, float]] = []
        self._inside = False

    def watch(self, owner: type, method: str, mark: str | None = None) -> None:
        """Time ``method`` of a class; after an event of the name ``mark``, note where time stands."""
        own: Callable[..., Any] = getattr(owner, method)

        @wraps(own)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return own(*arguments, **options)
            self._inside, started = True, time.thread_time()
            try:
                return own(*arguments, **options)
            finally:
                self._inside = False
                spent = time.thread_time() - started
                self.by_name[owner.__name__] = self.by_name.get(owner.__name__, 0.0) + spent
                if mark is not None and getattr(arguments[1], "value", None) == mark:
                    self.marks.append((time.process_time(), sum(self.by_name.values()), _others()))

        setattr(owner, method, timed)


def _others() -> float:
    import psutil

    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def overhead(batches: int, overrides: list[str]) -> None:
    """Train and print the share of each watcher."""
    from composer.callbacks import LRMonitor, SpeedMonitor
    from composer.loggers import WandBLogger

    from cheapertraining.config import load_run_config
    from cheapertraining.observe import ConsoleLines, JsonlLogger, MixtureCourse, Pictures, RunHealth
    from cheapertraining.observe.startup import startup_lines
    from cheapertraining.training import train

    watch = Watch()
    for kind in (LRMonitor, SpeedMonitor, RunHealth, MixtureCourse, ConsoleLines, Pictures):
        watch.watch(kind, "run_event")
    for destination in (WandBLogger, JsonlLogger):
        watch.watch(destination, "log_metrics")
    watch.watch(JsonlLogger, "run_event", mark="batch_end")
    imported = _peak()
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"save_folder={folder}", f"max_duration={batches}ba", "save_interval=10000ba", "device=cpu"]
        settings += ["eval_loader.first=false", "eval_loader.interval=10000ba", "eval_loader.subset_num_batches=1"]
        settings += ["algorithms.online_mixing.strategy=static", "loggers.wandb.mode=offline"]
        config = load_run_config("mixed_pretrain", [*settings, *overrides])
        train(config)
    # The first steps allocate; the last mark comes after the pictures of the end.
    (begun, spent, others), (ended, all_spent, all_others) = watch.marks[4], watch.marks[-1]
    steps = len(watch.marks) - 5
    step, watching, beside = (ended - begun) / steps, (all_spent - spent) / steps, (all_others - others) / steps
    print(f"step: {step * 1e3:.1f} ms of CPU time, {steps} steps")
    print(f"logging and monitoring: {watching * 1e3:.2f} ms, {watching / step:.2%}", end="; ")
    print(f"W&B's own process beside: {beside * 1e3:.2f} ms, {beside / step:.2%}")
    for name, seconds in sorted(watch.by_name.items(), key=lambda item: -item[1]):
        print(f"  {name:<14} {seconds / len(watch.marks) * 1e3:.3f} ms a step, set-up included")
    print(f"peak of resident memory {_peak():.0f} MiB, {_peak() - imported:.0f} above that after the imports", end="; ")
    print(*(line.strip() for line in startup_lines(config) if "memory" in line))


def _peak() -> float:
    """MiB, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def pictures(steps: int, sources: int) -> None:
    """Print what a pair of pictures costs late in a run whose mixture moved every 25 steps."""
    import numpy as np

    from cheapertraining.observe.pictures import mixture_picture, score_picture

    names = [f"source{k}" for k in range(sources)]
    at = np.arange(1, steps + 1, 25).repeat(2)
    shares = np.random.default_rng(0).dirichlet(np.ones(sources), len(at))
    table: dict[str, dict[str, float | None]] = {"probe": dict.fromkeys(names, 1.0)}
    for _ in range(2):  # the first imports Matplotlib
        started = time.process_time()
        mixture_picture(at, shares, names)
        score_picture(table, table, names)
        spent = time.process_time() - started
    print(f"a pair of pictures: {spent:.2f} s of CPU time")


def sizes(steps: int, sources: int) -> None:
    """Write a log and print how large it and its report are, and what they cost."""
    from composer.core import State, Timestamp
    from composer.loggers import Logger

    from cheapertraining.observe import JsonlLogger
    from cheapertraining.observe.report import write_report

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "long"
        state, nothing = SimpleNamespace(run_name="long", timestamp=Timestamp()), cast(Logger, None)
        logger = JsonlLogger(folder)
        logger.init(cast(State, state), nothing)
        logger.fit_start(cast(State, state), nothing)
        started = time.process_time()
        for step in range(1, steps + 1):
            logger.log_metrics(_metrics(step, sources), step)
            state.timestamp = Timestamp(batch=step, token=4096 * step)
            logger.batch_end(cast(State, state), nothing)
        logger.fit_end(cast(State, state), nothing)
        written = time.process_time() - started
        report = write_report(folder)
        drawn = time.process_time() - started - written
        log_size, report_size = (folder / "metrics.jsonl").stat().st_size, report.stat().st_size
    from cheapertraining.observe.page import page

    empty = len(page("", "", {}).encode())
    print(f"{steps:,} steps, {sources} sources: metrics.jsonl {log_size / 2**20:.1f} MiB", end="")
    print(f" ({log_size / steps:.0f} bytes and {written / steps * 1e3:.3f} ms a step);", end=" ")
    print(f"report.html {report_size / 2**20:.1f} MiB, {(report_size - empty) / 2**20:.2f} without Plotly,", end=" ")
    print(f"drawn in {drawn:.1f} s of CPU time")


def _metrics(step: int, sources: int) -> dict[str, float]:
    """What a run logs: the loss of each batch, the mixture every 10, evaluations and scores every 100."""
    metrics = {"loss/train/total": 3.123456789 - step * 1e-5, "time/token": step * 4096.0, "time/batch": float(step)}
    metrics |= {f"time/{name}": step * 1.23456789e-4 for name in ("train", "val", "total")}
    metrics |= {"lr-AdamW/group0": 1.23456789e-3, "lr-AdamW/group1": 1.23456789e-3}
    metrics |= {f"throughput/{name}_per_sec": 12345.6789 for name in ("tokens", "samples", "batches", "flops")}
    if step % 10 == 0:
        metrics |= {"gradient/norm": 0.123456789, "weight/norm": 123.456789, "time/data_wait": 0.00123456789}
        metrics |= {"event/loss_spikes": 0.0, "event/nonfinite": 0.0}
        metrics |= {"mixture/overhead": 0.0123456789, "memory/host_peak": 1.23456789}
        for what in ("weight", "sampled", "objective", "share", "tokens", "epochs", "tokens_left"):
            metrics |= {f"mixture/{what}/source{k}": (1 + k * step * 1e-4) / sources for k in range(sources)}
        metrics |= {f"loss/train/source{k}": 3.123456789 + k for k in range(sources)}
    if step % 100 == 0:
        metrics |= {f"metrics/heldout/source{k}/TokenCrossEntropy": 3.123456789 + k for k in range(sources)}
        for what in ("score", "score_se"):
            metrics |= {f"mixture/{what}/probe/source{k}": 0.00123456789 * k for k in range(sources)}
    return metrics


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=300, help="of the run; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=10_000, help="of the log that is written")
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run")
    given = parser.parse_intermixed_args()
    sizes(given.steps, given.sources)
    pictures(given.steps, given.sources)
    if given.batches:
        overhead(given.batches, given.overrides)


if __name__ == "__main__":
    main()
