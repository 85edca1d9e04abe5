"""Influence by the name of an estimator: probes, a preconditioner and a scorer put together.

calculator = InfluenceCalculator(model, loader.probes, "ekfac")
calculator.fit(training_batches)          # estimators with a curvature: once in a while
calculator.refresh()                      # the probes' directions, at the model as it is now
scores = calculator.score(batch)          # SampleScores: [N, K], positive helps

dot         <g_i, v>, what one step of gradient descent on the sample does to the probe (TracIn, 2002.08484)
cosine      <g_i, v> / (|g_i| |v|)
adam        <g_i, v / sqrt(second moment)>, what one step of Adam does (LESS, 2402.04333, on the probe's side)
layer_scale <g_i, v / lambda_l>, one scale for each tensor
datainf     damped rank-one inverses averaged over samples (Kwon et al., 2310.00902)
kfac, ekfac Kronecker-factored curvature (Grosse et al., 2308.03296)
self        <g_i, g_i>: needs no probe; large for what the model has not learnt, wrong labels first
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.aggregation import By, GroupSums, source_of_units
from cheapertraining.influence.model_access import to_device
from cheapertraining.influence.parameters import Directions, Layers, select_parameters, zeros_like
from cheapertraining.influence.preconditioners import FITTED, Adam, Identity, Preconditioner, make_fitted
from cheapertraining.influence.probes import ProbeBank, ProbeLosses
from cheapertraining.influence.scorers import SampleScores
from cheapertraining.influence.scorers.forward import forward_scores
from cheapertraining.influence.scorers.hook import hook_scores
from cheapertraining.influence.sharding import Shards, sample_copies

__all__ = ["ESTIMATORS", "DataInfCalculator", "InfluenceCalculator", "make_preconditioner", "unit_length"]

Batch = Mapping[str, torch.Tensor]
Scorer = Literal["hook", "forward"]


ESTIMATORS = ("dot", "cosine", "adam", *FITTED, "self")
_SCORERS = ("hook", "forward")


def make_preconditioner(
    estimator: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> Preconditioner:
    """What the estimator does to directions; those in :data:`FITTED` are to be fitted yet.

    Raises:
        UserError: ``adam`` without an optimizer; an unknown estimator.
    """
    check_estimator(estimator)
    if estimator in FITTED:
        return make_fitted(estimator, parameters)
    if estimator != "adam":
        return Identity()
    if optimizer is None:
        raise UserError("estimator 'adam': expected the optimizer, found none. Pass it, or use 'dot'.")
    return Adam(parameters, optimizer)


def check_estimator(estimator: str) -> None:
    """Refuse a name that is none of :data:`ESTIMATORS`.

    Raises:
        UserError: with the nearest that is.
    """
    if estimator not in ESTIMATORS:
        raise UserError(
            f"estimator: expected one of {', '.join(ESTIMATORS)}, found '{estimator}'.{nearest(estimator, ESTIMATORS)}"
        )


def unit_length(directions: Directions, shards: Shards) -> Directions:
    """Directions divided by their lengths; one of zeros stays."""
    count = len(directions.names)
    lengths = [shards.norm({name: part[row] for name, part in directions.tensors.items()}) for row in range(count)]
    scale = [1.0 / length if length > 0 else 0.0 for length in lengths]
    return Directions(
        directions.names,
        {
            name: part * part.new_tensor(scale).view(-1, *[1] * (part.dim() - 1))
            for name, part in directions.tensors.items()
        },
    )


class InfluenceCalculator:
    """Scores samples, documents and sources against probes by one estimator.

    Methods are collective: with several ranks call them on all, each with its own batches. The model, its gradients
    and the random generators are left as they were.

    Args:
        model: wrapped or not.
        probes: a finite loader for each probe; none needed for ``self``.
        estimator: see the module.
        scorer: ``hook``, a backward pass without weight gradients, or ``forward``, one forward pass a direction and
            one more (not for ``cosine`` and ``self``, which need norms).
        layers: which parameters count, see :data:`~cheapertraining.influence.parameters.Layers`.
        by: what is scored: samples, or the documents packed in them.
        probe_samples: of each probe in a direction; the whole probe where it is smaller.
        probe_weights: of the probes' losses in the objective, see :class:`ProbeBank`.
        refresh_every: steps for which :meth:`refresh` keeps directions.
        optimizer: needed by ``adam``.

    Raises:
        UserError: an unknown estimator or scorer, bad probes, layers that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Mapping[str, DataLoader[Any]] | None = None,
        estimator: str = "ekfac",
        *,
        scorer: Scorer = "hook",
        layers: Layers = "all",
        by: By = "sample",
        probe_samples: int = 64,
        probe_weights: Mapping[str, float] | None = None,
        refresh_every: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        check_estimator(estimator)
        if scorer not in _SCORERS:
            raise UserError(f"scorer: expected one of {', '.join(_SCORERS)}, found '{scorer}'.")
        if scorer == "forward" and estimator in ("cosine", "self"):
            raise UserError(
                f"estimator '{estimator}' needs the norms of gradients, found scorer 'forward'. Use 'hook'."
            )
        self.model = model
        self.estimator = estimator
        self.scorer = scorer
        self.by: By = by
        self.parameters = select_parameters(model, layers)
        self.preconditioner = make_preconditioner(estimator, self.parameters, optimizer)
        self.bank = (
            None if estimator == "self" else ProbeBank(probes or {}, probe_weights, probe_samples, refresh_every)
        )
        self.probe_losses: dict[str, ProbeLosses] = {}
        """Of each probe at the last :meth:`refresh`."""
        # The probes' gradients, and what the preconditioner made of them.
        self._gradients: Directions | None = None
        self._directions: Directions | None = None
        self._restored: Mapping[str, Any] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of scores, ``[K]``: the probes, or ``("self",)``."""
        return ("self",) if self.bank is None else self.bank.names

    def fit(self, batches: Iterable[Batch]) -> None:
        """Fit the estimator's curvature on training batches; nothing to do for one without.

        Raises:
            UserError: no batch, only masked labels, gradients that are not finite.
        """
        if self.estimator in FITTED:
            device = next(iter(self.parameters.values())).device
            fitted: Any = self.preconditioner
            fitted.fit(self.model, [to_device(batch, device) for batch in batches])

    def refresh(self, step: int = 0, microbatch_size: int | None = None) -> Directions:
        """Make the probes' directions from the model as it is, and keep them for :meth:`score`.

        Args:
            step: of the training; directions younger than ``refresh_every`` steps are kept. It also says which samples
                of a probe are looked at, where it has more than ``probe_samples``.
            microbatch_size: samples in a pass.

        Returns:
            the preconditioned directions; for ``self`` there are none.

        Raises:
            UserError: see :meth:`ProbeBank.directions`; a curvature that is not fitted yet.
        """
        if self.bank is None:
            raise UserError("estimator 'self' scores each sample against itself: there are no directions to refresh.")
        found, self.probe_losses = self.bank.current(self.model, step, self.parameters, microbatch_size)
        restored, self._restored = self._restored, None
        if self._directions is None or found is not self._gradients:
            shards = Shards(self.model, self.parameters)
            if restored is not None and restored["made_at"] == self.bank.made_at:
                placed = {name: tensor.to(found.tensors[name].device) for name, tensor in restored["tensors"].items()}
                directions = Directions(found.names, {name: shards.scatter(name, t) for name, t in placed.items()})
            else:
                directions = self.preconditioner.apply(found)
                if self.estimator == "cosine":
                    directions = unit_length(directions, shards)
            self._gradients, self._directions = found, directions
        return self._directions

    def state_dict(self) -> dict[str, Any]:
        """What the next :meth:`refresh` of a resumed run goes on from: the probes' directions and, where a
        preconditioner has changed them, what it made of them. A collective call; tensors are whole and on the CPU.

        A curvature that was fitted is not in it: fit again, or save the preconditioner's own state.
        """
        if self.bank is None:
            return {"bank": None, "made": None}
        made = self._restored  # what was loaded and not yet used
        if self._directions is not None and self.bank.refresh_every > 1 and self.estimator != "dot":
            shards = Shards(self.model, self.parameters)
            tensors = {name: shards.gather(name, part).cpu() for name, part in self._directions.tensors.items()}
            made = {"made_at": self.bank.made_at, "tensors": tensors}
        return {"bank": self.bank.state_dict(), "made": made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        if self.bank is not None and state["bank"] is not None:
            self.bank.load_state_dict(state["bank"])
            self._restored = state["made"]
            self._gradients = self._directions = None

    def score(self, batch: Batch) -> SampleScores:
        """Scores of the batch's units, ``[N, K]``; positive helps.

        The unit of a score is that of the module's formula for the unit's *summed* loss: for ``dot``, the fall of the
        probe's token-mean loss for one unit of learning rate on it. ``cosine`` has none.

        Raises:
            UserError: before :meth:`refresh`; gradients that are not finite; tokens outside the vocabulary.
        """
        device = next(iter(self.parameters.values())).device
        placed = to_device(batch, device)
        if self.bank is None:
            nowhere = zeros_like(self.parameters, ())
            found = hook_scores(self.model, nowhere, placed, by=self.by, norms=True)
            assert found.squared_norms is not None
            return replace(found, scores=found.squared_norms[:, None])
        if self._directions is None:
            raise UserError("InfluenceCalculator.score: expected directions, found none yet. Call refresh() first.")
        if self.scorer == "forward":
            return forward_scores(self.model, self._directions, placed, by=self.by)
        cosine = self.estimator == "cosine"
        found = hook_scores(self.model, self._directions, placed, by=self.by, norms=cosine)
        if found.squared_norms is None:
            return found
        length = found.squared_norms.sqrt().clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        return replace(found, scores=found.scores / length)

    def score_sources(
        self, batches: Iterable[Batch], sources: Sequence[str]
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """Token-weighted mean score of each source and its standard error, over the batches of all ranks.

        Args:
            batches: with ``source`` int64 ``[B]``, an index into ``sources``.
            sources: names.

        Returns:
            ``{column: {source: (mean, error)}}``; NaN where a source did not come (the error also where it came with
            one unit).
        """
        sums = None
        for batch in batches:
            found = self.score(batch)
            if sums is None:
                sums = GroupSums(len(sources), len(self.columns), found.scores.device)
            sums.add(found.scores, found.tokens, source_of_units(batch, self.by).to(found.tokens.device))
        if sums is None:
            raise UserError("InfluenceCalculator.score_sources: expected at least one batch, found none.")
        means, errors = sums.means(over_ranks=True, copies=sample_copies(self.model))
        return {
            column: {name: (float(means[k, row]), float(errors[k, row])) for k, name in enumerate(sources)}
            for row, column in enumerate(self.columns)
        }


class DataInfCalculator(InfluenceCalculator):
    """:class:`InfluenceCalculator` with the estimator ``datainf``: every layer, the authors' rule for its damping.

    DataInf ranks almost as a plain dot product with one scale for each layer does (docs/influence.md): it is the cheap
    estimator, ``ekfac`` the good one.

    Args: those of :class:`InfluenceCalculator`, less ``estimator``.
    """

    def __init__(self, model: nn.Module, probes: Mapping[str, DataLoader[Any]], **options: Any) -> None:
        super().__init__(model, probes, "datainf", **options)
