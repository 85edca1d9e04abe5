"""Which training samples are of the query's own kind? Problems of ten kinds, learnt by low-rank adapters.

A miniature of the task that DataInf's authors report (Kwon et al. 2024): a language model is trained on
prose, then frozen, then adapted to the problems; for each held-out problem, the training problems of the same kind
ought to have the larger scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import model_losses
from cheapertraining.influence.parameters import select_parameters
from cheapertraining.influence.preconditioners import EKFAC, DataInf, Identity, LayerScale, Preconditioner
from cheapertraining.influence.scorers.hook import hook_norms, hook_scores
from tools.bench._agreement_metrics import area_under_curve
from tools.bench._agreement_product import Scores, directions_of
from tools.bench._agreement_tasks import LENGTH, Batch, language_model, prose, rows

__all__ = ["adapted", "kind_areas"]

RANK = 4
NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
THINGS = ("pens", "eggs", "cups", "hats", "figs", "keys", "nuts", "jars")
KINDS: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    ("won", lambda a, b: a + b),
    ("lost", lambda a, b: a - b),
    ("times", lambda a, b: a * b),
    ("halved by", lambda a, b: a // b),
    ("rest by", lambda a, b: a % b),
    ("found", lambda a, b: a + 2 * b),
    ("ate half and", lambda a, b: a // 2 - b),
    ("capped at", lambda a, b: min(a, b)),
    ("doubled less", lambda a, b: 2 * a - b),
    ("sold", lambda a, b: a - b - 1),
)
"""What tells one kind of problem from another: a word or two, and how its answer follows."""


class LowRank(nn.Module):
    """A frozen linear layer and a trainable one of low rank beside it, zero at first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def problems(seed: int, each: int) -> tuple[Batch, Tensor]:
    """Problems, `each` of every kind, the numbers of a kind never twice; and the kind of each, int64 `[N]`."""
    rng = np.random.default_rng(seed)
    tokens = torch.zeros(len(KINDS) * each, LENGTH, dtype=torch.int64)
    for kind, (words, answer) in enumerate(KINDS):
        pairs = rng.choice(89 * 8, size=each, replace=False)
        for place, pair in enumerate(pairs):
            a, b = int(pair) // 8 + 10, int(pair) % 8 + 2
            name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
            text = f"{name} had {a} {thing}, {words} {b}: {answer(a, b)}".encode()
            tokens[kind * each + place, : len(text)] = torch.tensor(list(text))
    labels = torch.where(tokens > 0, tokens, IGNORED)
    labels[:, 0] = IGNORED
    positions = torch.arange(LENGTH).expand_as(tokens).contiguous()
    kinds = torch.arange(len(KINDS)).repeat_interleave(each)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}, kinds


def adapted(seed: int, train: Batch, pretraining: int, steps: int) -> nn.Module:
    """A model trained on prose, with adapters trained on `train`; float64, in evaluation mode."""
    model = language_model(seed)
    generator = torch.Generator().manual_seed(seed)
    _fit(model, prose(), pretraining, 0.005, generator)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and not isinstance(parent, LowRank):
                    setattr(parent, name, LowRank(child))
    _fit(model, train, steps, 0.005, generator)
    return copy.deepcopy(model).double()


def _fit(model: nn.Module, data: Batch, steps: int, rate: float, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        batch = rows(data, torch.randint(len(data["labels"]), (32,), generator=generator))
        losses, counted = model_losses(model, batch)
        optimizer.zero_grad()
        (losses.sum() / counted.sum()).backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()


def kind_areas(
    seed: int, each: int = 50, held_out: int = 5, pretraining: int = 300, steps: int = 300
) -> dict[str, NDArray[np.float64]]:
    """By estimator, for each held-out problem: area under the curve of telling its kind by the scores."""
    data, kinds = problems(seed, each)
    query = torch.arange(len(kinds)) % each < held_out
    train = rows(data, ~query)
    model = adapted(seed, train, pretraining, steps)
    scores = _scores(model, train, rows(data, query))
    return {
        name: np.array(
            [
                area_under_curve(column.numpy(), (kinds[~query] == own).numpy())
                for column, own in zip(values.T, kinds[query], strict=True)
            ]
        )
        for name, values in scores.items()
    }


def _scores(model: nn.Module, train: Batch, query: Batch) -> Scores:
    parameters = select_parameters(model)
    directions = directions_of(model, query)
    made: dict[str, Preconditioner] = {
        "dot": Identity(),
        "layer_scale": LayerScale(parameters).fit(model, [train]),
        "datainf": DataInf(parameters).fit(model, [train]),
        "ekfac": EKFAC(parameters).fit(model, [train]),
    }
    scores = {name: hook_scores(model, each.apply(directions), train).scores for name, each in made.items()}
    norms = hook_norms(model, parameters, train)[:, None]
    return scores | {"cosine": scores["dot"] / norms.sqrt(), "earlier formula": scores["dot"] / (1e-4 + norms)}
