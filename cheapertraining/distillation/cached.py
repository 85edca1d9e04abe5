"""Teachers from a cache: their targets come with the batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from cheapertraining.data.mixing import MixedDataset
from cheapertraining.distillation.cache import CacheMeta, open_cache
from cheapertraining.distillation.targets import SampledTargets, TopKTargets
from cheapertraining.errors import UserError
from cheapertraining.influence.store import check_same

__all__ = ["TARGETS_KEY", "CachedTeacher"]

TARGETS_KEY = "teacher"
"""Of the records in a batch, uint8 ``[B, L]``: they stay packed until the loss."""
_SHARED = ("teacher", "kind", "size", "temperature", "vocab_size", "dtype")


class CachedTeacher:
    """What ``tools/cache_teacher.py`` wrote, read beside the tokens from now on.

    Records are found by source and sample id, whatever the mixture, the order, the number of ranks and workers; a batch
    carries them packed under :data:`TARGETS_KEY`.

    Args:
        cache: the folder given to the tool.
        mixture: whose sources are trained on.
        sources: those that are distilled; default all. Rows of others have no targets.
        teacher: fingerprint that the cache must have been made with; None: any.

    Raises:
        UserError: missing, truncated, of other shards, another tokenizer or teacher; or caches that differ by source.
    """

    def __init__(
        self,
        cache: Path,
        mixture: MixedDataset,
        *,
        sources: Collection[str] | None = None,
        teacher: str | None = None,
    ) -> None:
        wanted = mixture.source_names if sources is None else tuple(sources)
        store, sidecars = mixture.store, {}
        metas: list[CacheMeta] = []
        for number, name in enumerate(mixture.source_names):
            if name not in wanted:
                continue
            expected = {} if teacher is None else {"teacher": teacher}
            meta, sidecars[number] = open_cache(cache, store.folders[number].local, store.metas[number], expected)
            first = {key: getattr(metas[0] if metas else meta, key) for key in _SHARED}
            remedy = "Write all sources of a cache with one teacher and one kind of targets."
            check_same(cache / name, {key: getattr(meta, key) for key in _SHARED}, first, remedy)
            metas.append(meta)
        if not metas:
            raise UserError(f"distillation.cache: {cache}: expected at least one source to distil, found none.")
        self.meta = metas[0]
        self.layout = self.meta.layout
        self.distilled = torch.tensor([number in sidecars for number in range(len(mixture.source_names))])
        self._partial = len(sidecars) < len(mixture.source_names)
        store.attach(TARGETS_KEY, sidecars)

    @property
    def vocabulary(self) -> int:
        """Tokens that the teacher gives logits for."""
        return self.meta.vocab_size

    @property
    def temperature(self) -> float:
        """That the targets are stored at."""
        return self.meta.temperature

    def __call__(self, batch: Mapping[str, Any]) -> SampledTargets | TopKTargets:
        """The targets of a batch, unpacked on its device.

        Raises:
            UserError: the batch has none.
        """
        records = batch.get(TARGETS_KEY)
        if records is None:
            records = torch.zeros(len(batch["input_ids"]), self.layout.seq_len, dtype=torch.uint8)
            if not self._partial:
                raise UserError(
                    f"distillation: expected a teacher's targets in the batch ('{TARGETS_KEY}'), found none."
                )
            records = records.to(batch["input_ids"].device)
        if self.layout.kind == "top_k":
            top = self.layout.unpack_top(records)
            even = -math.log(self.layout.size + 1)
            log_probs, tail = (self._elsewhere(logs, even, batch) for logs in (top.log_probs, top.log_tail))
            return TopKTargets(top.ids, log_probs, tail, self.temperature)
        found = self.layout.unpack_sampled(records)
        even = 1 / found.counts.shape[-1]
        return SampledTargets(
            found.ids, self._elsewhere(found.counts / self.layout.size, even, batch), self.temperature
        )

    def _elsewhere(self, values: torch.Tensor, even: float, batch: Mapping[str, Any]) -> torch.Tensor:
        """``values``, but ``even`` in rows of sources that are not distilled: any valid targets, of weight 0."""
        if not self._partial:
            return values
        other = ~self.distilled.to(values.device)[batch["source"]]
        return torch.where(other.view(-1, *[1] * (values.ndim - 1)), even, values)
