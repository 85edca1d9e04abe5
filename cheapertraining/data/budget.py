"""What a mixture gives each source for a number of tokens, from ``meta.json`` and ``index.json`` alone."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.loader import shard_folders
from cheapertraining.data.plan import Exhausted, MixturePlan
from cheapertraining.data.shard_files import read_index
from cheapertraining.data.shards import INDEX_FILE, META_FILE, ShardMeta, check_compatible, read_meta
from cheapertraining.data.store import ShardFolder, missing_shards
from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from cheapertraining.config import DataConfig

__all__ = ["MAX_USEFUL_EPOCHS", "MIN_PROBE_ROWS", "MixtureBudget", "SourceBudget", "SplitSize", "mixture_budget"]

Int64 = NDArray[np.int64]

MAX_USEFUL_EPOCHS = 4.0
"""Up to about so many passes, repeated data is nearly worth new data (Muennighoff et al. 2023, arXiv 2305.16264)."""
MIN_PROBE_ROWS = 64
_STEPS = 256  # the plan is followed in so many steps at least


@dataclass(frozen=True)
class SplitSize:
    """Rows, documents, and tokens without padding of a probe or a held-out split."""

    rows: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceBudget:
    """What one source gives.

    Attributes:
        weight: share of the samples that is asked for.
        rows, tokens: in one pass over it; ``tokens`` without padding.
        padding_share: of its rows.
        max_epochs: its cap, that of the exhaustion policy included; None: no cap.
        drawn_rows, drawn_tokens: over the whole budget.
        share: of all ``drawn_tokens``.
        epochs: passes over it, with fractions.
        first_pass_ends: tokens of the whole mixture by which every row has been seen; None: not in this budget.
        runs_out: tokens of the whole mixture at which it reaches its cap; None: it does not.
        heldout: its held-out split; None: it has none.
    """

    weight: float
    rows: int
    tokens: int
    padding_share: float
    max_epochs: float | None
    drawn_rows: int
    drawn_tokens: int
    share: float
    epochs: float
    first_pass_ends: int | None
    runs_out: int | None
    heldout: SplitSize | None


@dataclass(frozen=True)
class MixtureBudget:
    """What a mixture gives for a number of tokens, by source and probe name.

    ``tokens`` is what was asked for and ``drawn_tokens`` what there will be (whole batches; less where the plan ends
    before, for the reason in ``ends_early``). Tokens are counted without padding, as the trainer counts its duration.
    """

    tokens: int
    drawn_tokens: int
    batches: int
    global_batch_size: int
    seq_len: int
    on_exhaustion: str
    ends_early: str | None
    sources: dict[str, SourceBudget]
    probes: dict[str, SplitSize]
    warnings: list[str]


def mixture_budget(
    data: DataConfig, tokens: int, *, weights: Mapping[str, float] | None = None, global_batch_size: int = 512
) -> MixtureBudget:
    """Follow the plan of a data config through ``tokens`` tokens with weights that stay as they are.

    The rows are those that :class:`~cheapertraining.data.plan.MixturePlan` would draw, to the last one. How many tokens
    a row has is taken to be its source's mean. Of remote shards only the index and ``meta.json`` are downloaded.

    Args:
        data: sources, probes, caps and exhaustion policy.
        tokens: the budget, without padding.
        weights: by source in place of the config's; sources that are not named get nothing.
        global_batch_size: rows in a batch over all ranks.

    Raises:
        UserError: missing or foreign shards of a source, bad weights, or a budget below 1.
    """
    if tokens < 1:
        raise UserError(f"tokens: expected a positive number, found {tokens}.")
    train, probes, heldout = shard_folders(data)
    metas = {name: _fetch_meta(folder, data) for name, folder in train.items()}
    plan = MixturePlan(
        {name: [entry.samples for entry in read_index(folder.local)] for name, folder in train.items()},
        {name: source.weight for name, source in data.sources.items()} if weights is None else weights,
        global_batch_size=global_batch_size,
        seed=0,
        on_exhaustion=data.on_exhaustion,
        max_epochs={name: source.max_epochs for name, source in data.sources.items()},
        from_batches={name: source.from_batch for name, source in data.sources.items()},
        shuffle_block_size=data.shuffle_block_size,
    )
    warnings: list[str] = []
    sizes = {name: _split_size(folder, data, f"held-out of '{name}'", warnings) for name, folder in heldout.items()}
    targets = {name: _split_size(folder, data, f"probe '{name}'", warnings) for name, folder in probes.items()}
    walk = _Walk(plan, np.array([meta.tokens / meta.samples for meta in metas.values()]), _max_epochs(data))
    walk.go(tokens)
    total = walk.tokens_of(walk.drawn)
    budget = MixtureBudget(
        tokens=tokens,
        drawn_tokens=round(total),
        batches=walk.batch,
        global_batch_size=global_batch_size,
        seq_len=data.seq_len,
        on_exhaustion=data.on_exhaustion,
        ends_early=walk.ended,
        sources={
            name: _source_budget(k, meta, walk, sizes.get(name), total) for k, (name, meta) in enumerate(metas.items())
        },
        probes={name: size for name, size in targets.items() if size is not None},
        warnings=warnings,
    )
    warnings.extend(_warnings(budget, metas))
    return budget


class _Walk:
    """Follows a plan in steps, and finds the batch in which something becomes so.

    Attributes:
        batch: batches so far.
        drawn: int64 ``[K]``, rows of each source in them.
        ended: why the plan ended before the budget did.
        first_pass, run_out: tokens by source index at which a pass was complete, or the cap was reached.
    """

    def __init__(self, plan: MixturePlan, tokens_per_row: NDArray[np.float64], max_epochs: NDArray[np.float64]) -> None:
        self.plan = plan
        self.tokens_per_row = tokens_per_row
        self.max_epochs = max_epochs
        self.caps = np.floor(max_epochs * plan.sizes)
        self.batch = 0
        self.drawn: Int64 = np.zeros(len(plan.sources), np.int64)
        self.ended: str | None = None
        self.first_pass: dict[int, int] = {}
        self.run_out: dict[int, int] = {}

    def tokens_of(self, drawn: Int64) -> float:
        return float(drawn @ self.tokens_per_row)

    def go(self, tokens: int) -> None:
        """Draw batches until they have ``tokens`` tokens, or the plan ends."""
        batches = tokens / (self.plan.global_batch_size * self.tokens_per_row.max())
        step = math.ceil(batches / _STEPS)
        while self.ended is None and self.tokens_of(self.drawn) < tokens:
            start, drawn = self.batch, self.drawn
            # Continued from its state, the plan need not count from the very beginning.
            self.plan.load_state_dict(self.plan.state_dict(start))
            end = self._last_batch(start + step)
            if self.tokens_of(self.plan.counts_before(end)) >= tokens:
                end = self._first(start, end, lambda counts: self.tokens_of(counts) >= tokens)
                self.ended = None
            self._note(start, end, self.first_pass, self.plan.sizes.astype(np.float64), drawn)
            self._note(start, end, self.run_out, self.caps, drawn)
            self.batch, self.drawn = end, self.plan.counts_before(end)

    def _last_batch(self, end: int) -> int:
        """``end``, or the end of the plan where that comes first."""
        if self._exists(end):
            return end
        return self.batch + bisect_left(range(self.batch + 1, end), True, key=lambda batch: not self._exists(batch))

    def _exists(self, end: int) -> bool:
        """Whether all batches before ``end`` can be planned."""
        try:
            self.plan.counts_before(end)
        except Exhausted as error:
            self.ended = str(error)
            return False
        return True

    def _first(self, start: int, end: int, reached: Callable[[Int64], bool]) -> int:
        """The first number of batches, above ``start`` and up to ``end``, whose counts have reached something."""
        return start + 1 + bisect_left(range(start + 1, end), True, key=lambda n: reached(self.plan.counts_before(n)))

    def _note(self, start: int, end: int, tokens: dict[int, int], wanted: NDArray[np.float64], drawn: Int64) -> None:
        """For each source that comes to have the ``wanted`` rows between two batches, the tokens by then."""
        after = self.plan.counts_before(end)
        for k in np.flatnonzero((drawn < wanted) & (after >= wanted)).tolist():
            batch = self._first(start, end, lambda counts, k=k: bool(counts[k] >= wanted[k]))  # type: ignore[misc]
            tokens[k] = round(self.tokens_of(self.plan.counts_before(batch)))


def _fetch_meta(folder: ShardFolder, data: DataConfig) -> ShardMeta:
    """The meta of a folder, its index being there too afterwards."""
    if folder.remote is not None:
        from cheapertraining.data.stream import download_beside  # what a run then finds in its cache

        download_beside(folder.name, folder.remote, folder.local, (META_FILE, INDEX_FILE), data.download_retry)
    if not (folder.local / INDEX_FILE).is_file():
        raise missing_shards(folder, data.prepare_hint)
    meta = read_meta(folder.local)
    check_compatible(folder.local, meta, seq_len=data.seq_len, tokenizer=None)
    return meta


def _split_size(folder: ShardFolder, data: DataConfig, what: str, warnings: list[str]) -> SplitSize | None:
    try:
        meta = _fetch_meta(folder, data)
    except UserError as error:
        warnings.append(f"{what}: {error}")
        return None
    return SplitSize(meta.samples, meta.documents, meta.tokens)


def _max_epochs(data: DataConfig) -> NDArray[np.float64]:
    """The cap of each source; infinity where there is none. As the plan has them."""
    default = math.inf if data.on_exhaustion == "cycle" else 1.0
    return np.array([source.max_epochs or default for source in data.sources.values()])


def _source_budget(k: int, meta: ShardMeta, walk: _Walk, heldout: SplitSize | None, total: float) -> SourceBudget:
    tokens = float(walk.drawn[k] * walk.tokens_per_row[k])
    cap = float(walk.max_epochs[k])
    name = walk.plan.sources[k]
    return SourceBudget(
        weight=walk.plan.newest_weights()[name],
        rows=meta.samples,
        tokens=meta.tokens,
        padding_share=meta.padding / (meta.samples * meta.seq_len),
        max_epochs=None if math.isinf(cap) else cap,
        drawn_rows=int(walk.drawn[k]),
        drawn_tokens=round(tokens),
        share=tokens / max(total, 1.0),
        epochs=float(walk.drawn[k] / walk.plan.sizes[k]),
        first_pass_ends=walk.first_pass.get(k),
        runs_out=walk.run_out.get(k),
        heldout=heldout,
    )


def _warnings(budget: MixtureBudget, metas: Mapping[str, ShardMeta]) -> list[str]:
    found = []
    if budget.ends_early is not None:
        found.append(f"ends after {budget.drawn_tokens:,} of {budget.tokens:,} tokens: {budget.ends_early}")
    tokenizers: dict[str, Any] = {}
    for name, meta in metas.items():
        tokenizers.setdefault(meta.tokenizer_fingerprint, []).append(name)
    if len(tokenizers) > 1:
        groups = "; ".join(", ".join(names) for names in tokenizers.values())
        found.append(f"sources made with different tokenizers, which a run refuses: {groups}.")
    repeated = {name: source.epochs for name, source in budget.sources.items() if source.epochs > MAX_USEFUL_EPOCHS}
    if repeated:
        found.append(
            f"more than {MAX_USEFUL_EPOCHS:.0f} epochs of {_list(repeated, '{} ({:.1f})')}: from there on, repeated "
            "data is worth much less than new data (arXiv 2305.16264). Lower the weight, or set max_epochs."
        )
    used_up = {name: source.runs_out for name, source in budget.sources.items() if source.runs_out is not None}
    if used_up and budget.ends_early is None:
        found.append(f"used up: {_list(used_up, '{} (after {:,} tokens)')}. The others get its weight from there on.")
    unseen = {name: 0 for name, source in budget.sources.items() if source.heldout is None}
    if unseen:
        found.append(f"no held-out split of {_list(unseen, '{}')}: the loss on it is not evaluated.")
    for name, probe in budget.probes.items():
        if probe.rows < MIN_PROBE_ROWS:
            found.append(
                f"probe '{name}': {probe.rows} rows; with less than {MIN_PROBE_ROWS} what steers the mixture is noise."
            )
    return found


def _list(numbers: Mapping[str, float], form: str) -> str:
    return ", ".join(form.format(name, number) for name, number in numbers.items())
