"""Loaders under the names and in the shapes that other packages' training loops call; all of it over ``get_loader``.

Data is read from shards. Where a call describes data sets on a hub, one error says which command makes shards of them.

Batches differ from :func:`~cheapertraining.data.collate.collate`'s in one thing: they never carry an
``attention_mask``. Such loops hand it to a Hugging Face model, which then no longer takes document bounds from
``position_ids``, and packed documents would see each other. None is needed: padding is at the end of a row, where no
causal model looks at it from a document's token, and its labels are -100. A model isolates the documents if it is
called with ``position_ids``, without a mask and with ``use_cache=False`` (or ``model.config.use_cache = False``).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, Subset

from cheapertraining.data.collate import Batch, collate
from cheapertraining.data.loader import SplitDataset, get_loader, rank_and_world
from cheapertraining.data.mixing import MixedDataset, MixtureLoader
from cheapertraining.data.rows import SampledRows
from cheapertraining.data.shards import read_meta
from cheapertraining.data.store import ShardFolder, ShardStore
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError

__all__ = [
    "DatasetMixture",
    "create_dataloader",
    "create_pretraining_dataloader",
    "create_probe_dataloaders",
    "get_dataset_weights_from_config",
    "list_available_configs",
    "load_data_config",
]

Config = str | Path | Mapping[str, Any]
Probes = dict[str, DataLoader[SampledRows]]


@dataclass(frozen=True)
class DatasetMixture:
    """A source as a data set of the Hugging Face hub: what shards are made of.

    Attributes:
        name: of the source.
        weight: sampling weight, relative to the other sources'.
        path: of the data set on the hub.
        subset: its configuration, where it has several.
        split: its split.
        text_column: column of the text.
    """

    name: str
    weight: float
    path: str
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> DatasetMixture:
        """From an entry of a config; ``path`` stands for a missing ``name``."""
        path = str(entry.get("path", ""))
        column = entry.get("text_column") or "text"
        return cls(
            name=str(entry.get("name") or path.rsplit("/", 1)[-1] or "default"),
            weight=float(entry.get("weight", 1.0)),
            path=path,
            subset=entry.get("subset"),
            split=str(entry.get("split") or "train"),
            text_column=column if isinstance(column, str) else str(column[0]),
        )

    def command(self, tokenizer: Any = None, seq_len: int | None = None, splits: str | None = None) -> str:
        """The command that makes shards of it in ``data/mine/<name>``."""
        parts = ["python", "tools/convert_text.py", "--dataset", self.path]
        optional = {"--dataset-config": self.subset, "--text-column": self.text_column, "--dataset-split": self.split}
        defaults = ("text", "train", None)
        for option, value in optional.items():
            parts += [option, value] if value is not None and value not in defaults else []
        named = tokenizer if isinstance(tokenizer, str) else getattr(tokenizer, "name_or_path", None)
        parts += ["--tokenizer", str(named or "TOKENIZER"), "--seq-len", str(seq_len or 2048)]
        parts += ["--out", f"data/mine/{self.name}", "--split-by-hash"]
        return shlex.join([*parts, splits or "train:0.98,probe:0.01,heldout:0.01"])


def create_pretraining_dataloader(
    tokenizer: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    config_name: Config = "mixed_pretrain",
    with_probes: bool = True,
    seed: int = 42,
    **loader_settings: Any,
) -> tuple[MixtureLoader, MixedDataset | None, Probes | None]:
    """The training loader of a named data config, its mixture and its probes.

    Args:
        tokenizer: what the shards were made with: a Hugging Face tokenizer, a :class:`TokenizerWrapper` or the path of
            one; None: the config's.
        batch_size: rows in a batch of *one* rank.
        max_length: tokens in a row; None: what the shards have.
        config_name: name of a data config, path of one, or its content.
        with_probes: whether to return the probes.
        seed: decides the order of samples.
        **loader_settings: further ones of :func:`create_dataloader`.

    Returns:
        ``(loader, mixture, probes)``. The loader does not end unless the exhaustion policy says so. The mixture is None
        where there is one source and so nothing to mix; probes are None where there are none or none were asked for.

    Raises:
        UserError: as :func:`create_dataloader`.
    """
    loader, mixture = create_dataloader(config_name, tokenizer, batch_size, max_length, seed=seed, **loader_settings)
    return loader, mixture, (loader.probes or None) if with_probes else None


def create_dataloader(
    config: Config,
    tokenizer: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    seed: int = 42,
    packed: bool = True,
    lag: int = 8,
) -> tuple[MixtureLoader, MixedDataset | None]:
    """The training loader that a data config describes, and its mixture (None where there is one source).

    Args:
        config: a data config: its name, its path, or its content (plain or OmegaConf).
        tokenizer, batch_size, max_length, seed: as for :func:`create_pretraining_dataloader`.
        rank, world_size: of data parallelism; None: those of ``torch.distributed`` or the launcher.
        num_workers, prefetch_factor, pin_memory: as for ``torch.utils.data.DataLoader``.
        packed: rows are packed when shards are made, so that it must be true.
        lag: batches from a weight change to its first batch; at least ``num_workers * prefetch_factor``.

    Raises:
        UserError: data sets of a hub, which are not streamed; rows of another length; what ``get_loader`` finds.
    """
    from cheapertraining.config import load_data_config as typed_config

    if not packed:
        raise UserError("packed: expected true: rows are packed when shards are made. Convert with `--packing pad`.")
    content = _plain(config)
    if isinstance(content, Mapping):
        _refuse_hub(content, tokenizer, max_length)
    data = typed_config(content)
    if max_length is not None and max_length != data.seq_len:
        raise UserError(
            f"max_length: the shards of this data config have rows of {data.seq_len} tokens, found {max_length}. Pass "
            f"max_length={data.seq_len}, or convert anew with `--seq-len {max_length}`."
        )
    rank, world_size = rank_and_world(rank, world_size)
    loader = get_loader(
        data,
        tokenizer,
        batch_size * world_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        lag=lag,
        seed=seed,
    )
    for each in (loader, *loader.probes.values(), *loader.heldout.values()):
        each.collate_fn = cast(Any, _collate_unmasked)
    return loader, loader.mixture if len(data.sources) > 1 else None


def create_probe_dataloaders(
    probe_config: Mapping[str, Any],
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 4,
    seed: int = 42,
) -> Probes:
    """Loaders of probes that lie in shard folders.

    Args:
        probe_config: ``{path, size}`` for one probe, which is then named ``default``, or ``{domains: {<name>: {path,
            samples}}}``. ``path`` is a folder of shards, ``size`` or ``samples`` the most rows to read of it.
        tokenizer: what the shards must have been made with; None: that is not checked.
        max_length: tokens in a row; None: what the shards have.
        batch_size: rows in a batch.
        seed: without effect: a probe is a fixed set, read in order.

    Raises:
        UserError: no probe, no shards at ``path`` (with the command that makes them), or shards that do not fit.
    """
    content = _plain(probe_config)
    domains = content.get("domains") or ({"default": content} if content.get("path") else {})
    if not domains:
        raise UserError("probe config: expected `path` (one probe) or `domains` (several by name), found neither.")
    return {
        str(name): _probe_loader(str(name), entry, tokenizer, max_length, batch_size) for name, entry in domains.items()
    }


def load_data_config(config_name: Config = "mixed_pretrain", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A data config as plain mappings, every default written out. ``get_loader`` and all of the above take it.

    Raises:
        UserError: no such config, or something wrong in it.
    """
    from cheapertraining.config import load_data_config as typed_config

    return asdict(typed_config(_plain(config_name), overrides))


def list_available_configs() -> list[str]:
    """Names of the data configs that come with the package, sorted."""
    from cheapertraining.config import data_config_names

    return data_config_names()


def get_dataset_weights_from_config(config: Config) -> dict[str, float]:
    """Sampling weights at the start by source; they sum to 1.

    Raises:
        UserError: the config is wrong, or no weight is above 0.
    """
    content = _plain(config)
    listed = content.get("sources") if isinstance(content, Mapping) else None
    if isinstance(listed, Sequence):
        entries = [DatasetMixture.of(entry) for entry in listed]
        weights = {entry.name: entry.weight for entry in entries}
    else:
        weights = {name: source["weight"] for name, source in load_data_config(content)["sources"].items()}
    total = sum(weights.values())
    if not total > 0:
        raise UserError("data config: expected a source with a weight above 0, found none.")
    return {name: weight / total for name, weight in weights.items()}


def _collate_unmasked(sampled: SampledRows) -> Batch:
    batch = collate(sampled)
    batch.pop("attention_mask", None)
    return batch


def _plain(config: Any) -> Any:
    """OmegaConf containers as plain ones; everything else as it is."""
    if not isinstance(config, Mapping) or isinstance(config, dict):
        return config
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)


def _refuse_hub(config: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> None:
    """Raise where a config describes data sets of a hub: a list of ``sources``, or one ``dataset``."""
    listed, single = config.get("sources"), config.get("dataset")
    if isinstance(single, Mapping):
        column = (config.get("preprocessing") or {}).get("text_column")
        listed = [{"path": single.get("path"), "subset": single.get("name"), **_split(single), "text_column": column}]
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return
    sources = [DatasetMixture.of(entry) for entry in listed]
    if not sources:
        raise UserError("data config: expected at least one source, found none.")
    named = ", ".join(f"{source.name}: {{weight: {source.weight:g}}}" for source in sources)
    seq_len = max_length or 2048
    raise UserError(
        f"data config: its {len(sources)} source(s) are data sets of a hub ({', '.join(s.path for s in sources)}), "
        f"which are not streamed here. Make shards of each once, as in `{sources[0].command(tokenizer, seq_len)}`, and "
        f"use the config {{local: data/mine, seq_len: {seq_len}, sources: {{{named}}}}}."
    )


def _split(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"split": entry["split"]} if entry.get("split") else {}


def _probe_loader(
    name: str, entry: Mapping[str, Any], tokenizer: Any, max_length: int | None, batch_size: int
) -> DataLoader[SampledRows]:
    source = DatasetMixture.of({**entry, "name": name})
    folder = Path(source.path)
    folder = folder / "probe" if (folder / "probe" / "index.json").is_file() else folder
    if not (folder / "index.json").is_file():
        command = source.command(tokenizer, max_length, "probe:1")
        raise UserError(
            f"probe '{name}': expected a folder of shards, found none at '{source.path}'. Data sets of a hub are not "
            f"streamed here: make shards once, as in `{command}`, and give path=data/mine/{name}/probe."
        )
    store = ShardStore(
        [ShardFolder(f"probe '{name}'", folder)],
        seq_len=max_length or read_meta(folder).seq_len,
        tokenizer=tokenizer
        if tokenizer is None or isinstance(tokenizer, TokenizerWrapper)
        else TokenizerWrapper(tokenizer),
    )
    split: Dataset[SampledRows] = SplitDataset(store, 0, -1)
    rows = store.samples(0)
    most = int(entry.get("samples") or entry.get("size") or rows)
    if most < rows:
        split = Subset(split, range(most))
    return DataLoader(split, batch_size, collate_fn=cast(Any, _collate_unmasked))
