"""DataInf (Kwon et al., "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models", ICLR
2024, arXiv 2310.00902), and the scale for each layer that is left of it when damping is strong.

A layer is a tensor ``l`` of ``d_l`` elements, ``g_i`` the gradient of sample ``i``'s summed loss there, and ``n``
the number of samples in the Fisher set. The inverse of a mean is replaced by the mean of inverses, by Sherman-Morrison:

    lambda_l = lambda_scale / n * sum_i |g_i|^2 / d_l
    H^-1 v   = 1/n sum_i (lambda_l I + g_i g_i^T)^-1 v
             = 1/(n lambda_l) * sum_i [v - (v . g_i) / (lambda_l + |g_i|^2) * g_i]

Signs: a positive score helps; the authors' own code reports the opposite sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.preconditioners.base import check_covered, check_finite, count_units
from cheapertraining.influence.ranks import check_equal_counts, sum_over_ranks
from cheapertraining.influence.scorers.hook import per_unit_gradients
from cheapertraining.influence.sharding import Shards, local

__all__ = ["DataInf", "LayerScale", "datainf_scores"]

Batch = Mapping[str, torch.Tensor]


class LayerScale:
    """``u / lambda_l``: one scale for each tensor, DataInf's limit where damping outweighs the samples.

    Args:
        parameters: by canonical name, all that directions may be over.
        lambda_scale: of the rule for ``lambda_l``; the authors' 0.1.
        by: what counts as a sample: a row, or a document within one.
    """

    name: ClassVar[str] = "layer_scale"

    def __init__(self, parameters: Mapping[str, nn.Parameter], lambda_scale: float = 0.1, by: By = "sample") -> None:
        if not lambda_scale > 0:
            raise UserError(f"{self.name}: expected a lambda_scale above 0, found {lambda_scale}.")
        self.parameters = dict(parameters)
        self.lambda_scale = lambda_scale
        self.by = by
        self.lambdas: dict[str, float] = {}
        """``lambda_l`` by parameter, after :meth:`fit`; 0 where no sample has a gradient."""

    def fit(self, model: nn.Module, batches: Sequence[Batch]) -> LayerScale:
        """Measure ``lambda_l`` over a Fisher set, in one pass.

        Call it on all ranks, each with its own batches, equally many.

        Raises:
            UserError: no batch, only masked labels, gradients that are not finite, ranks with other numbers of batches.
        """
        self.lambdas = {}
        device = next(iter(self.parameters.values())).device
        self._units = count_units(self.name, batches, self.by, device)
        check_equal_counts(len(batches), f"batches for {self.name}", device)
        squares = dict.fromkeys(self.parameters, torch.zeros((), dtype=torch.float64, device=device))
        sizes: dict[str, int] = {}

        def consume(name: str, gradients: torch.Tensor) -> None:
            squares[name] = squares[name] + _squared_norms(gradients).sum()
            sizes[name] = gradients[0].numel()

        for batch in batches:
            per_unit_gradients(model, self.parameters, batch, consume, by=self.by)
        totals = torch.stack(list(squares.values()))
        sum_over_ranks(totals)
        for name, total in zip(self.parameters, totals, strict=True):
            check_finite(self.name, name, total)
        self.lambdas = {
            name: self.lambda_scale * float(total) / (self._units * sizes.get(name, 1))
            for name, total in zip(self.parameters, totals, strict=True)
        }
        return self

    def apply(self, directions: Directions) -> Directions:
        """See :class:`~cheapertraining.influence.preconditioners.Preconditioner`.

        Raises:
            UserError: before :meth:`fit`; directions over other parameters.
        """
        self._check(directions)
        return Directions(directions.names, {name: self._scaled(name, v) for name, v in directions.tensors.items()})

    def _scaled(self, name: str, direction: torch.Tensor) -> torch.Tensor:
        # Where no sample has a gradient there is no scale, and nothing that a direction could change.
        return direction / self.lambdas[name] if self.lambdas[name] > 0 else torch.zeros_like(direction)

    def _check(self, directions: Directions) -> None:
        if not self.lambdas:
            raise UserError(f"{self.name}: expected to be fitted before it is applied. Call fit(model, batches) first.")
        check_covered(self.name, directions, {name: local(p).shape for name, p in self.parameters.items()})


class DataInf(LayerScale):
    """DataInf's ``H^-1 u``.

    Takes two passes over the Fisher set: :meth:`fit` for ``lambda_l``, :meth:`apply` for the correction, both with the
    per-sample gradients of one parameter and one batch in memory at a time. Whole directions are gathered on each rank.

    :meth:`apply` looks at the model as it is then: between the two, it must not be trained.

    Args: those of :class:`LayerScale`.
    """

    name: ClassVar[str] = "datainf"

    def fit(self, model: nn.Module, batches: Sequence[Batch]) -> DataInf:
        """Measure ``lambda_l``, and keep the model and the batches for :meth:`apply`."""
        super().fit(model, batches)
        self._model, self._batches = model, list(batches)
        self._shards = Shards(model, self.parameters)
        return self

    def apply(self, directions: Directions) -> Directions:
        """See :class:`~cheapertraining.influence.preconditioners.Preconditioner`. One pass over the Fisher set."""
        self._check(directions)
        whole = {name: self._shards.gather(name, v) for name, v in directions.tensors.items()}
        flat = {name: v.flatten(1) for name, v in whole.items()}
        corrections = {name: torch.zeros_like(v) for name, v in flat.items()}

        def consume(name: str, gradients: torch.Tensor) -> None:
            rows = gradients.flatten(1).to(flat[name].dtype)
            damped = self.lambdas[name] + _squared_norms(rows)
            corrections[name] += (flat[name] @ rows.T / damped.to(rows.dtype)) @ rows

        parameters = {name: self.parameters[name] for name in flat if self.lambdas[name] > 0}
        for batch in self._batches if parameters else ():
            per_unit_gradients(self._model, parameters, batch, consume, by=self.by)
        scaled = {}
        for name, correction in corrections.items():
            sum_over_ranks(correction)
            check_finite(self.name, name, correction)
            total = self._scaled(name, flat[name] - correction / self._units).view_as(whole[name])
            scaled[name] = self._shards.scatter(name, total)
        return Directions(directions.names, scaled)


def datainf_scores(
    probes: torch.Tensor,
    squared_norms: torch.Tensor,
    gram: torch.Tensor,
    candidates: torch.Tensor,
    lambda_: float | torch.Tensor,
) -> torch.Tensor:
    """DataInf's scores on one layer, from inner products alone: exactly ``<H^-1 v_k, g_m>``.

    Args:
        probes: ``[K, n]``, ``<v_k, g_i>`` with the Fisher set.
        squared_norms: ``[n]``, ``|g_i|^2`` over the Fisher set.
        gram: ``[n, M]``, ``<g_i, g_m>`` of the Fisher set with the candidates.
        candidates: ``[K, M]``, ``<v_k, g_m>``.
        lambda_: the layer's ``lambda_l``, above 0.

    Returns:
        ``[K, M]``, positive where the candidate helps; the sum over layers is the score.
    """
    weighted: torch.Tensor = probes / (lambda_ + squared_norms)
    scores: torch.Tensor = (candidates - weighted @ gram / len(squared_norms)) / lambda_
    return scores


def _squared_norms(gradients: torch.Tensor) -> torch.Tensor:
    """``[N]``, float64."""
    norms: torch.Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms.double().square()
