"""Documents to shards to batches: tokenization, packing, shards, and mixtures whose weights change while they run.

Importing this package imports torch and numpy only; tokenizers, Streaming and OmegaConf are imported where used.
"""

from cheapertraining.data.collate import Batch, collate
from cheapertraining.data.dataloaders import (
    DatasetMixture,
    create_dataloader,
    create_pretraining_dataloader,
    create_probe_dataloaders,
    get_dataset_weights_from_config,
    list_available_configs,
    load_data_config,
)
from cheapertraining.data.datasets import PretrainDataset, SFTDataset
from cheapertraining.data.documents import EncodedDocument
from cheapertraining.data.loader import get_loader
from cheapertraining.data.mixing import MixedDataset, MixtureLoader, MixtureSampler, SourceCounts
from cheapertraining.data.packed import PackedDataset
from cheapertraining.data.packed_texts import PackedTexts, TokenPacker, batch_tokenize, compute_position_ids
from cheapertraining.data.packing import pack
from cheapertraining.data.plan import Exhausted, MixturePlan
from cheapertraining.data.shards import ShardMeta, read_meta, write_documents, write_split
from cheapertraining.data.tokenization import TokenizerWrapper, train_bpe

__all__ = [
    "Batch",
    "DatasetMixture",
    "EncodedDocument",
    "Exhausted",
    "MixedDataset",
    "MixtureLoader",
    "MixturePlan",
    "MixtureSampler",
    "PackedDataset",
    "PackedTexts",
    "PretrainDataset",
    "SFTDataset",
    "ShardMeta",
    "SourceCounts",
    "TokenPacker",
    "TokenizerWrapper",
    "batch_tokenize",
    "collate",
    "compute_position_ids",
    "create_dataloader",
    "create_pretraining_dataloader",
    "create_probe_dataloaders",
    "get_dataset_weights_from_config",
    "get_loader",
    "list_available_configs",
    "load_data_config",
    "pack",
    "read_meta",
    "train_bpe",
    "write_documents",
    "write_split",
]
