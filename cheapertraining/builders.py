"""One ``build_*`` per part of a run: from the part's config to the object. No other logic is here."""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.core import Algorithm, Callback, DataSpec, Evaluator, State
from composer.core.data_spec import default_split_batch
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from composer.utils import dist
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from cheapertraining.config import (
    GenerationsConfig,
    InfluenceScoresConfig,
    ModelConfig,
    OnlineMixingConfig,
    OptimizerConfig,
    RunConfig,
    SchedulerConfig,
    WandbConfig,
    planned_tokens,
    split_duration,
)
from cheapertraining.data import Batch, MixtureLoader, TokenizerWrapper, get_loader
from cheapertraining.distillation.building import build_distillation
from cheapertraining.distributed.algorithm import GradientClipping
from cheapertraining.distributed.fsdp import original_shapes
from cheapertraining.distributed.parallelism import Layout, data_rank
from cheapertraining.errors import UserError
from cheapertraining.influence import ProbeBank, SourceEstimator
from cheapertraining.influence.algorithm import InfluenceScores
from cheapertraining.influence.scorers.accumulation import MicrobatchEstimator
from cheapertraining.influence.scorers.gram import GradientEstimator
from cheapertraining.influence.scorers.microbatch import source_microbatches
from cheapertraining.mixing import (
    GRAM,
    INFLUENCE,
    PROBE_LOSSES,
    PROBE_PRODUCTS,
    REFERENCE,
    ADOStrategy,
    AioliStrategy,
    Constraints,
    DoGEStrategy,
    DoGETargetStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    InfluenceStrategy,
    MatchingStrategy,
    MixingLawStrategy,
    MixtureController,
    ODMStrategy,
    OnlineMixing,
    PiKEStrategy,
    ProportionalStrategy,
    RegMixStrategy,
    RnBStrategy,
    ScheduleStrategy,
    SkillItStrategy,
    StaticStrategy,
    Strategy,
    UniMaxStrategy,
)
from cheapertraining.mixing.offline import read_table, read_two_tables
from cheapertraining.models import CausalLM, build_causal_lm
from cheapertraining.models.sharded import build_spread
from cheapertraining.models.stages import build_pipelined
from cheapertraining.observe import (
    ConsoleLines,
    Generations,
    GracefulStop,
    JsonlLogger,
    MixtureCourse,
    MixtureSummary,
    Pictures,
    RunHealth,
)
from cheapertraining.observe.checkpoints import AtomicCheckpointSaver
from cheapertraining.observe.credentials import has_wandb_key
from cheapertraining.observe.exhaustion import StopWhenExhausted
from cheapertraining.observe.stages import StagesCheckpointSaver
from cheapertraining.observe.wandb_log import ONLINE, WandbLog, key_trouble

log = logging.getLogger(__name__)

Device = Literal["cpu", "gpu"]
Precision = Literal["fp32", "amp_bf16", "amp_fp16"]
Split = Callable[[Any, int], Sequence[Any]]
_COUNTS = "token_counts"
_WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


# ---- where and how precisely -------------------------------------------------------------------------------
def resolve_device(config: RunConfig) -> Device:
    """``auto`` is the GPU where there is one."""
    if config.device == "gpu" and not torch.cuda.is_available():
        raise UserError("device: gpu was asked for, but torch finds no CUDA device. Use device=cpu or device=auto.")
    if config.device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return config.device


def resolve_precision(config: RunConfig, device: Device) -> Precision:
    """``auto`` is bfloat16 autocast on CUDA and float32 on CPU."""
    if config.precision == "auto":
        return "amp_bf16" if device == "gpu" else "fp32"
    if config.precision != "fp32" and device == "cpu":
        raise UserError(f"precision: {config.precision} needs a GPU. Use precision=fp32 or precision=auto.")
    return config.precision


def build_microbatch_size(config: RunConfig, device: Device, world_size: int) -> int | Literal["auto"]:
    """Rows per forward pass; Composer can search for it (``auto``) on CUDA only."""
    size = config.train_loader.device_microbatch_size
    if config.parallelism.pp is not None:  # its schedule divides the batch
        return config.train_loader.global_batch_size
    if size == "auto" and device == "cpu":
        return config.train_loader.global_batch_size // world_size
    return size


# ---- tokenizer, model, data --------------------------------------------------------------------------------
def build_tokenizer(config: RunConfig) -> TokenizerWrapper:
    """The tokenizer at ``tokenizer.path``, ``data.tokenizer`` or ``<data.local>/tokenizer``, the first that is set."""
    path = config.tokenizer.path or config.data.tokenizer
    if path is None:
        path = str(Path(config.data.local) / "tokenizer")
        if not Path(path).is_dir():
            raise UserError(f"tokenizer.path: none is set, and the default, {path}, is no folder. Set tokenizer.path.")
    return TokenizerWrapper(path)


def build_model(config: RunConfig, tokenizer: TokenizerWrapper, precision: Precision) -> CausalLM:
    """The whole model, with initial weights from the run's seed."""
    return build_causal_lm(config.model, tokenizer.vocab_size, seed=config.seed, precision=precision)


def build_spread_model(
    config: RunConfig, tokenizer: TokenizerWrapper, precision: Precision, layout: Layout, device: Device
) -> CausalLM:
    """The model as the run's ``parallelism`` spreads it over the ranks, with the same weights."""
    whole = partial(build_model, config, tokenizer, precision)
    where = torch.device("cuda" if device == "gpu" else "cpu")
    if layout.engine == "pipeline":
        size = config.train_loader.device_microbatch_size
        assert size != "auto"  # refused before
        return build_pipelined(
            whole,
            config.parallelism,
            where,
            batch_size=config.train_loader.global_batch_size,
            microbatch_size=size,
            seq_len=config.data.seq_len,
        )
    return build_spread(whole, layout, config.parallelism, precision, where)


def build_loader(config: RunConfig, tokenizer: TokenizerWrapper, layout: Layout | None = None) -> MixtureLoader:
    """The training loader of this rank, with the mixture, the probes and the held-out splits beside it.

    Ranks that tensor parallelism cuts a layer over get the same samples. None is one sample a rank.
    """
    settings = config.train_loader
    loader = get_loader(
        config.data,
        tokenizer,
        settings.global_batch_size,
        num_workers=settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
        persistent_workers=settings.persistent_workers,
        pin_memory=settings.pin_memory,
        lag=settings.lag,
        allow_source_changes=settings.allow_source_changes,
        seed=config.seed,
        rank=None if layout is None else data_rank(layout, dist.get_global_rank()),
        world_size=None if layout is None else layout.data,
    )
    # A DataLoader draws a seed whenever iterating starts; from the global generator, and a resumed run would go on
    # with other random numbers (dropout) than the undisturbed one.
    loader.generator = torch.Generator().manual_seed(config.seed)
    return loader


def count_tokens(batch: Batch) -> dict[str, int]:
    """Tokens that are not padding, and those that count in the loss.

    With the second, Composer weights microbatches and ranks by their loss tokens, so that the gradient is that of the
    mean over all tokens of the global batch however it is split. It asks again for each microbatch once that is on
    the device, where counting would wait for all that the device has still to do: :func:`counted` has noted it.
    """
    noted: Any = batch.get(_COUNTS)
    if noted is not None:
        return cast(dict[str, int], noted)
    mask = batch.get("attention_mask")
    total = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return {"total": total, "loss_generating": int((batch["labels"] != -100).sum())}


def counted(split: Split) -> Split:
    """``split`` (a data spec's ``split_batch``), whose microbatches carry their :func:`count_tokens`."""

    def split_and_count(batch: Any, microbatch_size: int) -> list[Any]:
        return [{**part, _COUNTS: count_tokens(part)} for part in split(batch, microbatch_size)]

    return split_and_count


def build_train_spec(loader: MixtureLoader, copies: int = 1) -> DataSpec:
    """The training loader as Composer wants it.

    Args:
        loader: of the run.
        copies: ranks that get the same samples. Composer sums over all ranks, so the first of them counts the samples
            and tokens, and each weights its losses by its share of the tokens.
    """
    split: Any = counted(default_split_batch)
    if copies == 1:
        return DataSpec(loader, split_batch=split, get_num_tokens_in_batch=count_tokens)
    first = dist.get_global_rank() % copies == 0

    def samples(batch: Batch) -> int:
        return len(batch["input_ids"]) if first else 0

    def tokens(batch: Batch) -> dict[str, Any]:
        counts = count_tokens(batch)
        return {"total": counts["total"] if first else 0, "loss_generating": counts["loss_generating"] / copies}

    return DataSpec(loader, split_batch=split, get_num_samples_in_batch=samples, get_num_tokens_in_batch=tokens)


def build_evaluators(config: RunConfig, loader: MixtureLoader, layout: Layout | None = None) -> list[Evaluator]:
    """An evaluator for each held-out split (``heldout/<source>``) and each probe (``probe/<name>``).

    Where ranks share samples, the last ones of a split that do not divide among the data parallel ranks are left out:
    Composer drops what a sampler fills up with by the number of all ranks.
    """
    splits = {f"heldout/{name}": split for name, split in loader.heldout.items()}
    splits |= {f"probe/{name}": split for name, split in loader.probes.items()}
    evaluators = []
    for label, split in splits.items():
        sampler: Sampler[Any] = split.sampler  # type: ignore[assignment]
        if layout is not None and layout.copies > 1:
            mine = data_rank(layout, dist.get_global_rank())
            sampler = DistributedSampler(split.dataset, layout.data, mine, shuffle=False, drop_last=True)
        rows = DataLoader(
            split.dataset,
            batch_size=config.eval_loader.batch_size,
            sampler=sampler,
            collate_fn=split.collate_fn,
            generator=loader.generator,
        )
        spec = DataSpec(rows, get_num_tokens_in_batch=count_tokens)
        evaluators.append(Evaluator(label=label, dataloader=spec, metric_names=["TokenCrossEntropy"]))
    return evaluators


# ---- optimization ------------------------------------------------------------------------------------------
def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """AdamW that decays matrices (embeddings included) and leaves norms and biases alone."""
    flat = original_shapes(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [len(flat.get(id(parameter), parameter.shape)) >= 2 for parameter in trained]
    groups = [
        {"params": [p for p, m in zip(trained, matrices, strict=True) if m], "weight_decay": config.weight_decay},
        {"params": [p for p, m in zip(trained, matrices, strict=True) if not m], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_multiplier(config: SchedulerConfig, progress: float, warmup: float, decay: float) -> float:
    """What the learning rate is multiplied with.

    Args:
        config: name and ``alpha_f``.
        progress: share of the run that is done, in [0, 1].
        warmup, decay: shares of the run.
    """
    if progress < warmup:
        return progress / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "wsd":
        left = min(1.0, (1.0 - progress) / decay) if decay > 0 else 1.0
    else:
        done = (progress - warmup) / (1.0 - warmup) if warmup < 1 else 1.0
        left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return config.alpha_f + (1.0 - config.alpha_f) * left


def build_scheduler(config: SchedulerConfig, max_duration: str) -> ComposerScheduler:
    """The learning-rate schedule over ``max_duration``, in whichever unit that is."""
    length, unit = split_duration(max_duration)

    def share(span: str) -> float:
        value, span_unit = split_duration(span)
        return value if span_unit == "dur" else value / length

    warmup, decay = share(config.warmup), share(config.decay)

    def schedule(state: State) -> float:
        done = float(state.timestamp.get(unit).value)
        return lr_multiplier(config, min(1.0, done / length), warmup, decay)

    return schedule  # type: ignore[return-value]  # Composer takes plain functions of the state, but does not say so


# ---- mixing ------------------------------------------------------------------------------------------------
def build_strategy(config: OnlineMixingConfig) -> Strategy:
    """The strategy that proposes weights."""
    if config.strategy == "static":
        return StaticStrategy()
    if config.strategy == "proportional":
        return ProportionalStrategy(temperature=config.proportional.temperature)
    if config.strategy == "unimax":
        return UniMaxStrategy(max_epochs=config.unimax.max_epochs)
    if config.strategy == "schedule":
        return ScheduleStrategy([asdict(point) for point in config.schedule.points])
    if config.strategy == "ado":
        return ADOStrategy()
    if config.strategy == "doremi":
        return DoReMiStrategy(step=config.doremi.step, smoothing=config.doremi.smoothing)
    if config.strategy == "influence":
        own = config.influence
        return InfluenceStrategy(own.learning_rate, own.ema, own.threshold, own.update, own.robust, own.guard)
    if config.strategy in ("mixing_law", "regmix"):
        return build_fitted(config)
    settings = asdict(getattr(config, config.strategy))  # Of one name and meaning.
    if config.strategy == "doge":
        return DoGETargetStrategy(**settings) if settings.pop("target") else DoGEStrategy(**settings)
    kinds: dict[str, Callable[..., Strategy]] = {
        "odm": ODMStrategy,
        "skillit": SkillItStrategy,
        "pike": PiKEStrategy,
        "rnb": RnBStrategy,
        "matching": MatchingStrategy,
        "grape": GRAPEStrategy,
        "aioli": AioliStrategy,
    }
    return kinds[config.strategy](**settings)


def build_fitted(config: OnlineMixingConfig) -> Strategy:
    """A strategy that is fitted to a table of runs."""
    kind = {"mixing_law": MixingLawStrategy, "regmix": RegMixStrategy}[config.strategy]
    settings = asdict(getattr(config, config.strategy))
    path, losses = settings.pop("table"), settings.pop("losses")
    return kind(read_table(path) if losses is None else read_two_tables(path, losses), **settings)


def build_reference(config: RunConfig, path: str, tokenizer: TokenizerWrapper, precision: Precision) -> CausalLM:
    """The model that ``doremi`` compares with: a Hugging Face folder, or a checkpoint of this run's model."""
    key = "algorithms.online_mixing.doremi.reference"
    if Path(path).is_dir():
        return build_causal_lm(ModelConfig(name_or_path=path), tokenizer.vocab_size, precision=precision)
    if not Path(path).is_file():
        raise UserError(f"{key}: expected a Hugging Face folder or a checkpoint (.pt), found nothing at '{path}'.")
    model = build_model(config, tokenizer, precision)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=False)["state"]["model"]
        model.load_state_dict(saved)
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: expected a checkpoint of this run's model, found {path} ({reason}).") from error
    return model


def build_estimator(
    config: RunConfig, mixing: OnlineMixingConfig, loader: MixtureLoader
) -> SourceEstimator | MicrobatchEstimator:
    """What measures the influence of sources on the probes."""
    own = mixing.influence
    probes, weights = _steering_probes(config, mixing, loader)
    metric = own.metric if mixing.strategy == "influence" else "raw"
    if own.scorer == "microbatch":
        names = loader.mixture.source_names
        return MicrobatchEstimator(
            names, probes, weights, probe_samples=own.probe_samples, metric=metric, layers=own.layers
        )
    return SourceEstimator(
        loader.mixture,
        probes,
        weights,
        probe_samples=own.probe_samples,
        source_samples=own.source_samples,
        metric=metric,
        scorer=own.scorer,
        step_size=own.step_size,
        seed=config.seed,
        combine=own.combine and mixing.strategy == "influence",
        layers=own.layers,
    )


def _steering_probes(
    config: RunConfig, mixing: OnlineMixingConfig, loader: MixtureLoader
) -> tuple[dict[str, DataLoader[Any]], dict[str, float]]:
    """Loaders of the probes that count, and their weights in the objective."""
    own = mixing.influence.probes
    weights = {name: probe.weight for name, probe in config.data.probes.items()} if own is None else own
    return {name: loader.probes[name] for name in weights}, weights


def split_by_source(spec: DataSpec, config: RunConfig) -> DataSpec:
    """``spec``, with microbatches of one source each where the mixture is measured on them."""
    mixing = config.algorithms.online_mixing
    if mixing is not None and mixing.influence.scorer == "microbatch" and INFLUENCE in build_strategy(mixing).needs:
        spec.split_batch = counted(source_microbatches)  # type: ignore[assignment]  # batches are mappings here
    return spec


def build_online_mixing(
    config: RunConfig, mixing: OnlineMixingConfig, loader: MixtureLoader, folder: Path
) -> OnlineMixing:
    """The algorithm that measures, decides, sets the weights of ``loader.mixture``, and notes it in ``folder``."""
    limits = mixing.constraints
    controller = MixtureController(
        loader.mixture,
        build_strategy(mixing),
        Constraints(
            floor=limits.floor,
            ceiling=limits.ceiling,
            kl_step=limits.kl_step,
            kl_prior=limits.kl_prior,
            max_epochs=limits.max_epochs,
        ),
        interval=int(split_duration(mixing.interval)[0]),
        warmup=int(split_duration(mixing.warmup)[0]),
        horizon_tokens=planned_tokens(config),
        updates=mixing.updates,
    )
    needs, own = controller.strategy.needs, mixing.influence
    gradients = probes = reference = None
    estimator = build_estimator(config, mixing, loader) if INFLUENCE in needs else None
    if needs & {PROBE_LOSSES, PROBE_PRODUCTS}:
        probes = ProbeBank(*_steering_probes(config, mixing, loader), own.probe_samples)
    if GRAM in needs:
        measured = probes if PROBE_PRODUCTS in needs else None
        gradients = GradientEstimator(loader.mixture, own.source_samples, config.seed, own.layers, measured)
    if mixing.doremi.reference is not None and REFERENCE in needs:
        precision = resolve_precision(config, resolve_device(config))
        reference = build_reference(config, mixing.doremi.reference, build_tokenizer(config), precision)
    return OnlineMixing(
        controller,
        estimator,
        gradients=gradients,
        probes=probes,
        reference=reference,
        ledger_path=folder / "mixture.jsonl",
    )


# ---- algorithms, callbacks, loggers ------------------------------------------------------------------------
def build_algorithms(config: RunConfig, loader: MixtureLoader, folder: Path) -> list[Algorithm]:
    """Those that are not null."""
    algorithms: list[Algorithm] = []
    if (clipping := config.algorithms.gradient_clipping) is not None:
        algorithms.append(GradientClipping(clipping.threshold))
    if (mixing := config.algorithms.online_mixing) is not None:
        algorithms.append(build_online_mixing(config, mixing, loader, folder))
    if (scores := config.algorithms.influence_scores) is not None:
        algorithms.append(build_influence_scores(scores, loader))
    if (distillation := config.algorithms.distillation) is not None:
        algorithms.append(build_distillation(config, distillation, loader, resolve_device(config)))
    return algorithms


def build_influence_scores(config: InfluenceScoresConfig, loader: MixtureLoader) -> InfluenceScores:
    """The algorithm that scores what is trained on."""
    return InfluenceScores(
        loader.probes,
        loader.mixture.source_names,
        config.estimator,
        layers=config.layers,
        probe_samples=config.probe_samples,
        refresh_every=int(split_duration(config.refresh)[0]),
        log_interval=int(split_duration(config.log_interval)[0]),
    )


def build_callbacks(config: RunConfig, loader: MixtureLoader, folder: Path, device: Device) -> list[Callback]:
    """Monitors, console lines and the table at the end; then what ends a run and saves it.

    Args:
        config: of the run.
        loader: its mixture is what is reported on.
        folder: of the run.
        device: the memory monitor reads CUDA's allocator, so it is left out on a CPU.
    """
    callbacks: list[Callback] = []
    if (speed := config.callbacks.speed_monitor) is not None:
        callbacks.append(SpeedMonitor(window_size=speed.window_size))
    if config.callbacks.memory_monitor is not None and device == "gpu":
        callbacks.append(MemoryMonitor())
    if config.callbacks.lr_monitor is not None:
        callbacks.append(LRMonitor())
    callbacks += [RunHealth(), MixtureCourse(loader.mixture)]
    if (texts := config.callbacks.generations) is not None:
        callbacks.append(build_generations(config, texts, folder))
    if config.loggers.wandb is not None:
        batches = planned_tokens(config) // (config.train_loader.global_batch_size * config.data.seq_len)
        # Drawing takes some tenths of a second, which in a short run would be felt.
        callbacks.append(Pictures(loader.mixture, interval=max(1000, batches // 10)))
    if (console := config.loggers.console) is not None:
        callbacks.append(ConsoleLines(loader.mixture, interval=int(split_duration(console.interval)[0])))
    return [
        *callbacks,
        MixtureSummary(loader.mixture, folder),
        StopWhenExhausted(loader.mixture),
        (AtomicCheckpointSaver if config.parallelism.pp is None else StagesCheckpointSaver)(
            folder / "checkpoints",
            config.save_interval,
            config.save_num_checkpoints_to_keep,
            sharded=config.parallelism.state_dict_type == "sharded",
            background=config.parallelism.async_save,
        ),
        GracefulStop(),
    ]


def build_generations(config: RunConfig, texts: GenerationsConfig, folder: Path) -> Generations:
    """The callback that lets the model write."""
    return Generations(
        build_tokenizer(config),
        texts.prompts,
        interval=int(split_duration(texts.interval)[0]),
        new_tokens=texts.new_tokens,
        temperature=texts.temperature,
        seed=config.seed,
        folder=folder,
    )


def build_loggers(config: RunConfig, folder: Path) -> list[LoggerDestination]:
    """Those that are not null."""
    loggers: list[LoggerDestination] = []
    if config.loggers.jsonl is not None:
        loggers.append(JsonlLogger(folder))
    if (wandb := config.loggers.wandb) is not None:
        loggers.append(build_wandb_logger(wandb, folder))
    return loggers


def build_wandb_logger(config: WandbConfig, folder: Path) -> WandbLog:
    """W&B; under ``auto``, offline where the server cannot be reached or does not take the key.

    Raises:
        UserError: online was asked for and the server does not take the key.
    """
    mode = wandb_mode(config, os.environ)
    told = [key_trouble(os.environ) if mode in ONLINE and dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(told)
    if (trouble := told[0]) is not None:
        automatic = config.mode == "auto" and "WANDB_MODE" not in os.environ
        if automatic:
            mode = "offline"
            if dist.get_global_rank() == 0:
                log.warning(
                    "loggers.wandb: %s. Training goes on offline; later, %s, then `wandb sync %s/wandb/offline-run-*`.",
                    trouble.what, trouble.cure, folder,
                )  # fmt: skip
        elif trouble.refused:
            raise UserError(
                f"loggers.wandb.mode: {mode}, but {trouble.what}. Either {trouble.cure}, or use "
                "loggers.wandb.mode=offline."
            )
    return WandbLog(config.project, config.entity, mode, folder)


def wandb_mode(config: WandbConfig, environment: Mapping[str, str]) -> str:
    """The mode to start W&B in, such that it never asks for a key.

    Raises:
        UserError: online was asked for and there is no key, or the environment names no mode that exists.
    """
    told = environment.get("WANDB_MODE")
    if told is not None and told not in _WANDB_MODES:
        raise UserError(f"WANDB_MODE in the environment: expected one of {', '.join(_WANDB_MODES)}, found '{told}'.")
    wanted = told or "auto" if config.mode == "auto" else config.mode
    if wanted == "auto":
        return "online" if has_wandb_key(environment) else "offline"
    if wanted == "online" and not has_wandb_key(environment):
        raise UserError(
            "loggers.wandb.mode: online needs a key. Set WANDB_API_KEY, run `wandb login`, or use mode offline."
        )
    return wanted
