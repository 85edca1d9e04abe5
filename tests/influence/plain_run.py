"""A plain loop over real shards (`tiny_sample`): a tiny Llama, the real loader, a wrapped optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining.data import MixtureLoader, get_loader
from cheapertraining.influence import InfluenceAwareOptimizer, InfluenceConfig
from cheapertraining.mixing import MixtureWeightCalculator

EVEN = {"code": 1 / 3, "docs": 1 / 3, "topics": 1 / 3}


@dataclass
class Run:
    model: LlamaForCausalLM
    loader: MixtureLoader
    calculator: MixtureWeightCalculator
    inner: torch.optim.Optimizer
    optimizer: InfluenceAwareOptimizer

    def train(self, steps: int) -> None:
        for batch in islice(self.loader, steps):
            self.backward(batch)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def backward(self, batch: dict[str, torch.Tensor]) -> None:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
        self.model(**inputs, use_cache=False).loss.backward()

    @property
    def weights(self) -> dict[str, float]:
        return self.loader.mixture.get_current_weights()


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_run(
    data: str | Path | dict[str, Any], *, interval: int = 3, learning_rate: float = 1.0, **settings: Any
) -> Run:
    loader = get_loader(data, batch_size=6, lag=2, seed=5)
    model = tiny_model()
    config = InfluenceConfig(**{"source_samples": 8, "probe_samples": 16, "threshold": 1.0, **settings})
    calculator = MixtureWeightCalculator(model, probe_dataloaders=loader.probes, influence_config=config)
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = InfluenceAwareOptimizer(inner, calculator, loader.mixture, interval, learning_rate)
    return Run(model, loader, calculator, inner, optimizer)


def same_state(first: Any, second: Any) -> bool:
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_state, first, second))
    return bool(first == second)
