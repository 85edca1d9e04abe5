"""Records to documents of tokens."""

from cheapertraining.data.datasets.pretrain import PretrainDataset
from cheapertraining.data.datasets.sft import SFTDataset

__all__ = ["PretrainDataset", "SFTDataset"]
