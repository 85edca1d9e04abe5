"""From ``algorithms.distillation`` of a run to the algorithm."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cheapertraining.config import DistillationConfig, RampConfig, RunConfig, TeacherConfig, split_duration
from cheapertraining.data import MixtureLoader, TokenizerWrapper
from cheapertraining.distillation.algorithm import Distillation, OnPolicy, Teacher
from cheapertraining.distillation.cache import cache_folder, read_cache_meta
from cheapertraining.distillation.cached import CachedTeacher
from cheapertraining.distillation.divergences import Divergence
from cheapertraining.distillation.layers import HiddenMatch, LayerLosses, RelationMatch
from cheapertraining.distillation.own_teacher import AdapterOffTeacher, AverageTeacher
from cheapertraining.distillation.schedules import Ramp
from cheapertraining.distillation.teacher import TeacherWrapper
from cheapertraining.distributed.agreement import failing_together
from cheapertraining.influence.ranks import rank_and_world

if TYPE_CHECKING:
    from composer.core import State

__all__ = ["build_distillation"]


def build_distillation(
    config: RunConfig, settings: DistillationConfig, loader: MixtureLoader, device: Literal["cpu", "gpu"]
) -> Distillation:
    """The algorithm; a cache is attached to the loader's shards. A collective call where there are several ranks.

    In a pipeline only the rank of the last stage reads a teacher's weights.
    """
    temperature = _ramp(settings.temperature)
    with failing_together():
        teacher = _teacher(config, settings, loader, device)
    if isinstance(teacher, CachedTeacher) and settings.temperature == DistillationConfig().temperature:
        temperature = Ramp(teacher.temperature, teacher.temperature)
    layers = None
    if settings.hidden is not None or settings.relations is not None:
        hidden = None if settings.hidden is None else HiddenMatch(**asdict(settings.hidden))
        relations = None if settings.relations is None else RelationMatch(**asdict(settings.relations))
        layers = LayerLosses(hidden, relations, seed=config.seed)
    on_policy = None
    if (answers := settings.on_policy) is not None:
        on_policy = OnPolicy(answers.share, answers.temperature, _eos_id(config), config.seed)
    return Distillation(
        teacher,
        loader.mixture.source_names,
        alpha=_ramp(settings.alpha),
        temperature=temperature,
        divergence=Divergence(settings.divergence, settings.divergence_weight),
        ramp=partial(_done, settings.ramp),
        source_weights=settings.source_weights,
        layers=layers,
        on_policy=on_policy,
        placement=settings.teacher.placement,
        log_interval=int(split_duration(settings.log_interval)[0]),
    )


def _teacher(
    config: RunConfig, settings: DistillationConfig, loader: MixtureLoader, device: Literal["cpu", "gpu"]
) -> Teacher | None:
    who = settings.teacher
    rank, ranks = rank_and_world()
    asked_here = config.parallelism.pp is None or rank == ranks - 1  # where the last stage is
    if settings.cache is not None:
        wanted = [name for name in loader.mixture.source_names if settings.source_weights.get(name, 1.0) > 0]
        cache, fingerprint = Path(settings.cache), None
        if who.path is not None and wanted and asked_here:
            # Its weights are looked at, in the dtype of the cache, and let go of.
            number = loader.mixture.source_names.index(wanted[0])
            dtype = read_cache_meta(cache_folder(cache, loader.mixture.store.metas[number])).dtype
            fingerprint = TeacherWrapper.load(
                who.path, dtype=dtype, trust_remote_code=who.trust_remote_code
            ).fingerprint()
        return CachedTeacher(cache, loader.mixture, sources=wanted, teacher=fingerprint)
    if who.kind == "adapters_off":
        return AdapterOffTeacher
    if who.kind == "average":
        return partial(AverageTeacher, decay=who.decay)
    if not asked_here:
        return None
    assert who.path is not None  # the config was checked
    teacher = _load(who, who.path, device)
    teacher.check_context(config.data.seq_len)
    return teacher


def _load(who: TeacherConfig, path: str, device: Literal["cpu", "gpu"]) -> TeacherWrapper:
    return TeacherWrapper.load(
        path,
        dtype=who.dtype or ("bfloat16" if device == "gpu" else "float32"),
        quantization=who.quantization,
        trust_remote_code=who.trust_remote_code,
    )


def _ramp(value: float | RampConfig) -> Ramp:
    return Ramp(value.first, value.last, value.shape) if isinstance(value, RampConfig) else Ramp(value, value)


def _done(span: str, state: State) -> float:
    """Share of ``span`` that is behind at a state."""
    value, unit = split_duration(span)
    if unit == "dur":
        elapsed = state.get_elapsed_duration()
        return 0.0 if elapsed is None else float(elapsed.value) / value
    return float(state.timestamp.get(unit).value) / value


def _eos_id(config: RunConfig) -> int | None:
    path = config.tokenizer.path or config.data.tokenizer or str(Path(config.data.local) / "tokenizer")
    found: int | None = TokenizerWrapper(path).eos_id
    return found
