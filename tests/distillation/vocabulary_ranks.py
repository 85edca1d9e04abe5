"""What ``test_vocabulary_parallel.py`` computes on one rank of those that hold a part of the vocabulary each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cheapertraining.distillation import (
    DIVERGENCES,
    DenseTargets,
    Divergence,
    HiddenTargets,
    OutputHead,
    Targets,
    chunked_distillation_loss,
    distillation_loss,
    sample_targets,
    top_k_targets,
)
from cheapertraining.errors import UserError

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 7, 20, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {"temperature": 1.0, "alpha": 0.4},
    "cooled": {"temperature": 2.5, "alpha": 0.4},
    "divergence alone": {"temperature": 1.0, "alpha": 1.0},
}
KINDS = ("dense", "hidden", "top-k", "top-k, all", "sampled", "labels")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged_labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    labels[:, 0] = -100
    labels[0, 3] = -100
    labels[2, 4:] = -100
    return labels


def targets_of(kind: str, temperature: float) -> Targets | None:
    """Those of a teacher that holds one token impossible and finds two equally likely, on different ranks."""
    logits = 2 * draw(ROWS, LENGTH, VOCABULARY, seed=5)
    logits[..., 13] = -math.inf
    logits[..., [1, 18]] = logits.amax(dim=-1, keepdim=True)
    if kind == "labels":
        return None
    if kind == "hidden":
        head = OutputHead(draw(VOCABULARY, 4, seed=6), draw(VOCABULARY, seed=9), logit_scale=0.5, soft_cap=5.0)
        return HiddenTargets(draw(ROWS, LENGTH, 4, seed=7), head)
    if kind == "sampled":
        return sample_targets(logits, 20, torch.Generator().manual_seed(8), temperature=temperature)
    if kind == "dense":
        return DenseTargets(logits)
    return top_k_targets(logits, 4 if kind == "top-k" else VOCABULARY, temperature=temperature)


def part_of(targets: Targets | None, rank: int, ranks: int) -> Targets | None:
    if isinstance(targets, HiddenTargets):
        return HiddenTargets(targets.hidden, targets.head.part(rank, ranks))
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits.chunk(ranks, dim=-1)[rank])
    return targets


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, kind of targets, settings."""
    for kind in KINDS:
        for setting, options in SETTINGS.items():
            for name in DIVERGENCES if kind not in ("sampled", "labels") else ("forward_kl",):
                # A token that only the teacher holds impossible costs 1e30 nats in the reverse forms.
                if kind != "dense" or name not in ("reverse_kl",):
                    yield f"{kind}, {name}, {setting}", kind, {"divergence": Divergence(name), **options}


def compare(kind: str, options: dict[str, Any], cap: float | None, chunk: int) -> list[float]:
    """Largest errors of the numbers, of the gradients and of the statistics, relative to the largest, at least 1."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    targets, labels = targets_of(kind, options["temperature"]), ragged_labels()
    shapes = ((ROWS, LENGTH, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    inputs = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    head, weights = OutputHead(inputs[1], inputs[2], 0.7, cap), torch.tensor([0.5, 2.0, 1.0])
    whole = chunked_distillation_loss(
        inputs[0], head, targets, labels, token_weights=weights, statistics=True, **options
    )
    plain = (
        whole
        if targets is None
        else distillation_loss(head.logits(inputs[0]), targets, labels, token_weights=weights, **options)
    )
    expected = torch.autograd.grad(3 * plain.total, inputs)

    hidden = inputs[0].detach().requires_grad_()
    part = [each.detach().chunk(ranks)[rank].clone().requires_grad_() for each in inputs[1:]]
    found = chunked_distillation_loss(
        hidden,
        OutputHead(part[0], part[1], 0.7, cap),
        part_of(targets, rank, ranks),
        labels,
        token_weights=weights,
        chunk_tokens=chunk,
        statistics=True,
        group=dist.group.WORLD,
        **options,
    )
    gradients = list(torch.autograd.grad(3 * found.total, [hidden, *part]))
    dist.all_reduce(gradients[0])
    numbers = [(getattr(found, name), getattr(plain, name)) for name in ("total", "cross_entropy", "divergence")]
    mine = [expected[0], *(each.chunk(ranks)[rank] for each in expected[1:])]
    assert whole.statistics is not None
    assert found.statistics is not None
    told = vars(whole.statistics)
    assert {name for name, each in told.items() if each is None} == {
        name for name, each in vars(found.statistics).items() if each is None
    }
    statistics = [(getattr(found.statistics, name), each) for name, each in told.items() if each is not None]
    pairs = (numbers, list(zip(gradients, mine, strict=True)), statistics)
    return [
        max(float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)) for a, b in of) for of in pairs
    ]


def refusals() -> dict[str, str]:
    """What this rank is told about targets that are wrong, on whichever rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    head, hidden, found = OutputHead(draw(VOCABULARY // ranks, WIDTH, seed=1)), draw(ROWS, LENGTH, WIDTH, seed=0), {}
    broken = draw(ROWS, LENGTH, VOCABULARY // ranks, seed=5)
    if rank == 1:
        broken[1, 2, 3] = math.nan
    other = top_k_targets(draw(ROWS, LENGTH, VOCABULARY + 40, seed=5), 30)
    attempts: dict[str, tuple[Targets, dict[str, Any]]] = {
        "not finite": (DenseTargets(broken), {}),
        "another tokenizer": (top_k_targets(draw(ROWS, LENGTH, VOCABULARY + 9, seed=5), 9), {}),
        "more than there are": (other, {}),
        "padding": (DenseTargets(broken), {"vocab_size": VOCABULARY - 1}),
    }
    for name, (targets, options) in attempts.items():
        try:
            chunked_distillation_loss(hidden, head, targets, ragged_labels(), group=dist.group.WORLD, **options)
        except UserError as error:
            found[name] = str(error)
    return found


def nothing_counts() -> list[float]:
    """Total, and largest gradient, of rows in which no loss counts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hidden, weight = draw(ROWS, LENGTH, WIDTH, seed=0), draw(VOCABULARY // ranks, WIDTH, seed=1).requires_grad_()
    labels = torch.full((ROWS, LENGTH), -100)
    targets = part_of(targets_of("hidden", 1.0), rank, ranks)
    loss = chunked_distillation_loss(
        hidden, OutputHead(weight), targets, labels, group=dist.group.WORLD, statistics=True
    )
    (gradient,) = torch.autograd.grad(loss.total, weight)
    return [float(loss.total), float(gradient.abs().max())]


def work(rank: int, world: int, folder: str) -> None:
    """All cases; what came of them in ``<rank>.json``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    errors = {
        name: compare(kind, options, cap, chunk)
        for name, kind, options in cases()
        for cap, chunk in (((None, 4),) if options["temperature"] == 1 else ((3.0, 64),))
    }
    found = {"errors": errors, "refusals": refusals(), "nothing": nothing_counts()}
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
