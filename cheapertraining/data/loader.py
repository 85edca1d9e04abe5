"""From a data config to the loaders of a run: the training mixture, the probes, the held-out splits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from cheapertraining.data.collate import Batch, collate
from cheapertraining.data.mixing import MixedDataset, MixtureLoader, MixtureSampler
from cheapertraining.data.plan import MixturePlan
from cheapertraining.data.rows import SampledRows
from cheapertraining.data.store import ShardFolder, ShardStore
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cheapertraining.config import DataConfig

__all__ = ["SplitDataset", "get_loader", "rank_and_world", "shard_folders"]


class SplitDataset(Dataset[SampledRows]):
    """One finite split of a shard store, such as a probe; ``source`` is -1 where it is no training source."""

    def __init__(self, store: ShardStore, folder: int, source: int) -> None:
        self.store = store
        self.folder = folder
        self.source = source

    def __len__(self) -> int:
        return self.store.samples(self.folder)

    def __getitems__(self, samples: Sequence[int] | NDArray[np.int64]) -> SampledRows:
        """Rows by index within the split, as one object; DataLoader passes it to ``collate``."""
        index = np.asarray(samples, np.int64)
        ids = self.store.ids(np.full(len(index), self.folder), index)
        return SampledRows(self.store.read(ids), np.full(len(index), self.source), index)

    def __getitem__(self, sample: int) -> SampledRows:
        return self.__getitems__([sample])

    def batch(self, samples: Sequence[int]) -> Batch:
        """The batch of these samples, see :func:`~cheapertraining.data.collate.collate`."""
        return collate(self.__getitems__(samples))


def get_loader(
    config: str | Path | Mapping[str, Any] | DataConfig,
    tokenizer: TokenizerWrapper | PreTrainedTokenizerFast | str | None = None,
    batch_size: int = 32,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    num_workers: int = 0,
    prefetch_factor: int = 4,
    persistent_workers: bool = False,
    lag: int = 8,
    seed: int = 0,
    pin_memory: bool = False,
    allow_source_changes: bool = False,
    overrides: Sequence[str] = (),
) -> MixtureLoader:
    """Make the loader of a mixture, with ``.mixture``, ``.probes`` and ``.heldout`` beside it.

    Args:
        config: name of a data config (``"mixed_pretrain"``), path of one, a mapping, or a ready DataConfig.
        tokenizer: what the shards must have been made with; default the config's.
        batch_size: *global* batch size, over all ranks.
        rank, world_size: of data parallelism; default those of ``torch.distributed`` or of the launcher's environment.
        num_workers, prefetch_factor, persistent_workers, pin_memory: as for ``torch.utils.data.DataLoader``.
        lag: batches from a weight change to its first batch; at least ``num_workers * prefetch_factor``.
        seed: decides the order of samples.
        allow_source_changes: the mixture takes over a state of other sources as far as they are the same.
        overrides: ``key=value`` on top of a config given by name or path.

    Returns:
        A DataLoader that never ends (unless the exhaustion policy says so) and yields the batches that
        :func:`~cheapertraining.data.collate.collate` describes, ``batch_size / world_size`` rows each.

    Raises:
        UserError: bad config, missing or foreign shards, overlapping probe and held-out, bad batch size or lag.
    """
    from cheapertraining.config import load_data_config

    data = load_data_config(config, overrides)
    wrapped = _tokenizer_of(tokenizer, data)
    prefetched = num_workers * prefetch_factor
    if prefetched > lag:
        raise UserError(
            f"train_loader.lag: {lag} is less than num_workers * prefetch_factor = {prefetched}, the batches that are "
            f"planned ahead. Set lag to at least {prefetched}, or use fewer workers."
        )
    train, probes, heldout = shard_folders(data)
    folders = list(dict.fromkeys([*train.values(), *probes.values(), *heldout.values()]))
    _check_overlap_by_place(probes, heldout)
    store = ShardStore(
        folders,
        seq_len=data.seq_len,
        tokenizer=wrapped,
        cache_limit=data.cache_limit,
        validate_hash=data.validate_hash,
        download_retry=data.download_retry,
        hint=data.prepare_hint,
    )
    rank, world_size = rank_and_world(rank, world_size)
    if rank == 0:
        _check_overlap_by_document(store, probes, heldout)
    max_epochs = {name: source.max_epochs for name, source in data.sources.items()}
    plan = MixturePlan(
        {name: store.shard_sizes(folders.index(folder)) for name, folder in train.items()},
        {name: source.weight for name, source in data.sources.items()},
        global_batch_size=batch_size,
        seed=seed,
        on_exhaustion=data.on_exhaustion,
        max_epochs=max_epochs,
        from_batches={name: source.from_batch for name, source in data.sources.items()},
        shuffle_block_size=data.shuffle_block_size,
    )
    mixture = MixedDataset(store, plan, lag=lag, max_epochs=max_epochs, allow_source_changes=allow_source_changes)
    loader = MixtureLoader(
        mixture,
        batch_size=batch_size // world_size,
        sampler=MixtureSampler(mixture, rank, world_size),
        drop_last=True,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=cast(Any, collate),
        worker_init_fn=partial(_start_worker, store),
        generator=torch.Generator(),  # of its own: with or without workers, it draws nothing from the model's
    )
    loader.mixture = mixture
    names = list(train)

    def finite(folder: ShardFolder, source: str | None) -> DataLoader[SampledRows]:
        index = names.index(source) if source in names else -1
        split = SplitDataset(store, folders.index(folder), index)
        return _finite_loader(split, batch_size // world_size, rank, world_size)

    loader.probes = {name: finite(folder, data.probes[name].source) for name, folder in probes.items()}
    loader.heldout = {name: finite(folder, name) for name, folder in heldout.items()}
    return loader


def _tokenizer_of(
    tokenizer: TokenizerWrapper | PreTrainedTokenizerFast | str | None, data: DataConfig
) -> TokenizerWrapper:
    if isinstance(tokenizer, TokenizerWrapper):
        return tokenizer
    if tokenizer is not None:
        return TokenizerWrapper(tokenizer)
    path = data.tokenizer or str(Path(data.local) / "tokenizer")
    if data.prepare_hint and data.tokenizer is None and not Path(path).exists():
        raise UserError(f"no shards yet: {Path(path)} not found. Run `{data.prepare_hint}` first.")
    return TokenizerWrapper(path)


def shard_folders(data: DataConfig) -> tuple[dict[str, ShardFolder], dict[str, ShardFolder], dict[str, ShardFolder]]:
    """Shard folders of the training sources, of the probes and of the held-out splits (where there is one)."""

    def place(local: str | None, remote: str | None, name: str, split: str) -> ShardFolder:
        root_remote = None if data.remote is None else f"{data.remote.rstrip('/')}/{name}"
        base = Path(local) if local is not None else Path(data.local) / name
        base_remote = remote if remote is not None else (root_remote if local is None else None)
        return ShardFolder(
            f"{name}/{split}", base / split, f"{base_remote.rstrip('/')}/{split}" if base_remote else None
        )

    def of_source(name: str, split: str) -> ShardFolder:
        source = data.sources.get(name)
        return place(source.local if source else None, source.remote if source else None, name, split)

    train = {name: of_source(name, "train") for name in data.sources}
    probes = {
        name: of_source(probe.source, "probe")
        if probe.source is not None
        else place(probe.local, probe.remote, name, "probe")
        for name, probe in data.probes.items()
    }
    # A probe's domain is the target: its held-out split is evaluated even where it is no training source.
    targets = [probe.source for probe in data.probes.values() if probe.source is not None]
    heldout = {name: of_source(name, "heldout") for name in dict.fromkeys([*data.sources, *targets])}
    present = {
        name: folder for name, folder in heldout.items() if folder.remote or (folder.local / "index.json").is_file()
    }
    return train, probes, present


def _check_overlap_by_place(probes: Mapping[str, ShardFolder], heldout: Mapping[str, ShardFolder]) -> None:
    places = {folder.local.resolve(): name for name, folder in heldout.items()}
    for probe, folder in probes.items():
        if (name := places.get(folder.local.resolve())) is not None:
            raise UserError(
                f"data.probes.{probe}: {folder.local} is also the held-out split of '{name}'. What steers the mixture "
                "must not be what it is judged on: give the probe shards of its own."
            )


def _check_overlap_by_document(
    store: ShardStore, probes: Mapping[str, ShardFolder], heldout: Mapping[str, ShardFolder]
) -> None:
    hashes = {name: store.document_hashes(store.folders.index(folder)) for name, folder in heldout.items()}
    for probe, folder in probes.items():
        mine = store.document_hashes(store.folders.index(folder))
        for name, theirs in hashes.items():
            if shared := len(np.intersect1d(mine, theirs)):
                raise UserError(
                    f"data.probes.{probe}: {shared} of its {len(mine)} documents ({folder.local}) are also in the "
                    f"held-out split of '{name}' ({heldout[name].local}). Split by document and make one of them anew."
                )


def rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size as given, else of ``torch.distributed``, else of the launcher's environment."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        found = distributed.get_rank(), distributed.get_world_size()
    else:
        found = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return found[0] if rank is None else rank, found[1] if world_size is None else world_size


def _start_worker(store: ShardStore, worker: int) -> None:
    store.after_fork()


def _finite_loader(split: SplitDataset, batch_size: int, rank: int, world_size: int) -> DataLoader[SampledRows]:
    sampler: Sampler[Any] = (
        DistributedSampler(split, world_size, rank, shuffle=False) if world_size > 1 else SequentialSampler(split)
    )
    # torch types collate_fn as taking a list of items; __getitems__ returns one object instead.
    return DataLoader(split, min(batch_size, len(split)), sampler=sampler, collate_fn=cast(Any, collate))
