"""K-FAC and EK-FAC: each matrix's block of the Fisher matrix as a Kronecker product, or diagonal in its eigenbasis.

With the factors' eigenvectors ``Q_left``, ``Q_right`` (see :mod:`~cheapertraining.influence.preconditioners.factors`)
and ``u`` in the shape of the parameter,

    H^-1 u = Q_left [ (Q_left^T u Q_right) / (Lambda + delta) ] Q_right^T
    K-FAC    Lambda = outer product of the factors' eigenvalues           (Martens & Grosse, 1503.05671)
    EK-FAC   Lambda_jk = E_i[ (Q_left^T G_i Q_right)_jk^2 ]               (George et al., 1806.03884)
    delta  = damping * mean(Lambda), for each parameter                   (Grosse et al., 2308.03296)

``G_i`` is the gradient of one unit's (sample's, document's) *summed* loss, all sites of a tied parameter together, so
``Lambda`` has the scale of the units' Fisher matrix ``E_i[g_i g_i^T]``. Norm weights, biases and the one-hot side of
embeddings are diagonal, as are sides above ``max_dim``.

Labels are drawn from the model, as the Fisher matrix wants it, or those given are taken (the empirical Fisher matrix).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import check_vocabulary, model_logits, no_trace
from cheapertraining.influence.parameters import Directions
from cheapertraining.influence.preconditioners.base import check_covered, check_finite, count_units
from cheapertraining.influence.preconditioners.factors import Basis, Observer, Sums, rotate
from cheapertraining.influence.preconditioners.upkeep import Schedule, Upkeep, decomposed
from cheapertraining.influence.ranks import check_equal_counts, rank_and_world
from cheapertraining.influence.scorers.backward import Watch, refuse_unwatchable, watched
from cheapertraining.influence.scorers.hook import run_pass
from cheapertraining.influence.scorers.sites import find_sites
from cheapertraining.influence.scorers.units import Units, wide
from cheapertraining.influence.sharding import Shards, local, reshard

__all__ = ["EKFAC", "KFAC", "Labels", "sampled_labels"]

Batch = Mapping[str, torch.Tensor]
Labels = Literal["sampled", "given"]


class KFAC:
    """K-FAC's ``H^-1 u``. Fit it on a set of batches, or keep it up during training with :meth:`observing`.

    Args:
        parameters: by canonical name, all that directions may be over.
        damping: ``delta`` as a multiple of the mean of ``Lambda``.
        max_dim: sides of a matrix above it have a diagonal factor.
        by: what a unit is.
        labels: of :meth:`fit`; what passes by in training has the labels given.
        seed: of the labels drawn.
        schedule: of what is done during training.
    """

    name: ClassVar[str] = "kfac"
    corrected: ClassVar[bool] = False

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        damping: float = 0.1,
        max_dim: int = 4096,
        by: By = "sample",
        labels: Labels = "sampled",
        seed: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        if not damping > 0:
            raise UserError(f"{self.name}: expected a damping above 0, found {damping}.")
        self.parameters = dict(parameters)
        self.damping, self.max_dim, self.by, self.labels, self.seed = damping, max_dim, by, labels, seed
        self.schedule = schedule or Schedule()
        self._kept = Upkeep(self.schedule, corrected=self.corrected)
        self._shards: Shards | None = None

    def fit(self, model: nn.Module, batches: Sequence[Batch]) -> KFAC:
        """Sum up factors over a set of batches; EK-FAC takes a second pass over it. Forgets what was there.

        Call it on all ranks, each with its own batches, equally many. Draws from no global random generator.

        Raises:
            UserError: no batch, only masked labels, numbers that are not finite.
        """
        device = next(iter(self.parameters.values())).device
        count_units(self.name, batches, self.by, device)
        check_equal_counts(len(batches), f"batches for {self.name}", device)
        self._shards = Shards(model, self.parameters)
        labelled = self._labelled(model, batches)
        sums = self._summed(model, labelled, {}, factors=True)
        bases = {name: basis.to(sums.sites("right", name)[0]) for name, basis in decomposed(sums).items()}
        if self.corrected:
            squares = self._summed(model, labelled, bases, factors=False)
            sums = Sums({**sums.tensors, **squares.tensors})
        self._kept.start(sums, bases)
        return self

    def apply(self, directions: Directions) -> Directions:
        """See :class:`~cheapertraining.influence.preconditioners.Preconditioner`.

        Of a sharded parameter, whole directions are gathered on each rank, one parameter at a time.

        Raises:
            UserError: nothing was fitted or observed; directions over other parameters.
        """
        check_covered(self.name, directions, {name: local(p).shape for name, p in self.parameters.items()})
        state = self._kept.current()
        if state is None or self._shards is None:
            raise UserError(
                f"{self.name}: expected to be fitted before it is applied. Call fit(model, batches) first, or wrap a "
                "training pass in observing(model, batch)."
            )
        sums, bases = state
        solved = {}
        for name, shards in directions.tensors.items():
            whole = self._shards.gather(name, shards)
            solved[name] = self._shards.scatter(name, self._solve(name, whole, sums, bases.get(name)))
        return Directions(directions.names, solved)

    @property
    def ready(self) -> bool:
        """Whether something was fitted or observed, so that :meth:`apply` can be called."""
        return self._kept.begun

    def wants(self, step: int) -> bool:
        """Whether :meth:`observing` should be wrapped around (one microbatch of) training step ``step``."""
        return step % self.schedule.every == 0

    @contextlib.contextmanager
    def observing(self, model: nn.Module, batch: Batch, *, loss_scale: float = 1.0) -> Iterator[None]:
        """Forward and backward of one training microbatch happen inside; factors and ``Lambda`` take it in.

        The gradients of training stay as they are. What is not finite is left out.

        Args:
            model: wrapped or not, not compiled.
            batch: the microbatch, on the model's device.
            loss_scale: factor that the summed token loss enters backward with, such as 1 over the tokens of the step.

        Raises:
            UserError: no backward pass took place inside.
        """
        if self._shards is None:
            self._shards = Shards(model, self.parameters)
        inner = _inner(model)
        refuse_unwatchable(inner)
        bases = self._kept.begin()
        sums, rows = Sums(), self._kept.rows(len(batch["labels"]))
        observer = self._observer(inner, sums, batch, bases, factors=True, rows=rows, scale=loss_scale)
        units = Units(batch, self.by, batch["labels"].device)
        watch = Watch(find_sites(inner, self.parameters), observer, units)
        with watched(watch):
            yield
        if not watch.reached:
            raise UserError(f"{self.name}.observing: expected a backward pass inside, found none.")
        watch.flush()
        self._kept.end(sums)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that a resumed run goes on from. A collective call, the same result on all ranks."""
        return {"parameters": list(self.parameters), **self._kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Take over :meth:`state_dict`. A collective call.

        Raises:
            UserError: the state is of other parameters.
        """
        if other := sorted(set(state["parameters"]) ^ set(self.parameters)):
            raise UserError(
                f"{self.name}: expected a saved state of the same {len(self.parameters)} parameters, found one that "
                f"differs in '{other[0]}'. Resume with the same model and `layers`."
            )
        self._shards = Shards(model, self.parameters)
        self._kept.load_state_dict(state, next(iter(self.parameters.values())).device)

    def _labelled(self, model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        if self.labels == "given":
            return list(batches)
        rank, world = rank_and_world()
        generator = torch.Generator(batches[0]["labels"].device).manual_seed(self.seed * world + rank)
        return [{**batch, "labels": sampled_labels(_inner(model), batch, generator)} for batch in batches]

    def _summed(self, model: nn.Module, batches: Sequence[Batch], bases: Mapping[str, Basis], *, factors: bool) -> Sums:
        """Means over the ranks of the sums over these batches."""
        sums = Sums()
        for batch in batches:
            observer = self._observer(_inner(model), sums, batch, bases, factors=factors)
            run_pass(model, self.parameters, batch, Units(batch, self.by, batch["labels"].device), observer)
        sums = sums.over_ranks()
        for key, value in sums.tensors.items():
            check_finite(self.name, key.split("/")[1] if "/" in key else key, value)
        return sums

    def _observer(
        self, inner: nn.Module, sums: Sums, batch: Batch, bases: Mapping[str, Basis], **options: Any
    ) -> Observer:
        embeddings: list[Any] = [site for site in find_sites(inner, self.parameters) if site.kind == "embedding"]
        vocabularies = {site.parameters["weight"]: site.module.num_embeddings for site in embeddings}
        return Observer(sums, vocabularies, batch, self.by, bases=bases, max_dim=self.max_dim, **options)

    def _eigenvalues(self, name: str, sums: Sums, basis: Basis | None) -> torch.Tensor | None:
        """``Lambda``; None for a parameter that no gradient was seen of."""
        if basis is not None and not self.corrected:
            return torch.outer(basis.left_values, basis.right_values)
        squares = sums.tensors.get(f"squares/{name}")
        units = sums.count("vectors" if basis is None else "corrected")
        return squares / units if squares is not None and units > 0 else None

    def _solve(self, name: str, directions: torch.Tensor, sums: Sums, basis: Basis | None) -> torch.Tensor:
        values = self._eigenvalues(name, sums, basis)
        if values is None or not values.mean() > 0:  # No gradient of a unit is there that a direction could change.
            return torch.zeros_like(directions)
        values = values.to(directions)
        values = values + self.damping * values.mean()
        if basis is None:
            return directions / values
        basis = basis.to(directions)
        return rotate(basis, rotate(basis, directions) / values, back=True)


class EKFAC(KFAC):
    """EK-FAC's ``H^-1 u``: K-FAC's eigenbasis with eigenvalues measured in it. Arguments as of :class:`KFAC`."""

    name: ClassVar[str] = "ekfac"
    corrected: ClassVar[bool] = True


def sampled_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Labels drawn from the model's own distribution, int64 ``[B, S]``; masked where the batch's are.

    Args:
        model: looked at in evaluation mode.
        batch: on the model's device.
        generator: on the same; no other is drawn from.
    """
    check_vocabulary(model, batch, "influence")
    with no_trace(model), torch.no_grad():
        logits = model_logits(model, batch)[:, :-1]
    reshard(model)
    chances = torch.softmax(wide(logits), -1)
    # Any label will do where there is no telling: its gradient is not finite either, on which all ranks agree later.
    chances = torch.where(torch.isfinite(chances).all(-1, keepdim=True), chances, 1.0)
    drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(chances.shape[:2])
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, IGNORED, drawn)
    return labels


def _inner(model: nn.Module) -> nn.Module:
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner
