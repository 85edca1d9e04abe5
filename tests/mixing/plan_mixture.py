"""A mixture for plain loops: the real plan of batches, without files. Made of what ``MixedDataset`` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.plan import MixturePlan
from cheapertraining.influence.scorers import SourceInfluence


@dataclass(frozen=True)
class Counts:
    samples: NDArray[np.int64]
    tokens: NDArray[np.int64]
    epochs: NDArray[np.float64]


class PlanMixture:
    """``sizes`` are the rows of each source; one shard each."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int = 10,
        seq_len: int = 4,
        lag: int = 8,
        max_epochs: Mapping[str, float | None] | None = None,
        on_exhaustion: str = "cycle",
        from_batches: Mapping[str, int] | None = None,
    ) -> None:
        self.max_epochs: dict[str, float | None] = {name: (max_epochs or {}).get(name) for name in sizes}
        self.plan = MixturePlan(
            {name: [size] for name, size in sizes.items()},
            dict.fromkeys(sizes, 1.0) if weights is None else weights,
            global_batch_size=batch_size,
            seed=0,
            max_epochs=self.max_epochs,
            on_exhaustion=on_exhaustion,
            from_batches=from_batches,
        )
        self.seq_len = seq_len
        self.lag = lag
        self.consumed = 0
        self.allow_source_changes = False

    @property
    def source_names(self) -> tuple[str, ...]:
        return self.plan.sources

    @property
    def global_batch_size(self) -> int:
        return self.plan.global_batch_size

    @property
    def available_tokens(self) -> dict[str, int]:
        return {name: int(size) * self.seq_len for name, size in zip(self.source_names, self.plan.sizes, strict=True)}

    def get_current_weights(self) -> dict[str, float]:
        return self.plan.newest_weights()

    def weights_at(self, batch: int) -> dict[str, float]:
        return self.plan.weights_at(batch)

    def set_weights(self, weights: Mapping[str, float], from_batch: int | None = None) -> int:
        start = self.consumed + self.lag if from_batch is None else from_batch
        self.plan.set_weights(start, weights)
        return start

    def counts(self) -> Counts:
        samples = self.plan.counts_before(self.consumed)
        return Counts(samples, samples * self.seq_len, samples / self.plan.sizes)

    def next_batch(self) -> NDArray[np.int64]:
        """The sources of the next batch's samples."""
        source = self.plan.plan(self.consumed).source
        self.consumed += 1
        return source


def measured(
    sources: tuple[str, ...],
    scores: NDArray[np.float64],
    errors: NDArray[np.float64],
    *,
    samples: int = 4,
    losses: NDArray[np.float64] | None = None,
    changes: NDArray[np.float64] | None = None,
) -> SourceInfluence:
    """A measurement of ``[K]`` or ``[P, K]`` scores."""
    scores, errors = np.atleast_2d(scores), np.atleast_2d(errors)
    count = len(scores)
    return SourceInfluence(
        sources=sources,
        directions=tuple(f"p{row}" for row in range(count)),
        scores=scores,
        errors=errors,
        samples=samples,
        probes=tuple(f"p{row}" for row in range(count)),
        probe_weights=np.full(count, 1 / count),
        probe_losses=np.full(count, 2.0) if losses is None else losses,
        probe_changes=np.full(count, np.nan) if changes is None else changes,
        seconds=0.0,
    )
