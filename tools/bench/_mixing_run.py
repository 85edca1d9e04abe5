"""One run of the mixture benchmark: the product's loader, model, controller and strategies in a bare loop.

Composer's trainer is left out, since its start-up would take longer than many a run; its ``State`` is there, and
``OnlineMixing`` is called at the same events as in a trainer. Cost is counted in two units: process CPU time, and
*step equivalents*, in which a forward pass of a batch is 1/3 and a forward and backward pass is 1, whether weight
gradients were computed or not. Evaluation is not counted in either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Event, Precision, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.builders import build_loader, build_model, build_online_mixing, build_tokenizer
from cheapertraining.config import RunConfig, load_run_config
from cheapertraining.data import MixtureLoader
from cheapertraining.mixing.algorithm import OnlineMixing
from cheapertraining.models import CausalLM
from tools.bench._mixing_corpus import SEQ_LEN

RUN_VERSION = 1
BATCH = 16
_WARMUP, _CLIP = 30, 1.0
_PROBED = 192
_MEASURED = 256  # rows that a measurement may take in one pass
_LEARNING_RATE = 4e-3
_ROWS, _ROWS_OF_MANY = 128, 48  # held-out rows of a source: of a single target, and where several are judged


@dataclass(frozen=True)
class RunSpec:
    """All that decides a run's numbers; its hash is the name of the cached result.

    Attributes:
        corpus: fingerprint.
        data: what a data yaml says, under ``data``; folders relative to the corpus.
        judged: sources whose held-out loss is followed.
        steps, seed: of the run; the seed decides the model's initial weights and each source's order.
        overrides: ``key=value`` of the run's yaml.
        hidden, layers: of the model.
        evaluate_every: steps.
        probe: measure the probes' losses at the end, for methods that compare runs.
        label: for people.
        save: keep the trained model, as a Hugging Face folder ``{root}/models/<key>``; overrides may name it so.
    """

    corpus: str
    data: dict[str, Any]
    judged: tuple[str, ...]
    steps: int
    seed: int
    overrides: tuple[str, ...] = ()
    hidden: int = 64
    layers: int = 2
    evaluate_every: int = 25
    probe: bool = False
    save: bool = False
    version: int = RUN_VERSION
    label: str = ""

    @property
    def key(self) -> str:
        """Hash of everything above but the label."""
        content = json.dumps({**dataclasses.asdict(self), "label": ""}, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=10).hexdigest()


class WorkMeter:
    """Counts rows through the model and a reference, in batches of training: forward 1/3, forward and backward 1."""

    def __init__(self, *models: nn.Module | None) -> None:
        self.units = 0.0
        self._counting = False
        for model in models:
            if isinstance(model, CausalLM):
                model.model.get_input_embeddings().register_forward_pre_hook(self._count)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens inside."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._counting:
            rows = inputs[0].numel() / SEQ_LEN
            self.units += rows / BATCH * (1.0 if torch.is_grad_enabled() else 1 / 3)


@dataclass
class Course:
    """What is written down while a run goes on; one entry an evaluation, or a step."""

    steps: list[int] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    mixing_seconds: list[float] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    shares: list[list[float]] = field(default_factory=list)


def execute(spec: RunSpec, root: Path) -> dict[str, Any]:
    """Train, and return what the report needs, JSON-able."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(spec, root, Path(scratch))
        loader = build_loader(config, build_tokenizer(config))
        model = build_model(config, build_tokenizer(config), "fp32")
        mixing = config.algorithms.online_mixing
        algorithm = None if mixing is None else build_online_mixing(config, mixing, loader, Path(scratch))
        course = train(spec, model, loader, algorithm)
        result = _result(spec, loader, algorithm, course)
        if spec.probe:
            result["probe_losses"] = {name: evaluate(model, split, _PROBED) for name, split in loader.probes.items()}
        if spec.save:
            model.model.save_pretrained(root / "models" / spec.key)
    return result


def train(spec: RunSpec, model: CausalLM, loader: MixtureLoader, algorithm: OnlineMixing | None) -> Course:
    """The loop."""
    optimizer = torch.optim.AdamW(_groups(model), lr=_LEARNING_RATE, betas=(0.9, 0.95), foreach=True)
    base = [group["lr"] for group in optimizer.param_groups]
    state = State(
        model,
        spec.seed,
        "benchmark",
        DeviceCPU(),
        device_train_microbatch_size=_MEASURED,
        optimizers=optimizer,
        precision=Precision.FP32,
    )
    reference = None if algorithm is None else algorithm.reference
    logger, meter, course = Logger(state), WorkMeter(model, reference), Course()
    mixing_seconds = 0.0

    def tell(event: Event) -> None:
        nonlocal mixing_seconds
        if algorithm is not None and algorithm.match(event, state):
            began = time.process_time()
            with meter.counting():
                algorithm.apply(event, state, logger)
            mixing_seconds += time.process_time() - began

    started, outside = time.process_time(), 0.0
    tell(Event.FIT_START)
    for step, batch in enumerate(islice(loader, spec.steps), start=1):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * min(1.0, step / _WARMUP)
        state.batch = batch
        tell(Event.BATCH_START)
        state.outputs = model(batch)
        loss = model.loss(state.outputs, batch)
        tell(Event.AFTER_LOSS)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        state.timestamp = state.timestamp.to_next_batch(samples=BATCH, tokens=BATCH * SEQ_LEN)
        tell(Event.BATCH_END)
        course.shares.append(np.bincount(batch["source"], minlength=len(loader.mixture.source_names)).tolist())
        if step % spec.evaluate_every == 0 or step == spec.steps:
            now = time.process_time()
            course.steps.append(step)
            course.units.append(step + meter.units)
            course.cpu_seconds.append(now - started - outside)
            course.mixing_seconds.append(mixing_seconds)
            rows = _ROWS if len(spec.judged) == 1 else _ROWS_OF_MANY
            for name in spec.judged:
                course.losses.setdefault(name, []).append(evaluate(model, loader.heldout[name], rows))
            outside += time.process_time() - now
    return course


@torch.no_grad()
def evaluate(model: CausalLM, split: DataLoader[Any], rows: int) -> float:
    """Mean loss over the first ``rows`` rows of a split, nats per token."""
    total, tokens = 0.0, 0
    model.eval()
    for batch in islice(split, max(1, rows // BATCH)):
        outputs = model(batch)
        model.loss(outputs, batch)
        total += float(outputs["sample_loss_sum"].double().sum())
        tokens += int(outputs["sample_tokens"].sum())
    model.train()
    return total / tokens


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": 0.1, "lr": _LEARNING_RATE},
        {"params": kept, "weight_decay": 0.0, "lr": _LEARNING_RATE},
    ]


def _config(spec: RunSpec, root: Path, scratch: Path) -> RunConfig:
    """``yamls/mixed_pretrain.yaml`` with the spec on top."""
    sources = {
        name: source | ({"local": str(root / source["local"])} if "local" in source else {})
        for name, source in spec.data["sources"].items()
    }
    data = {"data": {"local": str(root / f"corpus-{spec.corpus}"), "seq_len": SEQ_LEN, **spec.data, "sources": sources}}
    (scratch / "data.yaml").write_text(json.dumps(data))  # JSON is YAML.
    return load_run_config(
        "mixed_pretrain",
        [
            f"compose.data={scratch / 'data.yaml'}",
            f"save_folder={scratch}",
            "run_name=benchmark",
            f"seed={spec.seed}",
            f"max_duration={spec.steps}ba",
            "device=cpu",
            f"train_loader.global_batch_size={BATCH}",
            "train_loader.lag=1",
            f"model.hidden_size={spec.hidden}",
            f"model.intermediate_size={spec.hidden * 8 // 3}",
            f"model.num_layers={spec.layers}",
            f"model.num_heads={spec.hidden // 32}",
            f"model.num_kv_heads={spec.hidden // 32}",
            f"model.max_position_embeddings={SEQ_LEN}",
            *(override.replace("{root}", str(root)) for override in spec.overrides),
        ],
    )


def _result(spec: RunSpec, loader: MixtureLoader, algorithm: OnlineMixing | None, course: Course) -> dict[str, Any]:
    counts = loader.mixture.counts()
    decisions = [] if algorithm is None else [decision.to_dict() for decision in algorithm.controller.history]
    return {
        "spec": dataclasses.asdict(spec),
        "sources": list(loader.mixture.source_names),
        "course": dataclasses.asdict(course),
        "epochs": dict(zip(loader.mixture.source_names, counts.epochs.tolist(), strict=True)),
        "decisions": decisions,
        "ledger": [[batch, weights] for batch, weights in loader.mixture.ledger],
    }


def weights_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Shares of the sources over a whole run."""
    total = np.sum(result["course"]["shares"], axis=0)
    return dict(zip(result["sources"], (total / total.sum()).tolist(), strict=True))
