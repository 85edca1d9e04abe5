"""Planning cost: milliseconds to plan a global batch, time to make the plan, and its memory; growth with K and G.

    python tools/bench/plan.py [--sources 20] [--batch-size 1024] [--samples 5000000]

The default is a batch of 1,024 from 20 sources of 5M samples each, with new weights every 20 batches; wanted are less
than 0.5 ms a batch. The mean is what a run pays: it includes the blocks of samples that are shuffled now and then. The
first batch makes a block for every source, the worst of the others some of them. The baseline is the simplest sampler
there is, drawing sources and rows at random with replacement: no exact shares, no passes, no resumption. Further rows
show half and double of the sources and of the batch size. Times are CPU time; memory is what Python and NumPy hold
afterwards, and at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np

from cheapertraining.data.plan import MixturePlan

SAMPLES_IN_SHARD = 16384  # a shard of 64 MB with rows of 2,048 tokens
BATCHES_BETWEEN_CHANGES = 20
MAKINGS = 5


@dataclass(frozen=True)
class Shape:
    """Sources, samples of each, and rows of a batch."""

    sources: int
    samples: int
    batch_size: int

    def shard_sizes(self) -> dict[str, list[int]]:
        """Full shards and one that holds the rest, for each source."""
        full, rest = divmod(self.samples, SAMPLES_IN_SHARD)
        return {f"source{i}": [SAMPLES_IN_SHARD] * full + [rest] * bool(rest) for i in range(self.sources)}

    def weights(self, change: int) -> dict[str, float]:
        """Uneven weights, others at each change."""
        values = np.random.default_rng(change).dirichlet(np.full(self.sources, 5.0))
        return {f"source{i}": float(value) for i, value in enumerate(values)}


def make(shape: Shape) -> MixturePlan:
    return MixturePlan(shape.shard_sizes(), shape.weights(0), global_batch_size=shape.batch_size, seed=0)


def plan_batches(plan: MixturePlan, shape: Shape, batches: int) -> list[float]:
    """CPU-milliseconds of each batch; a change of weights counts as part of the batch that it comes before."""
    times = []
    for batch in range(batches):
        weights = shape.weights(batch) if batch and batch % BATCHES_BETWEEN_CHANGES == 0 else None
        start = time.process_time()
        if weights is not None:
            plan.set_weights(batch, weights)
        plan.plan(batch)
        times.append(1e3 * (time.process_time() - start))
    return times


def draw_batches(shape: Shape, batches: int) -> list[float]:
    """CPU-milliseconds of each batch of the baseline."""
    generator = np.random.default_rng(0)
    weights = np.array(list(shape.weights(0).values()))
    times = []
    for _ in range(batches):
        start = time.process_time()
        generator.choice(shape.sources, shape.batch_size, p=weights)
        generator.integers(0, shape.samples, shape.batch_size)
        times.append(1e3 * (time.process_time() - start))
    return times


def memory(shape: Shape, batches: int) -> tuple[float, float]:
    """MB held after planning ``batches``, and the most that was held meanwhile."""
    tracemalloc.start()
    plan = make(shape)
    for batch in range(batches):
        plan.plan(batch)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / 2**20, most / 2**20


def report(shape: Shape, batches: int, rounds: int) -> None:
    """Print one row."""
    makings = []
    for _ in range(MAKINGS):
        start = time.process_time()
        make(shape)
        makings.append(1e3 * (time.process_time() - start))
    medians, means, firsts, worsts, baseline = [], [], [], [], []
    for _ in range(rounds):
        times = plan_batches(make(shape), shape, batches)
        medians.append(statistics.median(times))
        means.append(statistics.fmean(times))
        firsts.append(times[0])
        worsts.append(max(times[1:]))
        baseline.append(statistics.fmean(draw_batches(shape, batches)))
    # Enough batches for every source to have gone on to its second block.
    held, most = memory(shape, min(batches, 2 * 65536 * shape.sources // shape.batch_size))
    ratio = statistics.median(mean / drawn for mean, drawn in zip(means, baseline, strict=True))
    print(
        f"{shape.sources:7d} {shape.batch_size:6d}   {statistics.median(medians):7.3f} {statistics.median(means):7.3f} "
        f"{statistics.median(firsts):7.1f} {statistics.median(worsts):7.1f} {ratio:9.1f}x   "
        f"{statistics.median(makings):8.1f} {held:7.1f} {most:7.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("--samples", type=int, default=5_000_000, help="in each source (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=1500, help="planned in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sources, batch_size = given.sources, given.batch_size
    print(f"{given.samples:,} samples a source, {given.batches:,} batches, medians of {given.rounds} rounds")
    print("sources  batch   ms/batch: median, mean, first, worst, mean to random   ms to make   MB held, at most")
    shapes = [(sources, batch_size)]
    shapes += [(max(1, sources // 2), batch_size), (2 * sources, batch_size)]
    shapes += [(sources, max(1, batch_size // 2)), (sources, 2 * batch_size)]
    for number, rows in shapes:
        report(Shape(number, given.samples, rows), given.batches, given.rounds)


if __name__ == "__main__":
    main()
