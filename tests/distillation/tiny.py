"""Tiny teachers, caches and trainers that the tests of distillation share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec
from composer.loggers import InMemoryLogger, LoggerDestination

from cheapertraining.builders import count_tokens
from cheapertraining.config import ModelConfig
from cheapertraining.data.mixing import MixtureLoader
from cheapertraining.distillation.cache_job import CacheJob
from cheapertraining.distillation.caching import CacheReport, cache_teacher
from cheapertraining.models import build_causal_lm
from tests.observe.tiny_trainer import GLOBAL_BATCH, MODEL

TEACHER = ModelConfig(
    vocab_size=512,
    hidden_size=24,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    max_position_embeddings=32,
    init_std=0.3,  # untrained, yet not uniform
)
SOURCES = ("code", "docs", "topics")


def save_teacher(folder: Path, config: ModelConfig = TEACHER, seed: int = 4) -> Path:
    """A teacher as a Hugging Face folder."""
    build_causal_lm(config, 512, seed=seed).model.save_pretrained(folder)
    return folder


def write_cache(sample: Path, teacher: Path, out: Path, **options: Any) -> CacheReport:
    """The teacher's targets for the train splits."""
    shards = [sample / source / "train" for source in SOURCES]
    return cache_teacher(CacheJob(teacher, shards, out, **options), progress=False)


def trainer_of(
    loader: MixtureLoader,
    algorithms: Sequence[Algorithm],
    batches: int,
    *,
    microbatch: int = GLOBAL_BATCH,
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    model: ModelConfig = MODEL,
    **options: Any,
) -> Trainer:
    """A trainer that weights by loss tokens, as ours does."""
    torch.set_num_threads(1)
    student = build_causal_lm(model, 512, seed=2)
    return Trainer(
        model=student,
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=count_tokens),
        optimizers=optimizer(student.parameters()),
        max_duration=f"{batches}ba",
        device="cpu",
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        algorithms=list(algorithms),
        callbacks=list(callbacks),
        loggers=list(loggers),
        progress_bar=False,
        spin_dataloaders=False,
        **options,
    )


def fit(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Train and close; the weights."""
    trainer.fit()
    found = {name: value.detach().clone() for name, value in trainer.state.model.state_dict().items()}
    trainer.close()
    return {name.removeprefix("module."): value for name, value in found.items()}


def logged(logger: InMemoryLogger) -> Mapping[str, list[float]]:
    """All metrics."""
    return {name: [float(value) for _, value in points] for name, points in logger.data.items()}
