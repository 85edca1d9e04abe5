"""Distillation on this rank of several, as a script: SAMPLE TEACHER CACHE OUTPUT, all folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer.loggers import InMemoryLogger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config

from cheapertraining.config import load_data_config
from cheapertraining.data import get_loader
from cheapertraining.data.mixing import MixtureLoader
from cheapertraining.distillation.algorithm import Distillation
from cheapertraining.distillation.cached import CachedTeacher
from cheapertraining.distillation.teacher import TeacherWrapper
from cheapertraining.distributed.gloo import mend_fsdp2_on_gloo
from cheapertraining.influence import SourceEstimator
from cheapertraining.mixing import Constraints, InfluenceStrategy, MixtureController, OnlineMixing
from tests.distillation.tiny import fit, logged, trainer_of
from tools.bench._layouts import RaggedMasks

BATCHES, DECIDE_EVERY, SAVED = 24, 10, 14


def loader_of(sample: Path) -> MixtureLoader:
    return get_loader(load_data_config(sample / "data.yaml"), batch_size=12, lag=2, seed=5)


def live(sample: Path, teacher: Path, batches: int = 3, **options: Any) -> tuple[list[float], list[list[float]]]:
    """Losses, and the weights of the embedding at the end, where it is whole."""
    loader, logger = loader_of(sample), InMemoryLogger()
    distillation = Distillation(TeacherWrapper.load(teacher), loader.mixture.source_names, log_interval=1)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=10.0)  # noqa: E731
    trainer = trainer_of(
        loader, [RaggedMasks(), distillation], batches, microbatch=3, optimizer=optimizer, loggers=[logger], **options
    )
    weights = fit(trainer)["model.model.embed_tokens.weight"]
    whole = weights if not hasattr(weights, "full_tensor") else weights.full_tensor()
    told = logged(logger)
    assert told["distillation/total"] == [float(f"{x:.17g}") for x in told["distillation/total"]]
    return told["loss/train/total"], whole.tolist()


def cached_course(sample: Path, cache: Path, folder: Path, load: Path | None = None) -> dict[str, Any]:
    """Losses and weights of a run whose mixture follows influence, every few batches."""
    loader, logger = loader_of(sample), InMemoryLogger()
    controller = MixtureController(
        loader.mixture, InfluenceStrategy(threshold=0.0), Constraints(floor=0.05, kl_step=0.5), DECIDE_EVERY, 1, 10**6
    )
    estimator = SourceEstimator(loader.mixture, loader.probes, probe_samples=4, source_samples=4)
    mixing = OnlineMixing(controller, estimator, log_interval=2)
    distillation = Distillation(CachedTeacher(cache, loader.mixture), loader.mixture.source_names, log_interval=2)
    trainer = trainer_of(
        loader,
        [RaggedMasks(), mixing, distillation],
        BATCHES,
        microbatch=3,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        loggers=[logger],
        save_folder=str(folder),
        save_interval=f"{SAVED}ba",
        load_path=None if load is None else str(load),
    )
    fit(trainer)
    return {"losses": logged(logger)["loss/train/total"], "ledger": loader.mixture.plan.newest_weights()}


def main() -> None:
    sample, teacher, cache, out = (Path(text) for text in sys.argv[1:])
    torch.set_num_threads(1)
    dist.initialize_dist("cpu")
    mend_fsdp2_on_gloo()
    found: dict[str, Any] = {
        "ddp": live(sample, teacher),
        "fsdp2": live(sample, teacher, parallelism_config={"fsdp": FSDP2Config()}),
        "whole": cached_course(sample, cache, out / "whole"),
    }
    saved = out / "whole" / f"ep0-ba{SAVED}-rank0.pt"
    found["resumed"] = cached_course(sample, cache, out / "resumed", load=saved)
    (out / f"{dist.get_global_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
