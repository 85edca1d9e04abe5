"""What `influence_cost.py` measures of this package: each way to score, ready to run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.preconditioners import EKFAC, DataInf
from cheapertraining.influence.preconditioners.factors import Sums
from cheapertraining.influence.preconditioners.upkeep import Schedule, decomposed
from cheapertraining.influence.scorers.consumers import Projection
from cheapertraining.influence.scorers.forward import forward_scores
from cheapertraining.influence.scorers.fused import FusedScorer
from cheapertraining.influence.scorers.hook import (
    hook_gram,
    hook_norms,
    hook_projected,
    hook_scores,
    per_unit_gradients,
)
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer, source_microbatches
from tools.bench._influence_setting import Batch, Setting, cpu_seconds, step

Views = Mapping[str, Callable[[float], float]]


@dataclass(frozen=True)
class Case:
    """A candidate on a setting.

    Attributes:
        run: gives the scores, or what else came out, to be checked.
        baseline: what its CPU time is divided by.
        views: the figures that are made of the ratio, by what is added to the candidate's name.
    """

    run: Callable[[], torch.Tensor]
    baseline: Callable[[], object]
    views: Views = field(default_factory=lambda: {"": lambda ratio: ratio})


@dataclass(frozen=True)
class Candidate:
    """What can be measured on a setting.

    Attributes:
        name: that ``--only`` is matched against.
        group: table that it is printed in.
        make: a case; this is not measured.
        curve: on each setting, not only with the first model.
    """

    name: str
    group: str
    make: Callable[[Setting], Case]
    curve: bool = False


TRAINING, PASS, OFFLINE = "with the training step", "a pass of its own", "preconditioners, offline"


def fused(setting: Setting, count: int, **options: Any) -> Case:
    """A training step that scores."""
    scorer = FusedScorer(setting.model, setting.directions(count), **options)
    scale = 1.0 / setting.tokens

    def run() -> torch.Tensor:
        with scorer.armed(setting.batch):
            step(setting.model, setting.batch)
        scores = scorer.collect(scale).scores
        setting.model.zero_grad()
        return scores

    return Case(run, setting.plain)


def sources(setting: Setting, count: int) -> Case:
    """A step cut into microbatches of one source each, with and without scalar products."""
    microbatches = source_microbatches(setting.batch, setting.rows)
    names = [f"source {number}" for number in range(len(microbatches))]
    scorer = MicrobatchScorer(setting.model, setting.directions(count), names)
    total = setting.tokens
    tokens = [int((part["labels"][:, 1:] >= 0).sum()) for part in microbatches]

    def plain() -> None:
        for part in microbatches:
            step(setting.model, part, total)
        setting.model.zero_grad()

    def run() -> torch.Tensor:
        scorer.begin()
        for number, part in enumerate(microbatches):
            step(setting.model, part, total)
            scorer.mark(number, tokens[number], 1.0 / total)
        setting.model.zero_grad()
        return scorer.collect().means

    return Case(run, plain)


def hook(setting: Setting, count: int) -> Case:
    """Exact products."""
    directions = setting.directions(count)
    return Case(lambda: hook_scores(setting.model, directions, setting.batch).scores, setting.plain)


def norms(setting: Setting) -> Case:
    """Squared norms."""
    return Case(lambda: hook_norms(setting.model, setting.parameters, setting.batch), setting.plain)


def gram(setting: Setting) -> Case:
    """Products of the samples with each other."""
    return Case(lambda: hook_gram(setting.model, setting.parameters, setting.batch), setting.plain)


def projected(setting: Setting) -> Case:
    """LoGra."""
    projection = Projection.random(setting.parameters, rank=16, seed=0)
    return Case(
        lambda: torch.cat(list(hook_projected(setting.model, projection, setting.batch).values()), 1), setting.plain
    )


def forward(setting: Setting, count: int, *, known: bool = False, **options: Any) -> Case:
    """Forward passes alone; the figure is that of one direction."""
    directions = setting.directions(count)
    if known:
        options["base_losses"] = forward_scores(setting.model, directions, setting.batch, **options).losses
    return Case(
        lambda: forward_scores(setting.model, directions, setting.batch, **options).scores,
        setting.plain,
        {"": lambda ratio: ratio / count},
    )


def naive(setting: Setting, count: int) -> Case:
    """Forward and backward of one sample after the other, and products of its whole gradient."""
    directions = setting.directions(count)
    rows = [{key: value[row : row + 1] for key, value in setting.batch.items()} for row in range(setting.rows)]

    def scores(row: Batch) -> torch.Tensor:
        setting.model.zero_grad()
        step(setting.model, row)
        total = torch.zeros(count)
        for name, parameter in setting.parameters.items():
            assert parameter.grad is not None
            total += directions.tensors[name].flatten(1) @ parameter.grad.flatten()
        return total

    def run() -> torch.Tensor:
        found = torch.stack([scores(row) for row in rows])
        setting.model.zero_grad()
        return found

    return Case(run, setting.plain)


def observed(setting: Setting, preconditioner: EKFAC) -> torch.Tensor:
    """A training step that the factors are kept up on."""
    with preconditioner.observing(setting.model, setting.batch, loss_scale=1.0 / setting.tokens):
        step(setting.model, setting.batch)
    setting.model.zero_grad()
    return torch.zeros(())


def factor_sums(preconditioner: EKFAC) -> Sums:
    """What a decomposition begins with."""
    tensors = preconditioner.state_dict()["sums"]
    return Sums({key: value for key, value in tensors.items() if not key.startswith("squares/")})


def upkeep(setting: Setting) -> Case:
    """An observed step, once a basis is there, spread over the steps that it comes once in; and a decomposition."""
    schedule = Schedule()
    preconditioner = EKFAC(setting.parameters, schedule=Schedule(first=1))
    observed(setting, preconditioner)
    preconditioner.apply(setting.directions(1))  # waits for the basis, which the next observations measure in
    sums = factor_sums(preconditioner)
    decomposition = cpu_seconds(lambda: decomposed(sums)) / cpu_seconds(setting.plain)

    def spread(steps: float) -> Callable[[float], float]:
        return lambda ratio: 1 + (ratio - 1) / schedule.every + decomposition / steps

    first = schedule.first * schedule.every
    views: Views = {
        ", an observed step": lambda ratio: ratio,
        ", without decompositions": spread(float("inf")),
        ", as scheduled": spread(schedule.refresh * schedule.every),
        f", first {first} steps with a decomposition": spread(first),
        ", a decomposition (in steps)": lambda _: decomposition,
    }
    return Case(lambda: observed(setting, preconditioner), setting.plain, views)


def fit(setting: Setting, kind: type[EKFAC] | type[DataInf]) -> Case:
    """Fitting on the batch: by Fisher sample, the same ratio."""
    preconditioner = kind(setting.parameters)

    def run() -> torch.Tensor:
        preconditioner.fit(setting.model, [setting.batch])
        return torch.zeros(())

    return Case(run, setting.plain)


def apply(setting: Setting, kind: type[EKFAC] | type[DataInf], count: int) -> Case:
    """Preconditioning directions, after a fit."""
    preconditioner = kind(setting.parameters).fit(setting.model, [setting.batch])
    directions = setting.directions(count)
    return Case(
        lambda: torch.cat([t.flatten() for t in preconditioner.apply(directions).tensors.values()]), setting.plain
    )


def pairwise(setting: Setting, kind: type[EKFAC] | None) -> Case:
    """All samples with half as many queries, the queries' gradients included: what libraries call pairwise scores."""
    queries = setting.queries
    count = len(queries["labels"])
    preconditioner = kind(setting.parameters).fit(setting.model, [setting.batch]) if kind else None

    def run() -> torch.Tensor:
        parameters = setting.parameters
        tensors = {name: torch.empty(count, *p.shape) for name, p in parameters.items()}
        per_unit_gradients(setting.model, parameters, queries, lambda name, found: void(tensors[name].copy_(found)))
        directions = Directions(tuple(str(query) for query in range(count)), tensors)
        if preconditioner is not None:
            directions = preconditioner.apply(directions)
        return hook_scores(setting.model, directions, setting.batch).scores

    return Case(run, setting.plain)


def void(value: object) -> None:
    """Drop a result."""


def _candidates() -> tuple[Candidate, ...]:
    part = functools.partial
    return (
        *(Candidate(f"fused, K={k}", TRAINING, part(fused, count=k), curve=k in (1, 8)) for k in (1, 2, 8, 32)),
        Candidate("fused with norms, K=8", TRAINING, part(fused, count=8, norms=True)),
        Candidate("fused DataInf, K=8", TRAINING, part(fused, count=8, datainf=0.1), curve=True),
        Candidate("sources by microbatch, K=1", TRAINING, part(sources, count=1), curve=True),
        Candidate("sources by microbatch, K=8", TRAINING, part(sources, count=8)),
        Candidate("EK-FAC upkeep", TRAINING, upkeep, curve=True),
        Candidate("hook, K=8", PASS, part(hook, count=8), curve=True),
        Candidate("hook norms", PASS, norms),
        Candidate("hook Gram matrix", PASS, gram),
        Candidate("hook LoGra, rank 16", PASS, projected),
        Candidate("difference, losses known", PASS, part(forward, count=1, known=True), curve=True),
        Candidate("difference, losses unknown", PASS, part(forward, count=1)),
        Candidate("difference, central", PASS, part(forward, count=1, method="central")),
        Candidate("JVP, K=1", PASS, part(forward, count=1, method="jvp"), curve=True),
        Candidate("JVP, K=4, by direction", PASS, part(forward, count=4, method="jvp")),
        Candidate("naive loop, K=8", PASS, part(naive, count=8)),
        Candidate("dot, pairwise with queries", PASS, part(pairwise, kind=None)),
        Candidate("EK-FAC, pairwise with queries", PASS, part(pairwise, kind=EKFAC)),
        Candidate("EK-FAC fit, with decomposition", OFFLINE, part(fit, kind=EKFAC)),
        Candidate("EK-FAC apply, K=8", OFFLINE, part(apply, kind=EKFAC, count=8)),
        Candidate("DataInf fit", OFFLINE, part(fit, kind=DataInf)),
        Candidate("DataInf apply, K=8", OFFLINE, part(apply, kind=DataInf, count=8)),
    )


CANDIDATES = _candidates()
# Wanted at most, by row of the table and length of a sequence.
GOALS: dict[str, dict[int, float]] = {
    "fused, K=1": {128: 1.09, 512: 1.03},
    "fused, K=8": {128: 1.15, 512: 1.08},
    "fused DataInf, K=8": {128: 1.20, 512: 1.06},
    "sources by microbatch, K=1": {128: 1.01, 512: 1.01},
    "EK-FAC upkeep, as scheduled": {128: 1.05, 512: 1.05},
    "difference, losses known": {128: 0.40, 512: 0.40},
    "JVP, K=1": {128: 1.0, 512: 1.0},
}
