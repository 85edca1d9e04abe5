"""A run, top to bottom: config -> parts -> Composer Trainer -> fit."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from composer import Trainer
from composer.core import Callback
from composer.utils import ParallelismConfig, dist, reproducibility

from cheapertraining.builders import (
    Device,
    Precision,
    build_algorithms,
    build_callbacks,
    build_evaluators,
    build_loader,
    build_loggers,
    build_microbatch_size,
    build_optimizer,
    build_scheduler,
    build_spread_model,
    build_strategy,
    build_tokenizer,
    build_train_spec,
    resolve_device,
    resolve_precision,
    split_by_source,
)
from cheapertraining.config import RunConfig, resolved_yaml
from cheapertraining.distributed.agreement import check_alike, versions
from cheapertraining.distributed.layout import plan_layout
from cheapertraining.distributed.lost import bound_waiting, lost_ranks_explained
from cheapertraining.distributed.together import check_together
from cheapertraining.errors import UserError
from cheapertraining.observe import progress_bar_fits
from cheapertraining.observe.checkpoints import LATEST, LoadSharded, check_resumable, latest_checkpoint
from cheapertraining.observe.environment import environment
from cheapertraining.observe.report import write_report
from cheapertraining.observe.stages import LoadStages
from cheapertraining.training.resumed import put_in_force, settings_of

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(config: RunConfig) -> Trainer:
    """Train as ``config`` says, in ``<save_folder>/<run_name>``; call it on every rank.

    Returns:
        The closed trainer: its ``state`` has the model, the timestamp and the last evaluation's metrics.

    Raises:
        UserError: anything a user can put right, from a wrong batch size to a full disk.
        SystemExit: the run was told to end (SIGTERM); its checkpoint is saved.
    """
    # The last batch of an evaluation is smaller than a microbatch, as it may be.
    warnings.filterwarnings("ignore", message="Cannot split tensor of length")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own use of it, at every save
    device = resolve_device(config)
    precision = resolve_precision(config, device)
    _start_processes(device, config)
    with lost_ranks_explained(config.parallelism.dist_timeout):
        return _run(config, device, precision)


def _run(config: RunConfig, device: Device, precision: Precision) -> Trainer:
    """The run of a rank that has joined the others."""
    check_alike({"config": resolved_yaml(config)} | versions())
    layout = plan_layout(config.parallelism, dist.get_world_size())
    mixing = config.algorithms.online_mixing
    needs = () if mixing is None else build_strategy(mixing).needs
    check_together(config, layout, precision, needs=needs, on_gpu=device == "gpu")
    config = _named(config)
    folder = Path(config.save_folder).resolve() / cast(str, config.run_name)
    checkpoint = _checkpoint_to_resume(config, folder)

    tokenizer = build_tokenizer(config)
    loader = build_loader(config, tokenizer, layout)
    model = build_spread_model(config, tokenizer, precision, layout, device)
    algorithms = build_algorithms(config, loader, folder)
    random_states = None
    if checkpoint is not None:
        whole = getattr(model, "whole", model)  # a pipeline's ranks have a part each
        random_states = check_resumable(checkpoint, whole, loader.mixture, algorithms)
    _save_config(config, folder)

    loaders: list[Callback] = []
    if checkpoint is not None and config.parallelism.pp is not None:
        loaders = [LoadStages(checkpoint)]
    elif checkpoint is not None and checkpoint.is_dir():
        loaders = [LoadSharded(checkpoint)]
    optimizer = build_optimizer(config.optimizer, model)
    settings = settings_of(optimizer)
    trainer = Trainer(
        model=model,
        train_dataloader=split_by_source(build_train_spec(loader, layout.copies), config),
        eval_dataloader=build_evaluators(config, loader, layout),
        eval_interval=config.eval_loader.interval,
        eval_subset_num_batches=config.eval_loader.subset_num_batches,
        max_duration=config.max_duration,
        optimizers=optimizer,
        schedulers=build_scheduler(config.scheduler, config.max_duration),
        algorithms=algorithms,
        callbacks=[*loaders, *build_callbacks(config, loader, folder, device)],
        loggers=build_loggers(config, folder),
        progress_bar=config.loggers.progress_bar and progress_bar_fits(),
        run_name=config.run_name,
        load_path=None if checkpoint is None or loaders else str(checkpoint),
        device=device,
        precision=precision,
        device_train_microbatch_size=build_microbatch_size(config, device, layout.data),
        # A cut model is on its device already, in part perhaps on the host.
        parallelism_config=None if layout.engine == "replicas" else ParallelismConfig(),
        accumulate_train_batch_on_tokens=True,
        spin_dataloaders=False,  # the mixture goes on where the checkpoint left it
        seed=config.seed,
        deterministic_mode=config.deterministic,
        dist_timeout=config.parallelism.dist_timeout,
    )
    if checkpoint is not None:
        put_in_force(trainer.state, settings)
    bound_waiting(config.parallelism.dist_timeout)
    trainer.logger.log_hyperparameters(asdict(config))
    try:
        _fit(trainer, config, random_states)
    finally:
        loader.close()  # of this rank alone, so that it waits for no other, whatever went wrong
        _write_report(config, folder)
    return trainer


def _fit(trainer: Trainer, config: RunConfig, random_states: list[dict[str, Any]] | None) -> None:
    """Evaluate, train, close; ``random_states`` are those to go on with."""
    state = trainer.state
    try:
        if state.max_duration is not None and state.timestamp >= state.max_duration:
            done = f"is finished ({state.timestamp.batch.value} batches)"
            _say(f"Run {config.run_name} {done}. Raise max_duration to go on.")
        else:
            if config.eval_loader.first and state.timestamp.batch == 0:
                trainer.eval()
            if random_states is not None and len(random_states) == dist.get_world_size():
                reproducibility.load_rng_state(random_states)
            trainer.fit()
    except SystemExit:  # told to end; on all ranks, so that closing them together is safe
        trainer.close()  # type: ignore[no-untyped-call]
        raise
    except BaseException:
        # Perhaps this rank alone, so not trainer.close, which waits for all. Left to itself, the engine is closed where
        # it is collected, which may be in a thread that reads ahead, where nothing can close it in good order.
        trainer.engine.close()
        raise
    trainer.close()  # type: ignore[no-untyped-call]


def _start_processes(device: Device, config: RunConfig) -> None:
    """Join the process group, where there are several or the model is cut, and share the cores among them."""
    parts = config.parallelism
    cut = parts.fsdp or parts.fsdp2 or parts.tp or parts.pp
    if dist.get_world_size() > 1 or cut:
        try:
            dist.initialize_dist(device, config.parallelism.dist_timeout)
        except RuntimeError as error:
            if "address already in use" not in str(error).lower():
                raise
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"MASTER_PORT {port}: another process of this machine listens there. Start with another one "
                "(`composer --master_port PORT …`), or end that process."
            ) from error
    if dist.get_local_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_local_world_size()))


def _named(config: RunConfig) -> RunConfig:
    """The config with a run name, the same on all ranks; one that is made up is not taken yet."""
    if config.run_name is not None:
        return config
    start = time.strftime("run-%Y%m%d-%H%M%S")
    names = [start, *(f"{start}-{i}" for i in range(2, 100))]
    free = next(name for name in names if not (Path(config.save_folder) / name).exists())
    return replace(config, run_name=_from_rank_zero(free))


def _checkpoint_to_resume(config: RunConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, decided by rank 0.

    Raises:
        UserError: the run has checkpoints, and the config does not say what to do about them.
    """
    latest: Path | None = _from_rank_zero(latest_checkpoint(folder / "checkpoints"))
    if latest is None:
        return None
    if config.autoresume:
        if not all(dist.all_gather_object(latest.exists())):
            raise UserError(f"{latest}: not there on every node. Put save_folder where all nodes see it.")
        return latest
    if not config.save_overwrite:
        raise UserError(
            f"run_name: {folder} already has checkpoints (latest: {latest.name}). Use autoresume=true to go on from "
            "there, another run_name to keep both, or save_overwrite=true to begin anew."
        )
    if dist.get_global_rank() == 0:
        (folder / "checkpoints" / LATEST).unlink()  # or a kill before the first save would resume the old run
    return None


def _save_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved config beside the checkpoints; ``train.py <folder>/config.yaml`` is then the same run."""
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".config.yaml.unfinished"
        unfinished.write_text(resolved_yaml(config), encoding="utf-8")
        os.replace(unfinished, folder / "config.yaml")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


def _write_report(config: RunConfig, folder: Path) -> None:
    """Draw report.html from the log, however the run ended."""
    if config.loggers.jsonl is None or dist.get_global_rank() != 0:
        return
    try:
        _say(f"Report: {write_report(folder)}")
    except Exception as error:  # what went wrong before must be seen, and no run fails for want of a picture
        log.warning("%s: report.html was not written: %s", folder, error)


def _from_rank_zero(value: Any) -> Any:
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        print(text, flush=True)
