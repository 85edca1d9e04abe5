"""Calls that several tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast


def create(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Any:
    from cheapertraining.data import create_pretraining_dataloader

    call = {"batch_size": 6, "max_length": 32, "config_name": str(tiny_sample / "data.yaml"), "with_probes": True}
    return create_pretraining_dataloader(**{"tokenizer": tokenizer, "seed": 42, **call, **settings})
