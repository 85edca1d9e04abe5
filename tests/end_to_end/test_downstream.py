"""Fine-tuning with yamls/downstream.yaml: from a model on disk, on real shards of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining.config import load_run_config
from cheapertraining.data import SFTDataset, write_documents
from cheapertraining.training import train
from tests.data.chats import CHATML, assistant, make_tokenizer, user

SEQ_LEN = 48


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Two sources of conversations that answer every question in one of two ways, and their tokenizer."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", CHATML)
    for source, answer, size in (("sft_chat", "yes and no", 96), ("sft_faq", "the answer", 64)):
        for split, numbers in (
            ("train", range(size)), ("probe", range(size, size + 8)), ("heldout", range(size + 8, size + 16)),
        ):  # fmt: skip
            records = [{"messages": [user(f"{source} asks {n}"), assistant(answer)]} for n in numbers]
            write_documents(
                tmp_path / source / split, SFTDataset(records, tokenizer, max_length=SEQ_LEN), tokenizer,
                seq_len=SEQ_LEN, source=source, split=split, license="none", origin="test",
            )  # fmt: skip
    return tmp_path


def test_fine_tuning_from_a_model_on_disk(sample: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=64, **sizes, **heads)).save_pretrained(
        sample / "model"
    )
    changes = [
        f"data.local={sample}", f"data.seq_len={SEQ_LEN}", f"model.name_or_path={sample / 'model'}", "device=cpu",
        f"save_folder={sample / 'runs'}", "run_name=ft", "max_duration=12ba", "train_loader.global_batch_size=8",
        "eval_loader.interval=12ba", "save_interval=12ba", "optimizer.lr=1e-2", "loggers.console=null",
        "loggers.wandb=null", "callbacks.memory_monitor=null",
    ]  # fmt: skip
    train(load_run_config("downstream", changes))
    lines = [json.loads(line) for line in (sample / "runs/ft/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for source in ("sft_chat", "sft_faq"):
        key = f"metrics/heldout/{source}/TokenCrossEntropy"
        first, *_, last = [line[key] for line in lines if key in line]
        assert 5.5 < first < 6.5  # ln 400 is 5.99: all tokens are as likely
        assert last < first - 2
    assert (sample / "runs/ft/checkpoints").is_dir()
