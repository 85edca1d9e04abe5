"""How influence moves a mixture in a loop of one's own: one typed set of settings, refused where it makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.parameters import Layers
from cheapertraining.influence.scorers.sources import check_metric, check_scorer

__all__ = ["InfluenceConfig"]

# What similar libraries call it, and what stands for it here.
_OTHER_NAMES = {
    "batch_size": "microbatch_size",
    "influence_smoothing": "ema (the share of the old scores that is kept: 1 - smoothing)",
    "lambda_val": "lambda_reg",
    "max_weight": "ceiling",
    "min_weight": "floor",
    "samples_per_dataset": "source_samples",
    "smoothing": "ema (the share of the old scores that is kept: 1 - smoothing)",
}


@dataclass
class InfluenceConfig:
    """Settings of measuring influence and of moving weights by it.

    Attributes:
        lambda_reg: damping of metrics that invert a curvature, relative to its own size: for DataInf, ``lambda_l =
            lambda_reg * mean(g**2)`` in each layer (arXiv 2310.00902 uses 0.1). ``raw`` and ``adam`` invert nothing
            and do not look at it.
        metric: ``raw`` (gradients as they are), ``adam`` (preconditioned by the optimizer's second moments),
            ``cosine`` (by the norm of each source's gradient; ``hook`` only), or a curvature: ``layer_scale``,
            ``datainf``, ``kfac``, ``ekfac``.
        scorer: ``forward`` (parameters in float32), ``hook`` (any precision), or ``loop`` (any model, slow; layers
            whose forward pass is a staircase need it); see ``scorers.sources.SourceEstimator``.
        probe_samples: samples of each probe in a measurement.
        source_samples: samples of each source in a measurement, over all ranks.
        microbatch_size: samples in one pass of a measurement; None: all that fall to a rank.
        step_size: length of the look-ahead step relative to the norm of the parameters.
        ema: share of the old scores that is kept at each update.
        threshold: standard errors below which a score is taken for chance.
        floor, ceiling: bounds of each weight.
        kl_step: largest change of the weights by one update, in nats; None: no limit.
        combine: one direction for all probes together, which costs less than one for each.
        seed: of the samples that measurements look at.
        layers: which parameters count, see :data:`~cheapertraining.influence.parameters.Layers`.

    Raises:
        UserError: a setting that does not exist or is out of range.
    """

    lambda_reg: float = 0.1
    metric: str = "raw"
    scorer: str = "forward"
    probe_samples: int = 8
    source_samples: int = 4
    microbatch_size: int | None = None
    step_size: float = 1e-4
    ema: float = 0.9
    threshold: float = 2.5
    floor: float = 0.01
    ceiling: float = 1.0
    kl_step: float | None = 0.5
    combine: bool = False
    seed: int = 0
    layers: Layers = "all"

    def __new__(cls, *values: Any, **settings: Any) -> InfluenceConfig:
        """Refuse unknown settings by their nearest name; the generated ``__init__`` would only raise TypeError."""
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                renamed = f" Use '{_OTHER_NAMES[name]}'." if name in _OTHER_NAMES else nearest(name, names)
                raise UserError(
                    f"influence config: no setting is named '{name}' (settings: {', '.join(names)}).{renamed}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, least in {"probe_samples": 1, "source_samples": 2, "threshold": 0}.items():
            if not getattr(self, name) >= least:
                raise _wrong(name, f"at least {least}", getattr(self, name))
        if not self.lambda_reg > 0:
            raise _wrong("lambda_reg", "a positive number", self.lambda_reg)
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise _wrong("microbatch_size", "at least 1, or None for all samples at once", self.microbatch_size)
        if not 0 < self.step_size < 1:
            raise _wrong("step_size", "a relative step between 0 and 1, such as 1e-4", self.step_size)
        if not 0 <= self.ema < 1:
            raise _wrong("ema", "a number from 0 to below 1", self.ema)
        if not 0 <= self.floor <= self.ceiling <= 1:
            raise _wrong("floor, ceiling", "0 <= floor <= ceiling <= 1", f"{self.floor}, {self.ceiling}")
        if self.kl_step is not None and not self.kl_step > 0:
            raise _wrong("kl_step", "a positive number, or None for no limit", self.kl_step)
        check_scorer(self.scorer)
        check_metric(self.metric, self.scorer)

    @classmethod
    def of(cls, settings: InfluenceConfig | Mapping[str, Any] | None) -> InfluenceConfig:
        """Settings as they are, from a mapping, or the defaults."""
        if isinstance(settings, cls):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            raise UserError(
                f"influence config: expected an InfluenceConfig or a mapping, found {type(settings).__name__}."
            )
        return cls(**(settings or {}))


def _wrong(name: str, expected: str, found: Any) -> UserError:
    return UserError(f"influence config: {name}: expected {expected}, found {found}.")
