"""A Llama of two layers over a vocabulary of 50, and batches for it as the loader makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 50, 24
Batch = dict[str, torch.Tensor]


def tiny_llama(
    seed: int = 0, dtype: torch.dtype = torch.float64, *, tied: bool = True, exact_norms: bool = True
) -> LlamaForCausalLM:
    """Weights are large enough that attention is not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attention_dropout=0.3,
    )
    model = LlamaForCausalLM(config)
    for module in model.modules():
        for name, child in module.named_children():
            if exact_norms and type(child).__name__ == "LlamaRMSNorm":
                # Transformers' own works in float32 whatever the parameters are, too coarse for a reference.
                setattr(module, name, torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return model.to(dtype)


def random_batch(count: int, seed: int, *, low: int = 0, high: int = VOCABULARY) -> Batch:
    """Rows of two packed documents and a padded end, of tokens ``low`` to ``high``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, high, (count, LENGTH), generator=generator)
    labels, positions = tokens.clone(), torch.zeros_like(tokens)
    for row in range(count):
        cut = int(torch.randint(5, LENGTH - 8, (1,), generator=generator))
        end = LENGTH - int(torch.randint(0, 4, (1,), generator=generator))
        for start, stop in ((0, cut), (cut, end), (end, LENGTH)):
            positions[row, start:stop] = torch.arange(stop - start)
        labels[row, [0, cut]] = -100
        labels[row, end:] = -100
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


class Rows(Dataset[Batch]):
    """A finite split."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[index] for name, rows in self.batch.items()}


def probe_loader(count: int = 9, seed: int = 100, *, low: int = 0, high: int = VOCABULARY) -> DataLoader[Batch]:
    return DataLoader(Rows(random_batch(count, seed, low=low, high=high)), batch_size=4)


class Sources:
    """Sources that differ in the tokens they use; samples are made from the key."""

    def __init__(self, ranges: Sequence[tuple[int, int]] = ((0, 20), (15, 40), (30, 50))) -> None:
        self.ranges = dict(zip(("a", "b", "c", "d"), ranges, strict=False))

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(self.ranges)

    def draw(self, source: str, n: int, key: int) -> Batch:
        low, high = self.ranges[source]
        seed = (key * 31 + self.source_names.index(source)) % (2**31 - 1)
        return random_batch(n, seed, low=low, high=high)
