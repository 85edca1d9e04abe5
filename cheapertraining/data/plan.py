"""Which samples make up each global batch: integer arithmetic alone, no torch, no files.

A :class:`MixturePlan` is a pure function of (seed, shard sizes, caps, ledger): every rank, every worker count and every
resumed run computes the same batches. Weights are integers that sum to 2**32. Within a batch the samples of each
source come from systematic sampling: positions ``i * 2**32 + u`` for ``i < G`` against the cumulative weights times
``G``, so a source gets the floor or the ceiling of its exact share; ``u`` follows a Weyl sequence in the batch number
with an odd multiplier, a permutation of all 2**32 offsets, so long-run shares are exact. Each source has its own
endless shuffled order: passes over all its samples, each pass in blocks of whole shards, each block fully permuted.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cheapertraining.errors import UserError, nearest

__all__ = [
    "EXHAUSTION_POLICIES",
    "Exhausted",
    "MixturePlan",
    "PlannedBatch",
    "SourceOrder",
    "carried_over",
    "integer_weights",
]

Int64 = NDArray[np.int64]
_K = TypeVar("_K")
_V = TypeVar("_V")

WEIGHT_TOTAL = 1 << 32
EXHAUSTION_POLICIES = ("cycle", "stop", "renormalize")
_GOLDEN = 0x9E3779B1  # prime near 2**32 / golden ratio
_STATE_VERSION = 1
_BLOCK_BATCHES = 16  # batches that are counted, and whose slots are permuted, in one step
_FIRST_CHUNK, _CHUNK = 64, 4096  # batches counted in one vectorized step, at first and at most
# What a stream of random bits is for; part of its counter, so that no two uses share bits.
_FOR_SLOTS, _FOR_SHARDS, _FOR_BLOCK = 1, 2, 3


class Exhausted(Exception):
    """No further batch can be planned under the exhaustion policy and the caps. The message says which source ended."""


@dataclass(frozen=True)
class PlannedBatch:
    """The samples of one global batch, in slot order.

    Attributes:
        source: int64 ``[G]``, index of the source.
        sample: int64 ``[G]``, index of the sample within its source.
    """

    source: Int64
    sample: Int64


@dataclass
class _Segment:
    """Batches from ``start`` on that share integer weights; ``drawn`` counts what came before ``start``.

    ``counts`` overrides the apportionment for a single batch, the one in which a source runs out.
    ``memo`` is the batch that was counted last, with the samples drawn before it. ``searched`` is the same for the
    search for the first batch in which a source comes to its cap, and ``crossing`` that batch once it is found.
    ``block`` has the first of the batches that were counted together, and for each what was drawn before and in it.
    """

    start: int
    weights: Int64
    drawn: Int64
    counts: Int64 | None
    memo: tuple[int, Int64]
    searched: tuple[int, Int64]
    crossing: int | None = None
    block: tuple[int, Int64, Int64] = (0, np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64))


class MixturePlan:
    """Plans global batches from weighted sources.

    Args:
        shard_sizes: samples in each shard, by source name; the order of the names is the source index.
        weights: sampling weights by source name; any non-negative scale.
        global_batch_size: samples in a batch over all ranks, ``G``.
        seed: decides every order. Orders also depend on the source's *name*, not its index.
        on_exhaustion: ``cycle`` begins another pass; ``stop`` ends the plan when a source has been passed through;
            ``renormalize`` drops such a source and gives its weight to the others.
        max_epochs: caps on the passes over a source (fractions allowed), by name. At its cap a source is dropped
            and the others are renormalized (``stop``: the plan ends).
        from_batches: first batch that may have samples of a source, by name; the others are renormalized until then.
        shuffle_block_size: samples of a source that are shuffled together (whole shards, at least this many samples).

    Raises:
        UserError: empty source, bad weight, unknown name, bad policy.
    """

    def __init__(
        self,
        shard_sizes: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        *,
        global_batch_size: int,
        seed: int,
        on_exhaustion: str = "cycle",
        max_epochs: Mapping[str, float | None] | None = None,
        from_batches: Mapping[str, int] | None = None,
        shuffle_block_size: int = 1 << 16,
    ) -> None:
        if on_exhaustion not in EXHAUSTION_POLICIES:
            raise UserError(
                f"on_exhaustion: expected one of {', '.join(EXHAUSTION_POLICIES)}, found '{on_exhaustion}'."
                f"{nearest(on_exhaustion, EXHAUSTION_POLICIES)}"
            )
        if not 1 <= global_batch_size < 1 << 31:
            raise UserError(f"global_batch_size: expected a positive number, found {global_batch_size}.")
        self.sources = tuple(shard_sizes)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.on_exhaustion = on_exhaustion
        self.shuffle_block_size = shuffle_block_size
        self._orders = [SourceOrder(name, sizes, seed, shuffle_block_size) for name, sizes in shard_sizes.items()]
        self.sizes: Int64 = np.array([order.size for order in self._orders], np.int64)
        self._caps = self._sample_caps(max_epochs or {})
        self._appear = self._appearances(from_batches or {})
        self._slot_orders: OrderedDict[int, Int64] = OrderedDict()
        self._first = 0
        self._horizon = 0
        self._configured = integer_weights(weights, self.sources)
        self._ledger: list[tuple[int, Int64]] = [(0, self._configured)]
        self._segments: list[_Segment] = []
        self._begin(np.zeros(len(self.sources), np.int64))

    # -- weights ---------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> list[tuple[int, dict[str, float]]]:
        """Every weight change known to this plan, oldest first: ``(from_batch, weights)``."""
        return [(start, self._named(weights)) for start, weights in self._ledger]

    @property
    def horizon(self) -> int:
        """The first batch that has not been planned yet; weights can be changed from here on."""
        return self._horizon

    def set_weights(self, from_batch: int, weights: Mapping[str, float]) -> None:
        """Let ``weights`` count from ``from_batch`` on.

        Raises:
            UserError: bad weights, or a batch that was planned already or lies before an earlier change.
        """
        new = integer_weights(weights, self.sources)
        earliest = max(self._horizon, self._ledger[-1][0])
        if from_batch < earliest:
            raise UserError(
                f"set_weights: batch {from_batch} is too early; batches before {earliest} are planned already. "
                "Use a later batch, or raise train_loader.lag (it must cover num_workers * prefetch_factor)."
            )
        if self._ledger[-1][0] == from_batch:
            self._ledger.pop()
        self._ledger.append((from_batch, new))
        while len(self._segments) > 1 and self._segments[-1].start >= from_batch:
            self._segments.pop()
        if self._segments[-1].start >= from_batch:  # the very first segment is replaced
            self._begin(self._segments[-1].drawn)

    def weights_at(self, batch: int) -> dict[str, float]:
        """Weights that batch ``batch`` is drawn with: those of the ledger, less the sources that have run out."""
        return self._named(self._segment(batch).weights)

    def newest_weights(self) -> dict[str, float]:
        """Weights of the newest ledger entry, whether they are in force yet or not."""
        return self._named(self._ledger[-1][1])

    # -- batches ---------------------------------------------------------------------------------------------

    def plan(self, batch: int) -> PlannedBatch:
        """The samples of global batch ``batch``.

        Raises:
            Exhausted: the policy or the caps leave nothing to draw.
        """
        segment = self._segment(batch)
        drawn, counts = self._counts_at(segment, batch)
        samples = [
            order.take(start, count)
            for order, start, count in zip(self._orders, drawn.tolist(), counts.tolist(), strict=True)
            if count
        ]
        source = np.repeat(np.arange(len(self.sources)), counts)
        slots = self._slots(batch)
        self._horizon = max(self._horizon, batch + 1)
        return PlannedBatch(source[slots], np.concatenate(samples)[slots])

    def _slots(self, batch: int) -> Int64:
        """The permutation of slots of batch ``batch``: microbatches and rank slices are random mixtures.

        Made for a run of batches at a time, since most of the cost is the call.
        """
        number, within = divmod(batch, _BLOCK_BATCHES)
        if number not in self._slot_orders:
            size = self.global_batch_size
            bits = _random_bits(self.seed, 0, _FOR_SLOTS, number, 0, _BLOCK_BATCHES * size).reshape(
                _BLOCK_BATCHES, size
            )
            _remember(self._slot_orders, number, np.argsort(bits, axis=1, kind="stable"))
        slots: Int64 = self._slot_orders[number][within]
        return slots

    def release(self, batch: int) -> None:
        """Forget that batches from ``batch`` on were planned: whoever prefetched them has dropped them."""
        self._horizon = min(self._horizon, batch)

    def counts_before(self, batch: int) -> Int64:
        """int64 ``[K]``: samples of each source in all batches before ``batch``."""
        if batch <= self._first:
            return self._segments[0].drawn.copy()
        # The batch itself need not exist (the plan may end right before it), its predecessor must.
        drawn, counts = self._counts_at(self._segment(batch - 1), batch - 1)
        return drawn + counts

    def order(self, source: int) -> SourceOrder:
        """The endless order of one source."""
        return self._orders[source]

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self, batch: int) -> dict[str, Any]:
        """JSON-able state from which batch ``batch`` and all later ones can be planned again, bit for bit."""
        drawn = self.counts_before(batch)
        current = max(i for i, (start, _) in enumerate(self._ledger) if start <= max(batch, self._first))
        return {
            "version": _STATE_VERSION,
            "batch": batch,
            **self._identity(),
            "drawn": dict(zip(self.sources, drawn.tolist(), strict=True)),
            "ledger": [
                [start, dict(zip(self.sources, weights.tolist(), strict=True))]
                for start, weights in self._ledger[current:]
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow_source_changes: bool = False) -> None:
        """Continue where ``state`` was taken.

        Args:
            state: from :meth:`state_dict`.
            allow_source_changes: sources may have been added or retired since. Those that stay go on in their order
                where it was left; new ones start at its beginning; weights are :func:`carried_over`, with those that
                the plan was made with for the new ones.

        Raises:
            UserError: the state belongs to another plan; the message names what differs.
        """
        if state.get("version") != _STATE_VERSION:
            raise UserError(f"mixture state: expected version {_STATE_VERSION}, found {state.get('version')}.")
        self._check_identity(state, allow_source_changes)
        self._ledger = [(int(start), self._taken_over(weights)) for start, weights in state["ledger"]]
        self._first = self._horizon = int(state["batch"])
        self._begin(np.array([state["drawn"].get(name, 0) for name in self.sources], np.int64))

    def _taken_over(self, saved: Mapping[str, int]) -> Int64:
        """Integer weights of a saved ledger entry, for the sources of this plan."""
        if saved.keys() == set(self.sources):
            return np.array([saved[name] for name in self.sources], np.int64)
        return integer_weights(carried_over(saved, self._named(self._configured)), self.sources)

    def _identity(self) -> dict[str, Any]:
        return {
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "on_exhaustion": self.on_exhaustion,
            "shuffle_block_size": self.shuffle_block_size,
            "samples": dict(zip(self.sources, self.sizes.tolist(), strict=True)),
        }

    def _check_identity(self, state: Mapping[str, Any], allow_source_changes: bool) -> None:
        saved, here = state["samples"], self._identity()
        if saved.keys() != set(self.sources):
            sources = (
                f"mixture state: the checkpoint has the sources {', '.join(saved)}; the run has "
                f"{', '.join(self.sources)}."
            )
            if not allow_source_changes:
                raise UserError(
                    f"{sources} Resume with the same data.sources, set train_loader.allow_source_changes to true to go "
                    "on with these, or start a new run (another run_name)."
                )
            if not saved.keys() & set(self.sources):
                raise UserError(f"{sources} None is in both, so there is nothing to go on with. Start a new run.")
            here["samples"] = {name: size for name, size in here["samples"].items() if name in saved}
            saved = {name: size for name, size in saved.items() if name in self.sources}
        for key, mine in here.items():
            before = saved if key == "samples" else state[key]
            if before != mine:
                raise UserError(
                    f"mixture state: {key} was {before} when the checkpoint was saved and is {mine} now. "
                    "Resume with the old value, or start a new run (another run_name)."
                )

    # -- segments --------------------------------------------------------------------------------------------

    def _begin(self, drawn: Int64) -> None:
        """Make the first segment: weights of the ledger entry in force at the first batch."""
        self._segments = [self._new_segment(self._first, drawn)]

    def _new_segment(self, start: int, drawn: Int64, counts: Int64 | None = None) -> _Segment:
        weights = self._effective(self._requested(start), drawn, start)
        return _Segment(start, weights, drawn, counts, (start, drawn), (start, drawn))

    def _requested(self, batch: int) -> Int64:
        starts = [start for start, _ in self._ledger]
        return self._ledger[max(bisect_right(starts, batch) - 1, 0)][1]

    def _effective(self, requested: Int64, drawn: Int64, batch: int) -> Int64:
        """``requested`` without the sources at their cap or still to come, scaled up again to 2**32; ``stop``: nothing
        where one is at its cap."""
        left = np.where((drawn < self._caps) & (self._appear <= batch), requested, 0)
        if self.on_exhaustion == "stop" and ((drawn >= self._caps) & (requested > 0)).any():
            return np.zeros_like(requested)
        return left if left.sum() in (0, WEIGHT_TOTAL) else _apportion_total(left.astype(np.float64))

    def _segment(self, batch: int) -> _Segment:
        """The segment that batch ``batch`` belongs to, extending the list of segments as far as needed."""
        if batch < self._first:
            raise UserError(f"plan: batch {batch} lies before {self._first}, where this plan's state was taken.")
        while (following := self._next_segment(self._segments[-1], batch)) is not None:
            self._segments.append(following)
        found = bisect_right(self._segments, batch, key=lambda segment: segment.start) - 1
        segment = self._segments[found]
        if not segment.weights.any():
            raise Exhausted(self._exhausted_message(segment.start, segment.drawn))
        return segment

    def _next_segment(self, last: _Segment, batch: int) -> _Segment | None:
        """The segment after ``last`` if it starts at or before ``batch``."""
        if last.counts is not None:
            return self._new_segment(last.start + 1, last.drawn + last.counts) if last.start < batch else None
        changes = [*(start for start, _ in self._ledger), *self._appear.tolist()]
        change = min((start for start in changes if start > last.start), default=None)
        until = batch + 1 if change is None else min(change, batch + 1)
        if not last.weights.any():
            return None
        crossing = self._crossing(last, until)
        if crossing is not None:
            drawn, counts = self._counts_at(last, crossing)
            if (drawn + counts > self._caps).any():
                return self._crossing_segment(crossing, drawn, counts)
            # Used up to the last sample: gone from the next batch on, as in a plan that is resumed there.
            return self._new_segment(crossing + 1, drawn + counts) if crossing < batch else None
        if change is not None and change <= batch:
            return self._new_segment(change, self._drawn_in(last, change))
        return None

    def _crossing(self, segment: _Segment, until: int) -> int | None:
        """The first batch before ``until`` in which a source comes to its cap."""
        if not (self._caps < np.iinfo(np.int64).max).any():
            return None
        start, drawn = segment.searched
        while segment.crossing is None and start < until:
            stop = start + min(max(start - segment.start, _FIRST_CHUNK), _CHUNK)
            after = drawn + np.cumsum(self._apportion(segment.weights, np.arange(start, stop)), axis=0)
            reached = ((after >= self._caps) & (segment.weights > 0)).any(axis=1)
            if reached.any():
                segment.crossing = start + int(reached.argmax())
            start, drawn = segment.searched = stop, after[-1]
        return segment.crossing if segment.crossing is not None and segment.crossing < until else None

    def _crossing_segment(self, batch: int, drawn: Int64, counts: Int64) -> _Segment:
        """The batch in which a source runs out: what it lacks comes from the others, or the plan ends (``stop``)."""
        room = self._caps - drawn
        weights = self._effective(self._requested(batch), drawn, batch)
        taken = np.minimum(counts, room)
        while (lacking := self.global_batch_size - int(taken.sum())) and self.on_exhaustion != "stop":
            open_weights = np.where(taken < room, weights, 0)
            if not open_weights.any():
                break
            shares = _largest_remainder(open_weights.astype(np.float64), lacking)
            taken = np.minimum(taken + shares, room)
        if taken.sum() < self.global_batch_size:
            return _Segment(batch, np.zeros_like(weights), drawn, None, (batch, drawn), (batch, drawn))
        return _Segment(batch, weights, drawn, taken, (batch, drawn), (batch, drawn))

    def _counts_at(self, segment: _Segment, batch: int) -> tuple[Int64, Int64]:
        """Samples of each source before ``batch`` and in it."""
        if segment.counts is not None:
            return segment.drawn, segment.counts
        first, drawn, counts = segment.block
        if not first <= batch < first + len(counts):
            before = self._drawn_in(segment, batch)
            counts = self._apportion(segment.weights, np.arange(batch, batch + _BLOCK_BATCHES))
            drawn = before + np.cumsum(counts, axis=0) - counts
            first, segment.block = batch, (batch, drawn, counts)
        return drawn[batch - first], counts[batch - first]

    def _drawn_in(self, segment: _Segment, batch: int) -> Int64:
        """Samples of each source before ``batch``, which lies in ``segment`` or right behind it."""
        start, drawn = segment.memo if segment.memo[0] <= batch else (segment.start, segment.drawn)
        while start < batch:
            stop = min(start + _CHUNK, batch)
            drawn = drawn + self._apportion(segment.weights, np.arange(start, stop)).sum(axis=0)
            start = stop
        segment.memo = (batch, drawn)
        return drawn

    def _apportion(self, weights: Int64, batches: Int64) -> Int64:
        """int64 ``[batches, K]``: systematic sampling of ``G`` slots by integer weights (see the module's text)."""
        offset = (batches * _GOLDEN + self.seed) & (WEIGHT_TOTAL - 1)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(weights)]) * self.global_batch_size
        below = -((offset[:, None] - bounds[None, :]) >> 32)  # slots before each bound: ceil((bound - u) / 2**32)
        return np.diff(below, axis=1)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _sample_caps(self, max_epochs: Mapping[str, float | None]) -> Int64:
        """Samples of each source that may be drawn in all; the largest int64 where there is no cap."""
        default = math.inf if self.on_exhaustion == "cycle" else 1.0
        for name in max_epochs:
            if name not in self.sources:
                raise UserError(f"max_epochs: no source is named '{name}'.{nearest(name, self.sources)}")
        caps = []
        for name, size in zip(self.sources, self.sizes.tolist(), strict=True):
            epochs = max_epochs.get(name)
            epochs = default if epochs is None else epochs
            if not epochs > 0:
                raise UserError(f"max_epochs of source '{name}': expected a positive number, found {epochs}.")
            caps.append(np.iinfo(np.int64).max if math.isinf(epochs) else int(epochs * size))
        return np.array(caps, np.int64)

    def _appearances(self, from_batches: Mapping[str, int]) -> Int64:
        for name, batch in from_batches.items():
            if name not in self.sources:
                raise UserError(f"from_batch: no source is named '{name}'.{nearest(name, self.sources)}")
            if batch < 0:
                raise UserError(f"from_batch of source '{name}': expected at least 0, found {batch}.")
        return np.array([from_batches.get(name, 0) for name in self.sources], np.int64)

    def _named(self, weights: Int64) -> dict[str, float]:
        return dict(zip(self.sources, (weights / WEIGHT_TOTAL).tolist(), strict=True))

    def _exhausted_message(self, batch: int, drawn: Int64) -> str:
        requested = self._requested(batch)
        weights = self._effective(requested, drawn, batch)
        wanted = self._apportion(weights, np.array([batch]))[0] if weights.any() else np.zeros_like(drawn)
        ended = (requested > 0) & (drawn + wanted >= self._caps)
        names = ", ".join(name for name, used_up in zip(self.sources, ended, strict=True) if used_up)
        if not names:
            return f"no source with a weight has come by batch {batch}. Let one of them begin earlier (from_batch)."
        return (
            f"on_exhaustion '{self.on_exhaustion}': no further batch can be drawn; used up: {names}. "
            "Shorten max_duration, raise max_epochs, or set data.on_exhaustion to 'cycle'."
        )


class SourceOrder:
    """The endless shuffled order of one source's samples.

    Args:
        name: the source's name; part of the key of its randomness.
        shard_sizes: samples in each of its shards.
        seed: the plan's seed.
        block_size: see :class:`MixturePlan`.

    Raises:
        UserError: no samples.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int], seed: int, block_size: int) -> None:
        self.shard_sizes: Int64 = np.asarray(shard_sizes, np.int64)
        self.size = int(self.shard_sizes.sum())
        if self.size < 1:
            raise UserError(f"source '{name}': it has no samples. Remove it from data.sources or make its shards anew.")
        self._seed = seed
        self._key = int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")
        self._block_size = block_size
        self._shard_offsets = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._passes: OrderedDict[int, tuple[Int64, Int64, Int64]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Int64] = OrderedDict()
        self._span: tuple[int, int, Int64] = (0, 0, np.zeros(0, np.int64))

    def take(self, start: int, count: int) -> Int64:
        """int64 ``[count]``: the samples at positions ``start`` to ``start + count - 1`` of the endless order."""
        low, high, samples = self._span
        if low <= start and start + count <= high:
            return samples[start - low : start - low + count]
        parts = []
        while count:
            low, high, samples = self._span = self._block_at(start)
            parts.append(samples[start - low : start - low + count])
            start += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def upcoming_shards(self, start: int) -> list[int]:
        """The shards of the block at position ``start`` and of the block behind it."""
        low, high, _ = self._block_at(start)
        return self._shards_at(low) + self._shards_at(high)

    def _shards_at(self, position: int) -> list[int]:
        number, within = divmod(position, self.size)
        order, starts, block_first = self._pass(number)
        block = bisect_right(starts, within) - 1
        return [int(shard) for shard in order[block_first[block] : block_first[block + 1]]]

    def _block_at(self, position: int) -> tuple[int, int, Int64]:
        """First position, end position and samples of the block that holds ``position``."""
        number, within = divmod(position, self.size)
        order, starts, block_first = self._pass(number)
        block = bisect_right(starts, within) - 1
        samples = self._blocks.get((number, block))
        if samples is None:
            shards = order[block_first[block] : block_first[block + 1]]
            ranges = [np.arange(self._shard_offsets[s], self._shard_offsets[s] + self.shard_sizes[s]) for s in shards]
            ordered = np.concatenate(ranges)
            bits = _random_bits(self._seed, self._key, _FOR_BLOCK, number, block, len(ordered))
            samples = _remember(self._blocks, (number, block), ordered[np.argsort(bits, kind="stable")])
        low = number * self.size + int(starts[block])
        return low, low + len(samples), samples

    def _pass(self, number: int) -> tuple[Int64, Int64, Int64]:
        """Shards in the order of pass ``number``, the first position of each block, its first shard (and the end)."""
        layout = self._passes.get(number)
        if layout is None:
            bits = _random_bits(self._seed, self._key, _FOR_SHARDS, number, 0, len(self.shard_sizes))
            order = np.argsort(bits, kind="stable")
            order = order[self.shard_sizes[order] > 0]
            starts = np.cumsum(self.shard_sizes[order]) - self.shard_sizes[order]
            opens = np.flatnonzero(np.diff(starts // self._block_size, prepend=-1))
            layout = _remember(self._passes, number, (order, starts[opens], np.append(opens, len(order))))
        return layout


def integer_weights(weights: Mapping[str, float], sources: Sequence[str]) -> Int64:
    """Weights by name to int64 ``[K]`` that sum to 2**32 (largest remainder, ties to the first).

    A source that is not named gets nothing.

    Raises:
        UserError: a weight is negative or not finite, names no source, or all are zero.
    """
    for name, weight in weights.items():
        if name not in sources:
            raise UserError(
                f"weights: no source is named '{name}' (sources: {', '.join(sources)}).{nearest(name, sources)}"
            )
        if not (isinstance(weight, int | float | np.number) and math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"weight of source '{name}': expected a finite number that is not negative, found {weight}."
            )
    values = np.array([float(weights.get(name, 0.0)) for name in sources])
    if values.sum() <= 0:
        raise UserError(
            "weights: all are zero, so there is nothing to sample. Give at least one source a positive weight."
        )
    return _apportion_total(values)


def carried_over(old: Mapping[str, float], fresh: Mapping[str, float]) -> dict[str, float]:
    """Weights for sources of which some are new, from those of sources of which some are gone.

    New sources get their share of ``fresh``; those that stay divide the rest in proportion to ``old``, so that what the
    retired ones had is shared by all others. With the same sources, ``old`` as it is. Where those that stay had no
    weight, ``fresh``.

    Args:
        old: weights by source, non-negative.
        fresh: weights by source of the set that is wanted, non-negative, on any scale.

    Returns:
        Weights in the order of ``fresh``; they sum to 1, or to what ``old`` sums to where the sources are the same.
    """
    if old.keys() == fresh.keys():
        return {name: old[name] for name in fresh}
    total = math.fsum(fresh.values())
    stayed = math.fsum(old[name] for name in fresh if name in old)
    if stayed <= 0:
        return {name: weight / total for name, weight in fresh.items()}
    rest = math.fsum(weight for name, weight in fresh.items() if name in old) / total
    return {name: old[name] / stayed * rest if name in old else weight / total for name, weight in fresh.items()}


def _apportion_total(values: NDArray[np.float64]) -> Int64:
    """Integers in proportion to ``values`` that sum to 2**32; rounding is by largest remainder."""
    return _largest_remainder(values, WEIGHT_TOTAL)


def _largest_remainder(values: NDArray[np.float64], total: int) -> Int64:
    """Integers in proportion to ``values`` that sum to ``total``: floors, then one more for the largest remainders."""
    exact = values / values.sum() * total
    floors: Int64 = np.floor(exact).astype(np.int64)
    missing = total - int(floors.sum())
    for index in np.argsort(-(exact - floors), kind="stable")[:missing]:
        floors[index] += 1
    return floors


def _random_bits(seed: int, key: int, purpose: int, first: int, second: int, count: int) -> NDArray[np.uint64]:
    """uint64 ``[count]`` random bits, a pure function of the arguments.

    Philox's raw output is part of numpy's compatibility promise; that of Generator's methods is not, and a plan must
    not change with the version of numpy.
    """
    generator = np.random.Philox(
        key=np.array([seed & (2**64 - 1), key], np.uint64), counter=np.array([0, purpose, first, second], np.uint64)
    )
    return np.asarray(generator.random_raw(count), np.uint64)


def _remember(cache: OrderedDict[_K, _V], key: _K, value: _V, keep: int = 3) -> _V:
    cache[key] = value
    while len(cache) > keep:
        cache.popitem(last=False)
    return value
