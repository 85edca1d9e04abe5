"""Agreement: do estimated influences come true when models are trained again without the data, or on other mixtures?

    python tools/bench/influence_agreement.py [--seeds 3] [--cache FOLDER] [--json FILE] [--quick]

Every estimator of the package beside a plain dot product of gradients, and beside the formula that an earlier package
called DataInf, <g, v> / (lambda + |g|^2). Columns, each a mean over seeds (data, initial weights, subsets) +- its
standard error:

    digits LDS    linear datamodeling score (Park et al., TRAK, 2303.14186): rank correlation, per query, of the sum of
                  scores over a random half of the training samples with the loss of a model trained on that half
    GGN rank, r   Spearman's and Pearson's correlation, per query, with influence by the exact Gauss-Newton matrix,
                  damped by the weight decay of training
    LM LDS        as for digits, of a byte-level language model on documents of four domains
    mixture       the same over random mixtures of the domains, per query
    domain        the same, where a query is the mean loss of one domain
    mislabelled   area under the curve of finding wrong labels (a fifth of them) by the score for 200 clean queries
    LoRA kind     area under the curve of finding, among problems that adapters were trained on, those of the query's
                  kind

An estimator has a gap where it does not apply. `self` is the squared norm of a sample's gradient, `loss` its loss.
`source scalars` are mean gradients of source-pure microbatches, at the end of training and summed over the run.
The models train on one thread, all subsets at once. What they gave is kept in --cache, so that the next run has only
to score. The last line says by how much the package differs from short dense versions of the same formulas.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cheapertraining.influence.model_access import unit_losses
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.scorers.hook import hook_norms
from tools.bench import _agreement_dense as dense
from tools.bench._agreement_lora import kind_areas
from tools.bench._agreement_metrics import area_under_curve, correlation, mean_and_error, spearman
from tools.bench._agreement_product import Scores, estimates, gauss_newton, lissa, source_scalars
from tools.bench._agreement_retrain import Ensemble, Trained, load, mixtures, subsets, train
from tools.bench._agreement_tasks import digits, flipped_digits, language

Column = dict[str, NDArray[np.float64]]
"""Of one seed, by estimator: one value for each query."""

COLUMNS = ("digits LDS", "GGN rank", "GGN r", "LM LDS", "mixture", "domain", "mislabelled", "LoRA kind")


@dataclass(frozen=True)
class Size:
    """How much is retrained: numbers of seeds, and of models for each."""

    seeds: int
    digits: int
    language: int
    mixtures: int
    slow: bool = True  # with the estimators that take longest


FULL = Size(seeds=3, digits=256, language=64, mixtures=24)
QUICK = Size(seeds=1, digits=32, language=16, mixtures=8, slow=False)


def agreement(scores: Mapping[str, Tensor], ensemble: Ensemble, groups: Tensor | None = None) -> Column:
    """Linear datamodeling score of each query.

    Args:
        scores: `[N, Q]` by estimator.
        ensemble: what retraining gave.
        groups: int64 `[Q]`: the mean over each group of queries counts as one.
    """
    pooled = torch.eye(ensemble.losses.shape[1], dtype=torch.float64)
    if groups is not None:
        member = torch.nn.functional.one_hot(groups).double()
        pooled = member / member.sum(0)
    outcome = -(ensemble.losses @ pooled).numpy()
    return {
        name: spearman((ensemble.weights.double() @ values @ pooled).numpy(), outcome)
        for name, values in scores.items()
    }


def digits_seed(seed: int, size: Size, cache: Path | None) -> tuple[dict[str, Column], float]:
    """Columns of the digits, and the largest difference from the dense versions."""
    task = digits(seed)
    run = train(task)
    scores = estimates(run) | exact(run)
    if size.slow:
        scores |= gauss_newton(run) | lissa(run)
    reference = scores["GGN, exact"].numpy()
    return {
        "digits LDS": agreement(scores, load(task, subsets(task, size.digits), cache)),
        "GGN rank": {name: spearman(values.numpy(), reference) for name, values in scores.items()},
        "GGN r": {name: correlation(values.numpy(), reference) for name, values in scores.items()},
    }, difference(run, scores)


def language_seed(seed: int, size: Size, cache: Path | None) -> tuple[dict[str, Column], float]:
    """Columns of the language model, and the largest difference from the dense versions."""
    task = language(seed)
    run = train(task)
    scores = estimates(run)
    if size.slow:
        scores |= gauss_newton(run, tolerance=0.05)
    mixed = load(task, mixtures(task, size.mixtures), cache)
    wide = scores | source_scalars(run)
    return {
        "LM LDS": agreement(scores, load(task, subsets(task, size.language), cache)),
        "mixture": agreement(wide, mixed),
        "domain": agreement(wide, mixed, task.query_source),
    }, difference(run, scores)


def mislabelled_seed(seed: int) -> Column:
    """Areas under curves of finding the wrong labels: what harms the queries, or stands out, is suspicious."""
    task, wrong = flipped_digits(seed)
    run = train(task)
    scores = estimates(run, combine=True) | gauss_newton(run, combine=True) | lissa(run, combine=True)
    suspicion = {name: -values[:, 0] for name, values in scores.items()}
    suspicion["self"] = hook_norms(run.model, select_parameters(run.model), run.task.train)
    suspicion["loss"] = unit_losses(run.model, run.task.train, "sample")[0].detach()
    return {name: np.array([area_under_curve(values.numpy(), wrong.numpy())]) for name, values in suspicion.items()}


def exact(run: Trained) -> Scores:
    """Influence by the dense Gauss-Newton matrix of a classifier, with two dampings, and by layers' Fisher matrices."""
    gradients = dense.gradients(run.model, run.task.train)
    query = dense.gradients(run.model, run.task.query)
    decayed = dense.gauss_newton(run.model, run.task.train, lambda matrix: run.task.recipe.decay, query)
    damped = dense.gauss_newton(run.model, run.task.train, lambda matrix: 0.1 * float(matrix.diagonal().mean()), query)
    return {
        "GGN, exact": dense.dot(gradients, decayed),
        "GGN, damping 0.1": dense.dot(gradients, damped),
        "Fisher by layer, exact": dense.dot(gradients, dense.layer_fisher(gradients, query)),
    }


def difference(run: Trained, scores: Scores) -> float:
    """Largest relative difference (of Frobenius norms) between the package's scores and the dense versions'."""
    parts = []
    for name, reference in dense.references(run.model, run.task.train, run.task.query).items():
        parts.append(float((scores[name] - reference).norm() / reference.norm()))
    return max(parts)


def measure(size: Size, cache: Path | None) -> tuple[dict[str, list[Column]], float]:
    """All columns, a list over seeds, and the largest difference from the dense versions."""
    found: dict[str, list[Column]] = {name: [] for name in COLUMNS}
    worst = 0.0
    for seed in range(size.seeds):
        for part in (digits_seed, language_seed):
            columns, off = part(seed, size, cache)
            worst = max(worst, off)
            for name, column in columns.items():
                found[name].append(column)
        found["mislabelled"].append(mislabelled_seed(seed))
        found["LoRA kind"].append(kind_areas(seed))
    return found, worst


def summary(found: Mapping[str, Sequence[Column]]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Mean and standard error by estimator and column."""
    names = list(dict.fromkeys(name for columns in found.values() for name in columns[0]))
    return {
        name: {
            column: mean_and_error([seed[name] for seed in seeds])
            for column, seeds in found.items()
            if name in seeds[0]
        }
        for name in names
    }


def _text(cell: tuple[float, float | None] | None) -> str:
    if cell is None:
        return ""
    return f"{cell[0]:.3f}" if cell[1] is None else f"{cell[0]:.3f} +- {cell[1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=None, help=f"default {FULL.seeds}, {QUICK.seeds} with --quick")
    parser.add_argument("--cache", type=Path, help="folder that keeps what retrained models gave")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--quick", action="store_true", help="one seed, few models: under a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if arguments.quick else FULL
    size = replace(size, seeds=arguments.seeds or size.seeds)
    start = time.process_time()
    found, worst = measure(size, arguments.cache)
    table = summary(found)
    print(f"{'':24}" + "".join(f"{column:>16}" for column in COLUMNS))
    for name, cells in table.items():
        print(f"{name:24}" + "".join(f"{_text(cells.get(column)):>16}" for column in COLUMNS))
    print(f"{size.seeds} seeds, {time.process_time() - start:.0f} CPU-seconds")
    print(f"largest relative difference between the package and dense references: {worst:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seeds": size.seeds, "difference": worst, "table": table}, indent=1))


if __name__ == "__main__":
    main()
