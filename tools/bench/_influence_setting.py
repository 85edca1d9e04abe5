"""What the cost of influence is measured on: a Hugging Face Llama of random weights, and batches of random tokens."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining.influence.losses import IGNORED, token_losses
from cheapertraining.influence.parameters import Directions, select_parameters

LONGEST = 512
# Hidden size, blocks, vocabulary; the feed-forward layer is 8/3 of the hidden size.
SIZES = {"toy": (64, 1, 256), "2.5M": (192, 4, 2048), "10M": (320, 6, 2048)}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """A model and a batch of ``rows`` of ``length`` tokens.

    Attributes:
        params: a key of ``SIZES``.
        rows: of the batch, one document each.
        length: tokens of a row.
    """

    params: str
    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.params}, {self.rows} x {self.length}"

    @functools.cached_property
    def model(self) -> LlamaForCausalLM:
        """In training mode; the same object for each candidate."""
        return make_model(self.params)

    @functools.cached_property
    def batch(self) -> Batch:
        return make_batch(self.params, self.rows, self.length)

    @functools.cached_property
    def queries(self) -> Batch:
        """Half as many rows, of other tokens."""
        return make_batch(self.params, max(1, self.rows // 2), self.length, seed=3)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return select_parameters(self.model)

    @property
    def tokens(self) -> int:
        """Tokens of the batch that the loss counts."""
        return int((self.batch["labels"][:, 1:] != IGNORED).sum())

    def directions(self, count: int) -> Directions:
        """Random directions of all parameters, made anew: they may be large."""
        return make_directions(self.model, count)

    def plain(self) -> None:
        """The baseline: a step from and to empty gradients."""
        step(self.model, self.batch)
        self.model.zero_grad()


def make_model(params: str) -> LlamaForCausalLM:
    """Untied, without dropout."""
    hidden, blocks, vocabulary = SIZES[params]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def make_batch(params: str, rows: int, length: int, seed: int = 1) -> Batch:
    """Random tokens; the rows come from four sources in turn."""
    vocabulary = SIZES[params][2]
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(length).expand_as(ids).contiguous()
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "source": torch.arange(rows) % 4}


def make_directions(model: nn.Module, count: int) -> Directions:
    """Random directions of all parameters."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(count, *parameter.shape, generator=generator)
        for name, parameter in select_parameters(model).items()
    }
    return Directions(tuple(f"probe {k}" for k in range(count)), tensors)


def step(model: nn.Module, batch: Batch, tokens: int | None = None) -> None:
    """Forward and backward, as a training loop does them; ``tokens`` of the step, where it has several batches."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    losses, counted = token_losses(logits, batch["labels"])
    (losses.sum() / (counted.sum() if tokens is None else tokens)).backward()


def cpu_seconds(run: Callable[[], object]) -> float:
    """Process CPU time of one call, over all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start
