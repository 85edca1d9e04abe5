"""A dataset of several sources whose sampling weights can change at any batch while training runs.

The plan (:mod:`cheapertraining.data.plan`) is computed in each rank's main process, inside the sampler; DataLoader
workers only read rows. A new weight therefore needs no message to a worker: it counts from a batch that no rank has
planned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cheapertraining.data.collate import Batch, collate
from cheapertraining.data.plan import Exhausted, MixturePlan, PlannedBatch
from cheapertraining.data.prefetch import ShardPrefetcher
from cheapertraining.data.rows import SampledRows
from cheapertraining.data.store import ShardStore
from cheapertraining.errors import UserError

__all__ = ["MixedDataset", "MixtureLoader", "MixtureSampler", "SourceCounts"]


@dataclass(frozen=True)
class SourceCounts:
    """What each source has given so far, in the order of the source names.

    Attributes:
        samples: int64 ``[K]``, rows.
        tokens: int64 ``[K]``, rows times ``seq_len``.
        epochs: float64 ``[K]``, passes over the source, with fractions.
    """

    samples: NDArray[np.int64]
    tokens: NDArray[np.int64]
    epochs: NDArray[np.float64]


class MixedDataset(Dataset[SampledRows]):
    """Sources in one shard store, drawn by a :class:`~cheapertraining.data.plan.MixturePlan`.

    Folder ``k`` of the store is the training split of source ``k``; the store may hold further folders behind them.

    Args:
        store: the shards.
        plan: its sources are those of the store's first folders, in the same order.
        lag: batches between a decision and its effect, where the caller names no batch. It must cover what a
            DataLoader prefetches (workers times prefetch factor), and is part of the run, not of the machine: with the
            same lag, any number of workers sees the same batches.
        max_epochs: caps by source name, as given to the plan; for those who decide on weights.
        allow_source_changes: a state of other sources is taken over as far as they are the same, see
            :meth:`~cheapertraining.data.plan.MixturePlan.load_state_dict`; otherwise it is refused.
    """

    def __init__(
        self,
        store: ShardStore,
        plan: MixturePlan,
        *,
        lag: int,
        max_epochs: Mapping[str, float | None] | None = None,
        allow_source_changes: bool = False,
    ) -> None:
        if lag < 1:
            raise UserError(f"train_loader.lag: expected at least 1 batch, found {lag}.")
        self.store = store
        self.plan = plan
        self.lag = lag
        self.consumed = 0
        """Global batches handed to the training loop so far."""
        self.exhausted: str | None = None
        """Why the loader ended, once it has: an exhaustion policy or the caps left nothing to draw."""
        self.max_epochs = {name: (max_epochs or {}).get(name) for name in plan.sources}
        self.allow_source_changes = allow_source_changes

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; a batch's ``source`` is an index into them."""
        return self.plan.sources

    @property
    def global_batch_size(self) -> int:
        """Samples in a batch over all ranks."""
        return self.plan.global_batch_size

    @property
    def seq_len(self) -> int:
        """Tokens in a sample."""
        return self.store.seq_len

    @property
    def available_tokens(self) -> dict[str, int]:
        """Tokens (padding included) in one pass over each source."""
        return {name: int(n) * self.seq_len for name, n in zip(self.source_names, self.plan.sizes, strict=True)}

    @property
    def ledger(self) -> list[tuple[int, dict[str, float]]]:
        """Weight changes of this process, and the one in force where it resumed: ``(from_batch, weights)``."""
        return self.plan.ledger

    def get_current_weights(self) -> dict[str, float]:
        """The newest sampling weights by source, whether their first batch has come yet or not."""
        return self.plan.newest_weights()

    def weights_at(self, batch: int) -> dict[str, float]:
        """The sampling weights that global batch ``batch`` is drawn with."""
        return self.plan.weights_at(batch)

    def set_weights(self, weights: Mapping[str, float], from_batch: int | None = None) -> int:
        """Change the sampling weights; sources that are not named get nothing.

        Args:
            weights: non-negative, any scale.
            from_batch: first global batch drawn with them; default ``lag`` batches from now.

        Returns:
            The first batch that is drawn with them.

        Raises:
            UserError: a weight is negative or not finite or names no source, or the batch was planned already.
        """
        start = self.consumed + self.lag if from_batch is None else from_batch
        self.plan.set_weights(start, weights)
        return start

    def update_weights_from_influence(self, weights: Mapping[str, float]) -> int:
        """:meth:`set_weights` under the name that loops of other packages call."""
        return self.set_weights(weights)

    def counts(self) -> SourceCounts:
        """Samples, tokens and epochs by source over the batches handed out so far (all ranks together)."""
        samples = self.plan.counts_before(self.consumed)
        return SourceCounts(samples, samples * self.seq_len, samples / self.plan.sizes)

    def draw(self, source: str, n: int, key: int) -> Batch:
        """``n`` training samples of a source that do not advance the training order (for estimates on the side).

        The same ``key`` draws the same samples. They are distinct while the source has that many.
        """
        index = self._index(source)
        size = int(self.plan.sizes[index])
        generator = np.random.Generator(
            np.random.Philox(key=np.array([self.plan.seed, key], np.uint64)).jumped(index + 1)
        )
        samples = generator.choice(size, n, replace=n > size)
        ids = self.store.ids(np.full(n, index), samples)
        return collate(self.__getitems__(ids))

    def state_dict(self, num_samples: int | None = None, from_beginning: bool = True) -> dict[str, Any]:
        """JSON-able state after the batches handed out so far; a few hundred bytes.

        Args:
            num_samples: samples trained on since the start over all ranks, where the trainer counts them itself.
            from_beginning: part of the signature that Composer calls; must be True.

        Raises:
            UserError: ``num_samples`` is no multiple of the global batch size.
        """
        if not from_beginning or (num_samples is not None and num_samples % self.global_batch_size):
            raise UserError(
                f"mixture state: {num_samples} samples are not a whole number of batches of {self.global_batch_size}."
            )
        batch = self.consumed if num_samples is None else num_samples // self.global_batch_size
        return self.plan.state_dict(batch) | {"lag": self.lag, "seq_len": self.seq_len}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the last batch that ``state`` counts.

        Raises:
            UserError: other sources, batch size, seed, lag or sequence length.
        """
        for key, mine in (("lag", self.lag), ("seq_len", self.seq_len)):
            if state.get(key) != mine:
                raise UserError(
                    f"mixture state: {key} was {state.get(key)} when the checkpoint was saved and is {mine} now. "
                    "Resume with the old value, or start a new run (another run_name)."
                )
        self.plan.load_state_dict(state, allow_source_changes=self.allow_source_changes)
        self.consumed = int(state["batch"])
        self.exhausted = None

    def __getitems__(self, ids: Sequence[int] | NDArray[np.int64]) -> SampledRows:
        """The rows with these ids (of the store), as one object; DataLoader passes it to ``collate``."""
        wanted = np.asarray(ids, np.int64)
        source, sample = self.store.locate(wanted)
        return SampledRows(self.store.read(wanted), source, sample)

    def __getitem__(self, row: int) -> SampledRows:
        return self.__getitems__([row])

    def _index(self, source: str) -> int:
        if source not in self.source_names:
            raise UserError(f"no source is named '{source}' (sources: {', '.join(self.source_names)}).")
        return self.source_names.index(source)


class MixtureSampler(DistributedSampler[int]):
    """Row ids of this rank's slice of each global batch, endlessly, from the first batch not handed out yet.

    A DistributedSampler because Composer requires one on several ranks; nothing of its own order is used. Rank ``r`` of
    ``world_size`` takes the contiguous slots ``[r * G / world_size, (r + 1) * G / world_size)``.

    Raises:
        UserError: the global batch size cannot be divided by the world size.
    """

    def __init__(self, dataset: MixedDataset, rank: int, world_size: int) -> None:
        size = dataset.global_batch_size
        if size % world_size:
            raise UserError(
                f"train_loader.global_batch_size: {size} cannot be divided by the world size {world_size}. "
                f"Use a multiple of {world_size}."
            )
        self.mixture = dataset
        self.rank = rank
        self.num_replicas = world_size
        self.epoch = 0
        self._prefetchers: weakref.WeakSet[ShardPrefetcher] = weakref.WeakSet()
        self._slots = slice(rank * size // world_size, (rank + 1) * size // world_size)

    def __iter__(self) -> Iterator[int]:
        for planned in self.batches():
            yield from self.mixture.store.ids(planned.source, planned.sample).tolist()

    def batches(self) -> Iterator[PlannedBatch]:
        """What the ids stand for: this rank's slots of each batch, ``[G / world_size]``."""
        mixture = self.mixture
        mixture.plan.release(mixture.consumed)
        prefetcher = ShardPrefetcher(mixture.store, mixture.plan) if mixture.store.has_remote else None
        if prefetcher is not None:
            self._prefetchers.add(prefetcher)
        batch = mixture.consumed
        try:
            while True:
                if prefetcher is not None:
                    prefetcher.advance(batch)
                try:
                    planned = mixture.plan.plan(batch)
                except Exhausted as end:
                    mixture.exhausted = str(end)
                    return
                batch += 1
                yield PlannedBatch(planned.source[self._slots], planned.sample[self._slots])
        finally:
            if prefetcher is not None:
                prefetcher.close()

    def close(self) -> None:
        """Let no shard be downloaded ahead any more."""
        for prefetcher in list(self._prefetchers):
            prefetcher.close()

    def __len__(self) -> int:
        raise TypeError("a mixture has no length: it ends by max_duration or by its exhaustion policy")


class MixtureLoader(DataLoader[SampledRows]):
    """The DataLoader of a mixture; made by :func:`cheapertraining.data.get_loader`.

    Attributes:
        mixture: the :class:`MixedDataset`; change weights and save state there.
        probes: loaders of the probe splits, by probe name.
        heldout: loaders of the held-out splits, by source name.
    """

    mixture: MixedDataset
    probes: dict[str, DataLoader[SampledRows]]
    heldout: dict[str, DataLoader[SampledRows]]
    _workers: weakref.ReferenceType[Any] | None = None
    """The newest of torch's iterators, which owns worker processes and threads."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch types what it yields as the dataset's items
        # Without workers a DataLoader only gathers ids one by one, at the cost of reading them.
        plain = self.num_workers == 0 and not self.pin_memory
        batches = self._read_here() if plain else super().__iter__()
        if not plain:
            self._workers = weakref.ref(batches)
        for batch in batches:
            self.mixture.consumed += 1
            yield batch

    def close(self) -> None:
        """End the worker processes and threads that read ahead; iterators made before give no more batches.

        Dropping the last reference to an iterator does the same, but a traceback or a cycle may hold one until the
        interpreter ends, when the thread that pins memory must no longer live, see
        :class:`~cheapertraining.data.prefetch.ShardPrefetcher`.
        """
        cast(MixtureSampler, self.sampler).close()
        batches = self._workers() if self._workers is not None else None
        if self.num_workers and batches is not None:
            batches._shutdown_workers()
        self._workers = None
        self._iterator = None

    def _read_here(self) -> Iterator[Batch]:
        store, collate_rows = self.mixture.store, cast(Callable[[SampledRows], Batch], self.collate_fn)
        for planned in cast(MixtureSampler, self.sampler).batches():
            rows = store.read(store.ids(planned.source, planned.sample))
            yield collate_rows(SampledRows(rows, planned.source, planned.sample))

    def __len__(self) -> int:
        raise TypeError("a mixture has no length: it ends by max_duration or by its exhaustion policy")
