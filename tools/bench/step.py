"""Cost of a training step in Composer's trainer as `train.py` builds it, against a bare PyTorch loop.

    python tools/bench/step.py [--hidden 64 256] [--steps 10] [--rounds 9]

Both train the same model on the same batches (4 layers, 8 rows of 128 tokens, vocabulary 2,048) with the same
optimizer, learning rates and clipping, on one thread. The trainers add what `yamls/mixed_pretrain.yaml` names, one part
after the other. Contenders take turns of a few steps; printed are medians over the rounds of CPU-milliseconds a step
and of the ratio to the bare loop in the same round. Wanted are at most 1.1 (hidden 64) and 1.03 (hidden 256). That the
work is the same is checked: all loss curves must agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.nn import functional

from cheapertraining.builders import build_loader, build_model, build_optimizer, build_tokenizer, lr_multiplier
from cheapertraining.config import RunConfig, load_run_config, split_duration
from tools.bench._shards import library_texts, write_sources
from tools.bench._trainer import StepClock, build_trainer, close_quietly, fit_quietly

VOCAB, SEQ_LEN, ROWS, LAYERS = 2048, 128, 8, 4
SOURCES, TEXT_BYTES = 4, 1_000_000
BARE = "bare loop"
# Each row of the table has what the rows above it have; `null` switches a part off.
PARTS = {
    "Trainer": [],
    "+ monitors": ["callbacks.speed_monitor", "callbacks.lr_monitor", "callbacks.memory_monitor"],
    "+ console": ["loggers.console"],
    "+ jsonl": ["loggers.jsonl"],
    "+ mixture, static": ["algorithms.online_mixing"],
    "+ wandb, offline": ["loggers.wandb"],
}


class Losses(Callback):
    """The training loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer's event."""
        self.values.append(state.total_loss_dict["loss/train/total"])


def run_config(folder: Path, hidden: int, name: str, off: list[str]) -> RunConfig:
    """The run of `yamls/mixed_pretrain.yaml` on a small model, with some parts switched off."""
    return load_run_config(
        "mixed_pretrain",
        [
            f"compose.data={folder}/data.yaml",
            f"save_folder={folder}/runs",
            f"run_name=hidden{hidden}-{''.join(filter(str.isalpha, name))}",
            "device=cpu",
            "max_duration=100000ba",
            "save_interval=100000ba",
            f"model.hidden_size={hidden}",
            f"model.intermediate_size={3 * hidden}",
            f"model.num_layers={LAYERS}",
            f"train_loader.global_batch_size={ROWS}",
            "eval_loader.interval=100000ba",
            "eval_loader.first=false",
            "eval_loader.batch_size=1",
            "eval_loader.subset_num_batches=1",
            "scheduler.name=constant",
            "scheduler.warmup=0ba",
            *(["loggers.wandb.mode=offline"] if "loggers.wandb" not in off else []),
            *(["algorithms.online_mixing.strategy=static"] if "algorithms.online_mixing" not in off else []),
            *(f"{part}=null" for part in off),
        ],
    )


def bare_loop(config: RunConfig) -> Generator[tuple[float, float], None, None]:
    """Train without a trainer, one step at each ``next``; yields CPU-seconds and loss."""
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer, "fp32").model
    optimizer = build_optimizer(config.optimizer, model)
    length = split_duration(config.max_duration)[0]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_multiplier(config.scheduler, step / length, 0.0, 0.0)
    )
    model.train()
    start = time.process_time()
    for batch in build_loader(config, tokenizer):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()
        end = time.process_time()
        yield end - start, value
        start = time.process_time()


class BareContender:
    """The bare loop, a turn at a time; ``losses`` has all so far."""

    def __init__(self, config: RunConfig) -> None:
        self.losses: list[float] = []
        self._steps = bare_loop(config)

    def turn(self, steps: int) -> list[float]:
        """Train; CPU-seconds of each step but for one more at the beginning."""
        taken = [next(self._steps) for _ in range(steps + 1)]
        self.losses += [loss for _, loss in taken]
        return [seconds for seconds, _ in taken[1:]]

    def close(self) -> None:
        self._steps.close()


class TrainerContender:
    """A Composer trainer, a turn at a time."""

    def __init__(self, config: RunConfig) -> None:
        self._clock, recorder = StepClock(), Losses()
        self.losses = recorder.values
        self._trainer = build_trainer(config, recorder, self._clock)

    def turn(self, steps: int) -> list[float]:
        """As that of the bare loop."""
        fit_quietly(self._trainer, steps + 1)
        return self._clock.steps()

    def close(self) -> None:
        close_quietly(self._trainer)


def contenders(folder: Path, hidden: int) -> dict[str, BareContender | TrainerContender]:
    """By the names that the table gives them."""
    off = [part for parts in PARTS.values() for part in parts]
    found: dict[str, BareContender | TrainerContender] = {
        BARE: BareContender(run_config(folder, hidden, BARE, off)),
    }
    for name, parts in PARTS.items():
        off = [part for part in off if part not in parts]
        found[name] = TrainerContender(run_config(folder, hidden, name, off))
    return found


def compare(folder: Path, hidden: int, steps: int, rounds: int) -> None:
    """Print one table."""
    found = contenders(folder, hidden)
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, contender in found.items():
            mean = 1e3 * statistics.fmean(contender.turn(steps))
            if number:  # the first round warms up
                times[name].append(mean)
    for contender in found.values():
        contender.close()
    bare = times[BARE]
    before = 0.0
    print(f"hidden {hidden}: CPU-ms a step, ratio to the bare loop, added by this part")
    for name, values in times.items():
        milliseconds = statistics.median(values)
        ratio = statistics.median(value / base for value, base in zip(values, bare, strict=True))
        print(f"  {name:18s} {milliseconds:8.2f} {ratio:7.3f} {milliseconds - before:+8.2f}", flush=True)
        before = milliseconds
    curves = [contender.losses for contender in found.values()]
    worst = max(max(losses) - min(losses) for losses in zip(*curves, strict=True))
    print(f"  largest difference of two losses of the same step: {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("the contenders did not do the same work: their losses differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=10, help="of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        texts = library_texts(TEXT_BYTES)
        sources = {f"part{i}": texts[i::SOURCES] for i in range(SOURCES)}
        write_sources(Path(name), sources, "part0", vocab_size=VOCAB, seq_len=SEQ_LEN)
        for hidden in given.hidden:
            compare(Path(name), hidden, given.steps, given.rounds)


if __name__ == "__main__":
    main()
