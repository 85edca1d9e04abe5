"""Weights from a table of small runs, fitted when the run starts and held: a mixing law, or RegMix's trees.

*Law* (``mixing_law``): log-linear in the weights (Data Mixing Laws, arXiv 2403.16952), its optimum with a price on the
distance from the prior and caps on repetition (Olmix, arXiv 2602.12237). *Trees* (``regmix``): boosted trees, the mean
of the best of many simulated mixtures (RegMix, arXiv 2407.01492). Both are the code of ``tools/fit_mixing_law.py``,
which also says how far to believe the fit: look at its report before training on this.

The prior is the run's own mixture; caps are those of the run's length and its sources' sizes. Cost: none in the run;
the runs of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from cheapertraining.errors import UserError, nearest
from cheapertraining.mixing.offline.optimum import mixture_bounds
from cheapertraining.mixing.offline.proposal import (
    ProposedMixture,
    propose_by_laws,
    propose_by_trees,
    weighted_targets,
)
from cheapertraining.mixing.offline.table import RunTable
from cheapertraining.mixing.signals import Array, Signals, SourceInfo
from cheapertraining.mixing.strategies.base import Stateless

__all__ = ["MixingLawStrategy", "RegMixStrategy"]


class _Fitted(Stateless):
    """Weights that are found at :meth:`reset`."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        table: RunTable,
        targets: Mapping[str, float] | None,
        max_epochs: float | None,
        fit: Callable[..., ProposedMixture],
    ) -> None:
        if max_epochs is not None and not max_epochs > 0:
            raise UserError(f"{self._key}.max_epochs: expected a positive number, found {max_epochs}.")
        try:
            self.table, self.target_weights = weighted_targets(table, targets)
            self.table.check_identified()
        except UserError as error:
            raise UserError(f"{self._key}: {error}") from error
        self.max_epochs = max_epochs
        self._fit = fit
        self._weights: Array | None = None

    @property
    def _key(self) -> str:
        return f"algorithms.online_mixing.{self.name}"

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        names = [source.name for source in sources]
        for name in self.table.sources:
            if name not in names:
                raise UserError(
                    f"{self._key}.table: no source of the run is named '{name}' ({', '.join(names)})."
                    f"{nearest(name, names)}"
                )
        if missing := [name for name in names if name not in self.table.sources]:
            raise UserError(
                f"{self._key}.table: has no column of source '{missing[0]}', so its effect is not known. Add runs that "
                "vary it, or leave it out of data.sources."
            )
        order = [names.index(name) for name in self.table.sources]
        bounds = self._bounds([sources[k] for k in order], horizon_tokens)
        found = self._fit(self.table, prior[order], bounds, target_weights=self.target_weights)
        self._weights = np.zeros(len(names))
        self._weights[order] = found.weights

    def _bounds(self, sources: Sequence[SourceInfo], horizon_tokens: int) -> tuple[Array, Array]:
        """Caps of the run's length, of the strategy's and of the sources' own limits, the lower of the two."""
        names, limit = [source.name for source in sources], math.inf if self.max_epochs is None else self.max_epochs
        allowed = {source.name: min(limit * source.available_tokens, source.allowed_tokens) for source in sources}
        capped = {name: tokens for name, tokens in allowed.items() if math.isfinite(tokens)}
        if not capped or horizon_tokens <= 0:
            return mixture_bounds(names)
        return mixture_bounds(names, available=capped, max_epochs=1.0, tokens=horizon_tokens)

    def propose(self, signals: Signals) -> Array | None:
        return self._weights


class MixingLawStrategy(_Fitted):
    """Holds the optimum of a mixing law.

    Args:
        table: of finished runs over the same sources.
        targets: weights of the table's targets by name; None: all, equally.
        kl: price of a nat from the prior, in loss.
        max_epochs: passes over a source at most; None: only the sources' own limits.

    Raises:
        UserError: a table that cannot be fitted, an unknown target; at ``reset``, other sources or caps that leave no
            mixture.
    """

    name: ClassVar[str] = "mixing_law"

    def __init__(
        self,
        table: RunTable,
        targets: Mapping[str, float] | None = None,
        kl: float = 0.1,
        max_epochs: float | None = 4.0,
    ) -> None:
        if not kl >= 0:
            raise UserError(f"{self._key}.kl: expected at least 0, found {kl}.")
        super().__init__(table, targets, max_epochs, partial(propose_by_laws, kl=kl))


class RegMixStrategy(_Fitted):
    """Holds the mean of the mixtures that boosted trees call best. Arguments and errors as of the law's.

    Args:
        seed: of the trees and of the mixtures drawn.
    """

    name: ClassVar[str] = "regmix"

    def __init__(
        self,
        table: RunTable,
        targets: Mapping[str, float] | None = None,
        max_epochs: float | None = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(table, targets, max_epochs, partial(propose_by_trees, seed=seed))
