"""The package's own estimators on a trained model: what is measured here is what a user gets."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cheapertraining.influence.model_access import model_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from cheapertraining.influence.preconditioners import EKFAC, KFAC, Adam, DataInf, LayerScale, Preconditioner
from cheapertraining.influence.preconditioners.krylov import GGNConjugateGradient, LiSSA
from cheapertraining.influence.scorers.hook import hook_norms, hook_scores, per_unit_gradients
from cheapertraining.influence.scorers.microbatch import MicrobatchScorer
from tools.bench._agreement_retrain import Trained
from tools.bench._agreement_tasks import Batch, rows

__all__ = ["SCALARS", "Scores", "directions_of", "estimates", "gauss_newton", "lissa", "source_scalars"]

Scores = dict[str, Tensor]
"""By estimator, float64 `[N, Q]`: positive where the training sample helps the query."""

SCALARS = ("source scalars (end)", "source scalars (run)")
SWEEP = (0.01, 1.0)


def directions_of(model: nn.Module, query: Batch, *, combine: bool = False) -> Directions:
    """Gradient of each query's summed loss; or the mean of them, one direction."""
    tensors: dict[str, Tensor] = {}

    def consume(name: str, gradients: Tensor) -> None:
        tensors[name] = gradients.mean(0, keepdim=True) if combine else gradients.clone()

    parameters = select_parameters(model)
    per_unit_gradients(model, parameters, query, consume)
    count = len(next(iter(tensors.values())))
    return Directions(tuple(str(index) for index in range(count)), {name: tensors[name] for name in parameters})


def preconditioners(run: Trained) -> dict[str, Preconditioner]:
    """By the name of the estimator."""
    model, batches = run.model, [run.task.train]
    parameters = select_parameters(model)
    made: dict[str, Preconditioner] = {
        "adam": Adam(parameters, run.optimizer),
        "layer_scale": LayerScale(parameters).fit(model, batches),
        "datainf": DataInf(parameters).fit(model, batches),
        "kfac": KFAC(parameters).fit(model, batches),
        "ekfac": EKFAC(parameters).fit(model, batches),
        "ekfac, 4 draws": EKFAC(parameters).fit(model, batches * 4),
        "ekfac, given labels": EKFAC(parameters, labels="given").fit(model, batches),
        "ekfac, during training": run.observed,
    }
    for damping in SWEEP:
        made[f"ekfac, damping {damping}"] = EKFAC(parameters, damping=damping).fit(model, batches)
    return made


def estimates(run: Trained, *, combine: bool = False) -> Scores:
    """Scores of all training samples by every estimator of the package, and by the formula of an earlier package.

    Args:
        run: what was trained.
        combine: for the mean of the queries' losses, one column, instead of for each query.
    """
    model, train, query = run.model, run.task.train, run.task.query
    directions = directions_of(model, query, combine=combine)
    norms = hook_norms(model, select_parameters(model), train)[:, None]
    lengths = sum(value.flatten(1).square().sum(1) for value in directions.tensors.values())
    assert isinstance(lengths, Tensor)
    dot = hook_scores(model, directions, train).scores
    scores = {
        "dot": dot,
        "cosine": dot / (norms * lengths).sqrt(),
        "earlier formula": dot / (1e-4 + norms),
        "tracin": _over_checkpoints(run, combine),
    }
    for name, preconditioner in preconditioners(run).items():
        scores[name] = hook_scores(model, preconditioner.apply(directions), train).scores
    return scores


def _over_checkpoints(run: Trained, combine: bool) -> Tensor:
    parts = [
        rate * hook_scores(model, directions_of(model, run.task.query, combine=combine), run.task.train).scores
        for rate, model in run.checkpoints
    ]
    return torch.stack(parts).sum(0)


def gauss_newton(run: Trained, *, combine: bool = False, tolerance: float = 0.01) -> Scores:
    """By conjugate gradients, damped by the weight decay of training; in float32, where a model is not very small."""
    model = run.model if run.task.name.endswith("digits") else copy.deepcopy(run.model).float()
    directions = directions_of(model, run.task.query, combine=combine)
    method = GGNConjugateGradient(select_parameters(model), damping=_damping(run), tolerance=tolerance)
    solved = method.fit(model, [run.task.train]).apply(directions)
    return {"ggn_cg": hook_scores(model, solved, run.task.train).scores}


def lissa(run: Trained, *, combine: bool = False) -> Scores:
    """LiSSA, with the same matrix and damping."""
    directions = directions_of(run.model, run.task.query, combine=combine)
    method = LiSSA(select_parameters(run.model), damping=_damping(run), terms=50)
    solved = method.fit(run.model, [run.task.train]).apply(directions)
    return {"lissa, 50 terms": hook_scores(run.model, solved, run.task.train).scores}


def _damping(run: Trained) -> float:
    """Weight decay belongs to the mean loss of a token, the package's matrices to the summed loss of a sample."""
    labels = run.task.train["labels"]
    return run.task.recipe.decay * float(labels[:, 1:].ge(0).sum()) / len(labels)


def source_scalars(run: Trained) -> Scores:
    """What training itself gives away: mean gradients of the sources, from microbatches of one source each.

    At the end of the run, and summed over its checkpoints. Every sample gets its source's score.
    """
    parts = [rate * _scalars(run, model) for rate, model in run.checkpoints]
    return dict(zip(SCALARS, (_scalars(run, run.model), torch.stack(parts).sum(0)), strict=True))


def _scalars(run: Trained, model: nn.Module) -> Tensor:
    directions = directions_of(model, run.task.query)
    source = run.task.source
    names = [str(index) for index in range(int(source.max()) + 1)]
    scorer = MicrobatchScorer(model, directions, names)
    scorer.begin()
    for index in range(len(names)):
        losses, counted = model_losses(model, rows(run.task.train, source == index))
        losses.sum().backward()
        scorer.mark(index, counted.sum())
    means = scorer.collect().means
    model.zero_grad(set_to_none=True)
    return means[source]
