"""Answers of the student's own, in place of those in the data: what on-policy distillation has the teacher score.

    batch = sample_answers(model, batch, temperature=1.0, generator=generator)

As in GKD (arXiv 2306.13649) and on-policy distillation with reverse KL (MiniLLM, arXiv 2306.08543): the divergence is
taken where the student's own words lead, not where the data's do. A plain loop, without a cache of keys and values: a
pass of the model for each token of the longest answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cheapertraining.data.collate import IGNORED
from cheapertraining.influence.model_access import no_trace
from cheapertraining.influence.ranks import rank_and_world
from cheapertraining.models.causal_lm import CausalLM

__all__ = ["answer_index", "sample_answers"]


def answer_index(labels: Tensor, position_ids: Tensor) -> Tensor:
    """Which answer token of its document each token is, from 1; 0 where no loss counts: int64 ``[B, S]``.

    Args:
        labels: int64 ``[B, S]``, unshifted.
        position_ids: int64 ``[B, S]``, starting anew at each document.
    """
    counted = (labels != IGNORED).long()
    before = counted.cumsum(1) - counted
    start = torch.where(position_ids == 0, before, 0).cummax(1).values
    return torch.where(counted > 0, before - start + 1, 0)


@torch.no_grad()
def sample_answers(
    model: CausalLM,
    batch: Mapping[str, Any],
    *,
    temperature: float,
    generator: torch.Generator,
    eos_id: int | None = None,
) -> dict[str, Any]:
    """Let the model write every token that a loss counts for, at its place, one token of each document at a time.

    A collective call where the model is sharded: all ranks make as many passes as the longest answer of any needs.

    Args:
        model: the student.
        batch: as a loader makes it.
        temperature: of the sampling, above 0.
        generator: on the batch's device; of its own on each rank.
        eos_id: ends an answer: what follows in its document counts no more.

    Returns:
        A batch with new ``input_ids`` and ``labels``.
    """
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    index = answer_index(labels, positions)
    document = (positions == 0).long().cumsum(1)
    ended = torch.zeros_like(labels, dtype=torch.bool)
    new = {**batch, "input_ids": ids, "labels": labels}
    with no_trace(model):
        for number in range(1, _longest(index) + 1):
            rows, columns = (index == number).nonzero(as_tuple=True)
            inputs = model.head_inputs(new)
            states = inputs.hidden[rows, columns - 1]
            logits = inputs.logit_scale * torch.nn.functional.linear(states, inputs.weight, inputs.bias).float()
            if inputs.soft_cap is not None:
                logits = inputs.soft_cap * torch.tanh(logits / inputs.soft_cap)
            if not len(rows):
                continue
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
            ids[rows, columns] = drawn
            over = ended[rows, columns]
            labels[rows, columns] = torch.where(over, IGNORED, drawn)
            if eos_id is not None:
                for row, column in zip(rows[drawn == eos_id].tolist(), columns[drawn == eos_id].tolist(), strict=True):
                    same = document[row] == document[row, column]
                    ended[row] |= same & (torch.arange(len(same), device=same.device) > column)
    return new


def _longest(index: Tensor) -> int:
    most = index.max()
    if rank_and_world()[1] > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
