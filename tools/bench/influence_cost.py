"""Cost of influence, as a multiple of one plain forward and backward of the same batch.

    OMP_NUM_THREADS=1 python tools/bench/influence_cost.py [--params 2.5M] [--repeats 9] [--only fused]

A Hugging Face Llama of random weights (vocabulary 2,048, untied) and random tokens, 4,096 a batch: 32 rows of 128
and 8 of 512. Each candidate takes turns with the plain step; the number is the ratio of their CPU times in the same
round (process time, one thread), printed as median and quartiles over the rounds. A fused candidate is a whole training
step with scores; a hook candidate is a pass of its own, beside training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining.influence.losses import token_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.scorers.consumers import Projection
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.influence.scorers.hook import hook_norms, hook_projected, hook_scores

VOCABULARY, TOKENS = 2048, 4096
LENGTHS = (128, 512)
# Hidden size and blocks; the feed-forward layer is 8/3 of the hidden size.
SIZES = {"2.5M": (192, 4), "10M": (320, 6)}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a candidate's CPU time over that of the plain step beside it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def make_model(params: str = "2.5M") -> LlamaForCausalLM:
    """A Llama in training mode, without dropout; ``params`` is a key of ``SIZES``."""
    hidden, blocks = SIZES[params]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=max(LENGTHS),
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batch(length: int, seed: int = 1, tokens: int = TOKENS) -> Batch:
    """Random tokens, one document a row."""
    ids = torch.randint(0, VOCABULARY, (tokens // length, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = -100
    positions = torch.arange(length).expand_as(ids).contiguous()
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def make_directions(model: nn.Module, count: int) -> Directions:
    """Random directions of all parameters."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(count, *parameter.shape, generator=generator)
        for name, parameter in select_parameters(model).items()
    }
    return Directions(tuple(f"probe {k}" for k in range(count)), tensors)


def step(model: nn.Module, batch: Batch) -> None:
    """Forward and backward, as a training loop does them."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    losses, counted = token_losses(logits, batch["labels"])
    (losses.sum() / counted.sum()).backward()


def plain_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """The baseline: a step from and to empty gradients."""

    def run() -> None:
        step(model, batch)
        model.zero_grad()

    return run


def fused_step(model: nn.Module, scorer: FusedScorer, batch: Batch) -> Callable[[], None]:
    """A step that scores."""
    scale = 1.0 / int((batch["labels"][:, 1:] != -100).sum())

    def run() -> None:
        with scorer.armed(batch):
            step(model, batch)
        scorer.collect(scale)
        model.zero_grad()

    return run


def cpu_seconds(run: Callable[[], None]) -> float:
    """Process CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(baseline: Callable[[], None], candidate: Callable[[], None], repeats: int) -> Ratio:
    """Take turns, after one round that does not count, and compare round by round."""
    baseline()
    candidate()
    found = []
    for turn in range(repeats):
        # Whoever comes second finds a cache that the first has filled: change places.
        if turn % 2:
            cost = cpu_seconds(candidate)
            found.append(cost / cpu_seconds(baseline))
        else:
            cost = cpu_seconds(baseline)
            found.append(cpu_seconds(candidate) / cost)
    low, median, high = statistics.quantiles(found, n=4)
    return Ratio(median, low, high)


def candidates(model: nn.Module, batch: Batch) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and what to run."""
    one, eight = make_directions(model, 1), make_directions(model, 8)
    parameters = select_parameters(model)
    projection = Projection.random(parameters, rank=16, seed=0)

    def scored(directions: Directions) -> Callable[[], None]:
        return lambda: void(hook_scores(model, directions, batch))

    yield "fused, 1 direction", fused_step(model, FusedScorer(model, one), batch)
    yield "fused, 8 directions", fused_step(model, FusedScorer(model, eight), batch)
    yield "fused, 8 directions and norms", fused_step(model, FusedScorer(model, eight, norms=True), batch)
    yield "fused DataInf, 8 directions", fused_step(model, FusedScorer(model, eight, datainf=0.1), batch)
    yield "hook, 1 direction", scored(one)
    yield "hook, 8 directions", scored(eight)
    yield "hook, norms", lambda: void(hook_norms(model, parameters, batch))
    yield "hook, projected to rank 16", lambda: void(hook_projected(model, projection, batch))


def void(value: object) -> None:
    """Drop a result."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", choices=SIZES, nargs="+", default=["2.5M"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="candidates whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for params in arguments.params:
        model = make_model(params)
        for length in LENGTHS:
            batch = make_batch(length)
            baseline = plain_step(model, batch)
            print(f"{params} parameters, {TOKENS // length} rows of {length} tokens, plain step 1.000", flush=True)
            for name, run in candidates(model, batch):
                if arguments.only in name:
                    print(f"  {name:<32} {ratio(baseline, run, arguments.repeats)}", flush=True)


if __name__ == "__main__":
    main()
