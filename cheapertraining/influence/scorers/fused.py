"""Scores that fall out of the training backward itself.

The gradient of a weight is the sum of the units' gradients. Forming the units' first, in blocks that stay in the
cache, and then their sum costs little more than the sum alone, and their products with a few directions are small
change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.preconditioners.datainf import datainf_scores
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.scorers.backward import Watch, refuse_unwatchable, watched
from cheapertraining.influence.scorers.consumers import Moments, Products
from cheapertraining.influence.scorers.hook import directed_parameters, whole
from cheapertraining.influence.scorers.sites import find_sites
from cheapertraining.influence.scorers.units import Units

__all__ = ["FusedScorer"]


class FusedScorer:
    """Scores units while a model trains on them; the training gradients are those without it.

    ::

        scorer = FusedScorer(model, directions)
        for microbatch in microbatches:
            with scorer.armed(microbatch):
                loss = model(**microbatch).loss
                loss.backward()
        scores = scorer.collect(loss_scale)

    Args:
        model: wrapped or not.
        directions: of any of its parameters; layers that none is given for are not touched.
        by: what a unit is.
        norms: squared norms of the units' gradients as well.
        datainf: precondition by DataInf with each microbatch as its own Fisher set: the scale of its damping (0.1 in
            Kwon et al., 2310.00902), or the damping of each parameter. None: no preconditioning.

    Raises:
        UserError: a compiled model, layers of an unknown kind, directions of parameters that the model does not train,
            a damping that is not above 0 or is missing for one of them.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        *,
        by: By = "sample",
        norms: bool = False,
        datainf: float | Mapping[str, float] | None = None,
    ) -> None:
        if datainf is not None:
            _check_damping(datainf, directions)
        refuse_unwatchable(model)
        self._parameters = directed_parameters(model, directions)
        self._directions = whole(model, self._parameters, directions)
        self._sites = find_sites(model, self._parameters)
        self._by, self._norms, self._datainf = by, norms, datainf
        self._taken: list[tuple[Products | Moments, torch.Tensor]] = []

    @contextlib.contextmanager
    def armed(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Forward and backward of one microbatch take place in here.

        An error inside drops the microbatch's scores.

        Args:
            batch: ``labels`` int64 ``[B, S]`` as the model gets them, unshifted; ``position_ids`` for documents.

        Raises:
            UserError: no backward pass took place, or a layer saw something else than ``[B, S]`` tokens.
        """
        device = next(iter(self._parameters.values())).device
        units = Units(batch, self._by, device)
        consumer: Products | Moments
        if self._norms or self._datainf is not None:
            consumer = Moments(self._directions, gram=self._datainf is not None)
        else:
            consumer = Products(self._directions, units)
        watch = Watch(self._sites, consumer, units)
        with watched(watch):
            yield
        if not watch.reached:
            raise UserError("FusedScorer.armed: expected a backward pass through the scored layers inside, found none.")
        watch.flush()
        counted = torch.zeros(units.shape, dtype=torch.bool, device=device)
        counted[:, :-1] = batch["labels"].to(device)[:, 1:] != IGNORED
        self._taken.append((consumer, units.sum_counts(counted)))

    def collect(self, loss_scale: float | torch.Tensor = 1.0) -> SampleScores:
        """Scores of all microbatches since the last call, in their order; what is not finite comes as it is.

        Args:
            loss_scale: the factor (a number, or a scalar on the device) with which a unit's summed loss entered
                backward, such as 1 over the batch's loss-counting tokens (and times a gradient scaler's scale).

        Raises:
            UserError: there was none.
        """
        if not self._taken:
            raise UserError("FusedScorer.collect: expected a microbatch in `armed` before, found none.")
        taken, self._taken = self._taken, []
        tokens = torch.cat([counts for _, counts in taken])
        scores = torch.cat([self._scores(consumer, counts > 0, loss_scale) for consumer, counts in taken])
        losses = torch.full((len(tokens),), torch.nan, dtype=torch.float64, device=tokens.device)
        norms = None
        if self._norms:
            norms = torch.cat([_squares(c) / loss_scale**2 for c, _ in taken if isinstance(c, Moments)])
        return SampleScores(scores, tokens, losses, norms)

    def _scores(
        self, consumer: Products | Moments, live: torch.Tensor, loss_scale: float | torch.Tensor
    ) -> torch.Tensor:
        if isinstance(consumer, Products):
            return consumer.scores / loss_scale
        total = torch.zeros((), dtype=torch.float64)
        for name, moment in consumer.found.items():
            products, gram = moment.products.double() / loss_scale, moment.gram.double() / loss_scale**2
            if self._datainf is not None:
                products = self._preconditioned(name, products, gram, live, moment.elements)
            total = total + products
        return total

    def _preconditioned(
        self, name: str, products: torch.Tensor, gram: torch.Tensor, live: torch.Tensor, elements: int
    ) -> torch.Tensor:
        """DataInf's scores ``[N, K]`` of one parameter. The units with a token that counts, ``live``, are the Fisher
        set, and have the damping given, or that of the authors' rule; what has no gradient scores 0."""
        fisher, own = gram[live][:, live], products[live].t()
        if isinstance(self._datainf, Mapping):
            damping = gram.new_tensor(self._datainf[name])
        else:
            assert self._datainf is not None
            damping = fisher.diagonal().sum() * float(self._datainf) / (max(1, len(fisher)) * elements)
        scores = torch.zeros_like(products)
        scores[live] = datainf_scores(own, fisher.diagonal(), fisher, own, damping).t()
        return torch.where(damping > 0, scores, 0.0)


def _check_damping(datainf: float | Mapping[str, float], directions: Directions) -> None:
    given = datainf if isinstance(datainf, Mapping) else dict.fromkeys(directions.tensors, datainf)
    for name in directions.tensors:
        if name not in given or not given[name] > 0:
            raise UserError(f"datainf: expected a damping above 0 for '{name}', found {given.get(name, 'none')}.")


def _squares(consumer: Moments) -> torch.Tensor:
    grams = [moment.gram.double() for moment in consumer.found.values()]
    return torch.stack([gram.diagonal() if gram.dim() == 2 else gram for gram in grams]).sum(0)
