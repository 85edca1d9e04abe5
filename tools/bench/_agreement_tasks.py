"""Small learning tasks whose models can be retrained hundreds of times: digits, and a byte-level language model.

Both models speak the package's own interface (a batch with unshifted `labels`, an output with `logits`), so that its
code scores them like any other model. All data comes with Python and scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor, nn

from cheapertraining.influence.losses import IGNORED

__all__ = [
    "LENGTH",
    "Batch",
    "Output",
    "Recipe",
    "Task",
    "digits",
    "flipped_digits",
    "language",
    "language_model",
    "prose",
    "rows",
]

Batch = dict[str, Tensor]
CLASSES, PIXELS, HIDDEN = 10, 64, 24
BYTES, LENGTH, WIDTH, HEADS = 128, 48, 40, 4


class Output(NamedTuple):
    """What a model returns: logits `[B, S, V]`."""

    logits: Tensor


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam on the whole batch, the rate falling to zero along a cosine.

    Attributes:
        steps: number of updates.
        rate: learning rate at first.
        decay: half of the squared norm of the parameters enters the loss with this factor.
    """

    steps: int
    rate: float
    decay: float


@dataclass(frozen=True)
class Task:
    """Data, model and recipe of one seed.

    Attributes:
        name: for tables and for the names of cached ensembles.
        seed: of the data split and of the initial weights.
        model: initial weights, float32, in evaluation mode.
        train: batch of all training samples, `[N, ...]`.
        query: batch of all queries, `[Q, ...]`.
        source: int64 `[N]` and `[Q]`: domain (or class) of each sample.
        query_source: the same of each query, `[Q]`.
        recipe: how it is trained.
    """

    name: str
    seed: int
    model: nn.Module
    train: Batch
    query: Batch
    source: Tensor
    query_source: Tensor
    recipe: Recipe


def rows(batch: Mapping[str, Tensor], index: Tensor | slice) -> Batch:
    """Some rows of a batch."""
    return {name: values[index] for name, values in batch.items()}


class DigitsMLP(nn.Module):
    """An image classifier seen as a sequence model of two positions: the first predicts the label at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, batch: Mapping[str, Tensor]) -> Output:
        return Output(self.head(torch.tanh(self.hidden(batch["pixels"]))))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm. Attention is spelled out: `torch.func` maps over it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ v
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.feed_norm(x))))


class ByteLM(nn.Module):
    """A transformer of one block over ASCII, input and output embedding apart."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, BYTES, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.3)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Output:
        return Output(self.output(self.norm(self.block(self.token(input_ids) + self.position(position_ids)))))


def digits(seed: int, train: int = 400, queries: int = 100) -> Task:
    """Scikit-learn's handwritten digits."""
    pixels, target = _digits(seed)
    batch = _as_sequence(pixels[: train + queries], target[: train + queries])
    return Task(
        name="digits",
        seed=seed,
        model=_model(DigitsMLP, seed),
        train=rows(batch, slice(train)),
        query=rows(batch, slice(train, None)),
        source=target[:train],
        query_source=target[train : train + queries],
        recipe=Recipe(steps=200, rate=0.02, decay=3e-3),
    )


def flipped_digits(seed: int, train: int = 800, queries: int = 200, share: float = 0.2) -> tuple[Task, Tensor]:
    """Digits of which a share of the training labels is wrong; and which ones, bool `[N]`."""
    task = digits(seed, train, queries)
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.zeros(train, dtype=torch.bool)
    wrong[torch.randperm(train, generator=generator)[: int(share * train)]] = True
    shift = torch.randint(1, CLASSES, (train,), generator=generator)
    target = torch.where(wrong, (task.source + shift) % CLASSES, task.source)
    flipped = _as_sequence(task.train["pixels"][:, 0], target)
    return Task("flipped digits", seed, task.model, flipped, task.query, target, task.query_source, task.recipe), wrong


def language(seed: int, train: int = 96, queries: int = 24) -> Task:
    """Documents of 48 bytes from four domains: prose, Python, tables of numbers, names of characters."""
    texts = _domains()
    rng = np.random.default_rng(seed)
    each = (train + queries) // len(texts)
    documents, source = [], []
    for domain, text in enumerate(texts):
        starts = rng.choice(len(text) // LENGTH, size=each, replace=False) * LENGTH
        documents += [text[start : start + LENGTH] for start in starts]
        source += [domain] * each
    kept = train // len(texts)
    batch = _documents(documents)
    is_query = torch.arange(len(documents)) % each >= kept
    sources = torch.tensor(source)
    return Task(
        name="language",
        seed=seed,
        model=language_model(seed),
        train=rows(batch, ~is_query),
        query=rows(batch, is_query),
        source=sources[~is_query],
        query_source=sources[is_query],
        recipe=Recipe(steps=40, rate=0.005, decay=1e-2),
    )


def language_model(seed: int) -> nn.Module:
    """The byte-level model with fresh weights."""
    return _model(ByteLM, seed)


def prose(count: int = 2000) -> Batch:
    """Documents of the first domain alone, one after another."""
    text = _domains()[0]
    return _documents([text[start : start + LENGTH] for start in range(0, count * LENGTH, LENGTH)])


def _model(kind: type[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    data = sklearn.datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    pixels = torch.tensor(data.data[order] / 16.0 - 0.5, dtype=torch.float32)
    return pixels, torch.tensor(data.target[order], dtype=torch.int64)


def _as_sequence(pixels: Tensor, target: Tensor) -> Batch:
    labels = torch.stack([torch.full_like(target, IGNORED), target], dim=1)
    return {"pixels": pixels[:, None].expand(-1, 2, -1).contiguous(), "labels": labels}


def _domains() -> tuple[bytes, ...]:
    library, tables = Path(sysconfig.get_path("stdlib")), Path(sklearn.datasets.__file__).parent / "data"
    prose = " ".join(" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    code = "".join((library / f"{name}.py").read_text() for name in ("argparse", "inspect", "tarfile", "typing"))
    numbers = (tables / "breast_cancer.csv").read_text()
    names = "\n".join(filter(None, (unicodedata.name(chr(point), "") for point in range(0x2000))))
    return tuple(text.encode("ascii", "ignore") for text in (prose, code, numbers, names))


def _documents(texts: list[bytes]) -> Batch:
    tokens = torch.tensor([list(text) for text in texts], dtype=torch.int64)
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    return {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(LENGTH).expand_as(tokens).contiguous()}
