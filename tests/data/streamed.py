"""Rows of shards as Streaming itself reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streaming import StreamingDataset

from cheapertraining.data.shared_memory import open_dataset


def streamed(folder: Path) -> list[dict[str, Any]]:
    """All samples, in order. What the data set holds open is closed again, which Streaming alone leaves to the end."""
    dataset = open_dataset(lambda: StreamingDataset(local=str(folder), shuffle=False, batch_size=1))
    return [dataset[index] for index in range(dataset.num_samples)]
