"""Tiny models and packed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from cheapertraining.config import ModelConfig

Pack = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=64,
    )


@pytest.fixture
def pack() -> Pack:
    """pack([[doc, doc], [doc]], length=16) -> a batch as the loaders make it; shorter rows end in padding."""

    def pack_rows(rows: Sequence[Sequence[Sequence[int]]], length: int) -> dict[str, torch.Tensor]:
        batch = {
            "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
            "labels": torch.full((len(rows), length), -100),
            "position_ids": torch.zeros(len(rows), length, dtype=torch.int64),
            "source": torch.arange(len(rows)),
            "sample_id": torch.arange(len(rows)),
        }
        for row, documents in enumerate(rows):
            at = 0
            for document in documents:
                end = at + len(document)
                batch["input_ids"][row, at:end] = torch.tensor(document)
                batch["labels"][row, at + 1 : end] = torch.tensor(document[1:])
                batch["position_ids"][row, at:end] = torch.arange(len(document))
                at = end
            batch["position_ids"][row, at:] = torch.arange(length - at)
        return batch

    return pack_rows
