"""What `influence_cost.py` measures beside this package: DataInf in loops, kronfluence, dattri.

kronfluence (1.0.1) and dattri (0.3.0) come with ``pip install -e .[bench]``; each is called as its documentation says.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.preconditioners.datainf import datainf_scores
from tools.bench._influence_candidates import Candidate, Case
from tools.bench._influence_setting import Batch, Setting

DATAINF, LIBRARIES = "DataInf from given gradients", "other libraries"
Gradients = list[dict[str, torch.Tensor]]


def datainf_loops(train: Gradients, probes: Gradients, scale: float = 0.1) -> torch.Tensor:
    """DataInf's scores ``[Q, N]`` as one writes the formula down: layers, probes and samples in loops.

    The work is that of the authors' code: for each probe and layer a sum over samples, then a product with each sample.
    """
    scores = torch.zeros(len(probes), len(train))
    for row, probe in enumerate(probes):
        solved = {}
        for name, direction in probe.items():
            level = sum(torch.mean(sample[name] ** 2) for sample in train) / len(train) * scale
            total = torch.zeros_like(direction)
            for sample in train:
                gradient = sample[name]
                factor = torch.sum(direction * gradient) / (level + torch.sum(gradient**2))
                total += (direction - factor * gradient) / (len(train) * level)
            solved[name] = total
        for column, sample in enumerate(train):
            scores[row, column] = sum(torch.sum(solved[name] * sample[name]) for name in probe)
    return scores


def datainf_matrices(
    train: dict[str, torch.Tensor], probes: dict[str, torch.Tensor], scale: float = 0.1
) -> torch.Tensor:
    """The same from matrix products, ``[N, d]`` and ``[Q, d]`` by layer."""
    scores = torch.zeros(())
    for name, rows in train.items():
        gram, products = rows @ rows.t(), probes[name] @ rows.t()
        squares = gram.diagonal()
        level = float(squares.mean()) / rows.shape[1] * scale
        scores = scores + datainf_scores(products, squares, gram, products, level)
    return scores


def engine(setting: Setting, rank: int | None) -> Case:
    """Matrix products against loops, on random gradients of all linear layers, or of LoRA layers on them."""
    generator = torch.Generator().manual_seed(4)
    samples, queries = setting.rows, max(1, setting.rows // 2)
    sizes: dict[str, int] = {}
    for name, module in setting.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            out, inner = module.weight.shape
            sizes.update({name: out * inner} if rank is None else {f"{name}.A": rank * inner, f"{name}.B": out * rank})
    train = {name: torch.randn(samples, size, generator=generator) for name, size in sizes.items()}
    probes = {name: torch.randn(queries, size, generator=generator) for name, size in sizes.items()}

    def listed(stacked: dict[str, torch.Tensor], count: int) -> Gradients:
        return [{name: rows[place] for name, rows in stacked.items()} for place in range(count)]

    lists = listed(train, samples), listed(probes, queries)
    return Case(
        lambda: datainf_matrices(train, probes),
        lambda: datainf_loops(*lists),
        {", of the loops": lambda ratio: ratio, ", times faster": lambda ratio: 1 / ratio},
    )


class _Rows(torch.utils.data.Dataset[Batch]):
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch["labels"])

    def __getitem__(self, row: int) -> Batch:
        return {key: value[row] for key, value in self._batch.items()}


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(
        logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _task(names: list[str]) -> Any:
    """kronfluence's description of a language model, tracking all linear layers."""
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> torch.Tensor:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            labels = batch["labels"]
            if sample:
                drawn = torch.multinomial(logits.detach()[:, :-1].flatten(0, 1).softmax(-1), 1)
                labels = torch.cat([labels[:, :1], drawn.view(len(labels), -1)], 1)
            return _summed_loss(logits, labels)

        def compute_measurement(self, batch: Batch, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    return LanguageModelling()


def kronfluence(setting: Setting, what: str) -> Case:
    """``what``: ``covariance``, ``lambda``, or pairwise scores with strategy ``identity`` or ``ekfac``."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments

    model = copy.deepcopy(setting.model)
    task = _task([name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    folder = tempfile.TemporaryDirectory()
    analyzer = Analyzer(
        "bench",
        prepare_model(model, task),
        task,
        cpu=True,
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=folder.name,
    )
    train, queries = _Rows(setting.batch), _Rows(setting.queries)
    strategy = "identity" if what == "identity" else "ekfac"
    fitting: dict[str, Any] = {
        "factors_name": "factors",
        "dataset": train,
        "per_device_batch_size": setting.rows,
        "overwrite_output_dir": True,
    }
    analyzer.fit_all_factors(factor_args=FactorArguments(strategy=strategy), **fitting)

    def run() -> torch.Tensor:
        assert Path(folder.name).exists()  # held on to as long as this is
        if what == "covariance":
            analyzer.fit_covariance_matrices(factor_args=FactorArguments(strategy=strategy), **fitting)
        elif what == "lambda":
            analyzer.fit_lambda_matrices(factor_args=FactorArguments(strategy=strategy), **fitting)
        else:
            analyzer.compute_pairwise_scores(
                scores_name="scores",
                factors_name="factors",
                query_dataset=queries,
                train_dataset=train,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=len(train),
                overwrite_output_dir=True,
            )
            return analyzer.load_pairwise_scores("scores")["all_modules"]
        return torch.zeros(())

    return Case(run, setting.plain)


def dattri(setting: Setting) -> Case:
    """Products of whole gradients (TracIn at one checkpoint), without the projection that it makes by default.

    Each side is one batch: with more of them, it forms the queries' gradients again for each batch of samples. At most
    eight samples, in the baseline too: whole gradients and activations of all of them are held at once.
    """
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    setting = Setting(setting.params, min(setting.rows, 8), setting.length)
    model = copy.deepcopy(setting.model)

    def loss(parameters: dict[str, torch.Tensor], row: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, positions = row
        inputs = {"input_ids": ids[None], "position_ids": positions[None]}
        return _summed_loss(functional_call(model, parameters, (), inputs).logits, ids[None])

    def loader(batch: Batch) -> DataLoader[Any]:
        rows = TensorDataset(batch["input_ids"], batch["position_ids"])
        return DataLoader(rows, batch_size=len(rows), shuffle=False)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None
    train, queries = loader(setting.batch), loader(setting.queries)

    def run() -> torch.Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return attributor.attribute(train, queries)

    return Case(run, setting.plain)


def _named(library: str, name: str, make: Callable[..., Case], **options: Any) -> Candidate:
    return Candidate(f"{library}: {name}", LIBRARIES, functools.partial(make, **options))


ENGINES = (
    Candidate("DataInf matrix form, linear layers", DATAINF, functools.partial(engine, rank=None)),
    Candidate("DataInf matrix form, LoRA rank 8", DATAINF, functools.partial(engine, rank=8)),
)
OTHERS = (
    _named("kronfluence", "identity, pairwise with queries", kronfluence, what="identity"),
    _named("kronfluence", "EK-FAC covariance fit", kronfluence, what="covariance"),
    _named("kronfluence", "EK-FAC lambda fit", kronfluence, what="lambda"),
    _named("kronfluence", "EK-FAC, pairwise with queries", kronfluence, what="ekfac"),
    _named("dattri", "TracIn, pairwise with queries, 8 samples", dattri),
)
