"""Cost of distillation, as a multiple of one plain cross-entropy step of the student with full logits.

    python tools/bench/distillation_cost.py [--vocab 8192 32768 131072] [--only NAME] [--repeats 5] [--json FILE]
        [--markdown] [--quick]

Student and teacher are Hugging Face Llamas of random weights with tied embeddings, some 4 and 15 million parameters,
less of which are in layers the larger the vocabulary; 4 rows of 512 random tokens, float32, one thread. A step is the
student's forward and backward (no optimizer), with the teacher's forward where the teacher is live. "Full" is what
autograd makes of whole logits; "chunked" takes hidden states. Top-k is 32 ids and tail, sampled 12 ids. Each case takes
turns with its baselines, and the figure is the ratio of CPU times (of the process) in the same turn: median [quartiles]
over the turns. Memory is the peak of a process of its own beyond both models, their gradients and the batch, over that
of the plain step. Liger's chunked loss is measured where `liger_kernel` is installed. All three vocabularies take some
20 CPU-minutes; `--quick` (one turn, the first vocabulary, 2 rows of 64, no memory) seconds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining.distillation import (
    DenseTargets,
    HiddenTargets,
    OutputHead,
    SampledTargets,
    Targets,
    TopKTargets,
    chunked_distillation_loss,
    distillation_loss,
)
from cheapertraining.influence.losses import IGNORED, per_sample_loss
from tools.bench._influence_memory import MIB, _status
from tools.bench._influence_setting import cpu_seconds

# By vocabulary: hidden size, feed-forward size and blocks of student and teacher.
SIZES = {
    8192: ((192, 512, 6), (384, 1024, 8)),
    32768: ((96, 256, 6), (256, 704, 8)),
    131072: ((32, 88, 6), (96, 256, 8)),
}
ROWS, LENGTH, HEAD_SIZE = 4, 512, 32
TOP_K, DRAWN = 32, 12
PLAIN, CHUNKED = "cross-entropy, full", "cross-entropy, chunked"
_HERE = "tools.bench.distillation_cost"


@dataclass(frozen=True)
class Setting:
    """Models and a batch of ``rows`` of ``length`` tokens, made when they are first used and kept."""

    vocabulary: int
    rows: int = ROWS
    length: int = LENGTH

    def __str__(self) -> str:
        return f"V = {self.vocabulary:,}"

    @functools.cached_property
    def student(self) -> LlamaForCausalLM:
        return _model(self.vocabulary, *SIZES[self.vocabulary][0]).train()

    @functools.cached_property
    def teacher(self) -> LlamaForCausalLM:
        return _model(self.vocabulary, *SIZES[self.vocabulary][1]).eval().requires_grad_(False)

    @functools.cached_property
    def ids(self) -> Tensor:
        return torch.randint(self.vocabulary, (self.rows, self.length), generator=torch.Generator().manual_seed(1))

    @functools.cached_property
    def labels(self) -> Tensor:
        return torch.cat([torch.full_like(self.ids[:, :1], IGNORED), self.ids[:, 1:]], dim=1)

    def stored_ids(self, count: int) -> Tensor:
        """Distinct at each position, all over the vocabulary."""
        return (self.ids[..., None] + torch.arange(count) * (self.vocabulary // count)) % self.vocabulary

    @functools.cached_property
    def top_k(self) -> TopKTargets:
        log_probs = torch.randn(self.rows, self.length, TOP_K + 1).log_softmax(dim=-1)
        return TopKTargets(self.stored_ids(TOP_K), log_probs[..., :-1], log_probs[..., -1])

    @functools.cached_property
    def sampled(self) -> SampledTargets:
        return SampledTargets(self.stored_ids(DRAWN), torch.full((self.rows, self.length, DRAWN), 1 / DRAWN))


def _model(vocabulary: int, hidden: int, intermediate: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _states(model: LlamaForCausalLM, setting: Setting) -> Tensor:
    states = model.model(input_ids=setting.ids).last_hidden_state
    assert isinstance(states, Tensor)
    return states


def _head(model: LlamaForCausalLM) -> OutputHead:
    return OutputHead(model.lm_head.weight)


def _plain(setting: Setting) -> None:
    """As `CausalLM.loss`."""
    sums, tokens = per_sample_loss(setting.student(input_ids=setting.ids).logits, setting.labels)
    (sums.sum() / tokens.sum()).backward()


def _full(setting: Setting, targets: Callable[[Setting], Targets]) -> None:
    given = targets(setting)
    distillation_loss(setting.student(input_ids=setting.ids).logits, given, setting.labels).total.backward()


def _chunked(setting: Setting, targets: Callable[[Setting], Targets | None], **options: bool) -> None:
    given = targets(setting)
    states = _states(setting.student, setting)
    loss = chunked_distillation_loss(states, _head(setting.student), given, setting.labels, **options)
    loss.total.backward()


def _checkpointed(setting: Setting) -> None:
    """With the activations of the student's layers computed again in the backward pass."""
    setting.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        _chunked(setting, _live_states)
    finally:
        setting.student.gradient_checkpointing_disable()


@torch.no_grad()
def _live_logits(setting: Setting) -> Targets:
    return DenseTargets(setting.teacher(input_ids=setting.ids).logits)


@torch.no_grad()
def _live_states(setting: Setting) -> Targets:
    return HiddenTargets(_states(setting.teacher, setting), _head(setting.teacher))


def _liger(setting: Setting) -> None:
    """Forward KL and cross-entropy in equal shares, by the chunked loss of Liger that needs no Triton kernel."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=False, chunk_size=LENGTH // 4
    )
    with torch.no_grad():
        teacher = _states(setting.teacher, setting).flatten(0, 1)
    states = _states(setting.student, setting).flatten(0, 1)
    following = torch.nn.functional.pad(setting.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    heads = (setting.student.lm_head.weight, teacher, setting.teacher.lm_head.weight)
    loss(states, *heads, following).backward()


@dataclass(frozen=True)
class Case:
    """What is measured: a step, and the most it may cost in time and memory, by the goals of the project.

    Attributes:
        run: one step.
        time: at most, over that of ``against``.
        memory: at most, over that of ``against``.
        against: the step that goals are ratios to.
    """

    run: Callable[[Setting], None]
    time: float | None = None
    memory: float | None = None
    against: str = PLAIN


CASES = {
    PLAIN: Case(_plain),
    CHUNKED: Case(lambda setting: _chunked(setting, lambda _: None)),
    "KL, live teacher, full": Case(lambda setting: _full(setting, _live_logits)),
    "KL, live teacher, chunked": Case(lambda setting: _chunked(setting, _live_states), memory=0.40),
    "KL, live teacher, chunked, with statistics": Case(
        lambda setting: _chunked(setting, _live_states, statistics=True)
    ),
    "KL, live teacher, chunked, layers checkpointed": Case(_checkpointed, memory=0.40),
    "KL, live teacher, Liger's chunked loss": Case(_liger),
    "top-32 and tail, cached, full": Case(lambda setting: _full(setting, lambda s: s.top_k)),
    "top-32 and tail, cached, chunked": Case(lambda setting: _chunked(setting, lambda s: s.top_k), time=1.05),
    "12 sampled, cached, chunked": Case(
        lambda setting: _chunked(setting, lambda s: s.sampled), time=1.05, memory=1.05, against=CHUNKED
    ),
    "teacher's forward without head": Case(lambda setting: (_live_states(setting), None)[1]),
}


@dataclass(frozen=True)
class Row:
    """One figure of the report: median and quartiles of a ratio to ``against``."""

    setting: str
    figure: str
    name: str
    against: str
    median: float
    low: float
    high: float
    goal: float | None = None

    def __str__(self) -> str:
        spread = f" [{self.low:.2f}, {self.high:.2f}]" if self.low != self.high else ""
        goal = (
            "" if self.goal is None else f" (goal {self.goal:.2f}: {'met' if self.median <= self.goal else 'missed'})"
        )
        return f"{self.median:.2f}{spread}{goal}"


def times(setting: Setting, names: Sequence[str], turns: int) -> list[Row]:
    """Ratios of CPU times, turn by turn, after a turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        # Whoever comes second finds a cache that the first has filled: change places.
        for name in names if turn % 2 else list(reversed(names)):
            seconds = cpu_seconds(lambda name=name: CASES[name].run(setting))  # type: ignore[misc]
            setting.student.zero_grad()
            if turn:
                found[name].append(seconds)
    rows = [Row(str(setting), "time", f"{PLAIN}, s", "", *[min(found[PLAIN])] * 3)]
    for name in names:
        case = CASES[name]
        for against in dict.fromkeys((PLAIN, case.against)):
            if name == against:
                continue
            values = sorted(own / base for own, base in zip(found[name], found[against], strict=True))
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if turns > 1 else values * 3
            goal = case.time if against == case.against else None
            rows.append(Row(str(setting), "time", name, against, middle, low, high, goal))
    return rows


def peak(vocabulary: int, name: str) -> int:
    """Bytes that this process needs at most, in the second step, beyond the models, gradients and the batch."""
    torch.set_num_threads(1)
    setting = Setting(vocabulary)
    small = Setting(vocabulary, 1, 8)
    vars(small).update(student=setting.student, teacher=setting.teacher)
    CASES[name].run(small)  # whatever torch sets up at first
    for parameter in setting.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert all((len(setting.labels), setting.top_k, setting.sampled))
    gc.collect()
    before = _status("VmRSS")
    CASES[name].run(setting)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    CASES[name].run(setting)
    return _status("VmHWM") - before


def memory(setting: Setting, names: Sequence[str]) -> list[Row]:
    """Ratios of peaks, each in a process of its own forked off a server that has only imported what it needs."""
    # Freed memory must not hide what is needed anew: the allocator gives back at once all but the smallest blocks.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_HERE])
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = pool.submit(peak, setting.vocabulary, name).result()
    rows = [Row(str(setting), "memory", f"{PLAIN}, MiB", "", *[found[PLAIN] / MIB] * 3)]
    for name in names:
        case = CASES[name]
        for against in dict.fromkeys((PLAIN, case.against)):
            if name != against:
                goal = case.memory if against == case.against else None
                rows.append(Row(str(setting), "memory", name, against, *[found[name] / found[against]] * 3, goal))
    return rows


def tables(rows: Sequence[Row]) -> str:
    """Markdown: time and memory, a column a vocabulary, with goals."""
    lines = []
    for figure in dict.fromkeys(row.figure for row in rows):
        mine = [row for row in rows if row.figure == figure]
        settings = list(dict.fromkeys(row.setting for row in mine))
        lines += [f"| {figure} | over | {' | '.join(settings)} |", "|---" * (len(settings) + 2) + "|"]
        for name, against in dict.fromkeys((row.name, row.against) for row in mine):
            cells = {row.setting: str(row) for row in mine if (row.name, row.against) == (name, against)}
            lines.append(f"| {name} | {against} | {' | '.join(cells.get(setting, '') for setting in settings)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--only", default="", help="cases whose name holds this, and what they are compared with")
    parser.add_argument("--repeats", type=int, default=5, help="turns; three at most of the largest vocabulary")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--markdown", action="store_true", help="print tables, and progress to stderr")
    parser.add_argument("--quick", action="store_true", help="one turn, the first vocabulary, a small batch, no memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    progress = sys.stderr if arguments.markdown else sys.stdout
    names = [name for name in CASES if arguments.only in name or name in (PLAIN, CHUNKED)]
    if importlib.util.find_spec("liger_kernel") is None:
        names = [name for name in names if "Liger" not in name]
        print("not installed, left out: liger_kernel", file=sys.stderr)
    rows: list[Row] = []

    def report(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            print(f"  {row.figure:<7} {row.name:<45} over {row.against:<23} {row}", file=progress, flush=True)

    for vocabulary in arguments.vocab[:1] if arguments.quick else arguments.vocab:
        setting = Setting(vocabulary, 2, 64) if arguments.quick else Setting(vocabulary)
        print(setting, file=progress, flush=True)
        turns = 1 if arguments.quick else min(arguments.repeats, 3) if vocabulary > 1 << 16 else arguments.repeats
        report(times(setting, names, turns))
        if not arguments.quick:
            report(memory(setting, names))
    if arguments.markdown:
        print(tables(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
