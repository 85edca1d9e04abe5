"""What influence code asks of several processes: shares of the rows, sums, and whether all agree."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from cheapertraining.errors import UserError

__all__ = ["check_equal_counts", "rank_and_world", "rank_rows", "sum_over_ranks"]


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; ``(0, 1)`` without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_rows(count: int, copies: int = 1) -> list[tuple[int, float]]:
    """Split ``count`` rows over the ranks: ``(row, 1.0)`` for this rank's, filled up with ``(0, 0.0)`` that
    do not count.

    All ranks get equally many, so that they make the same number of passes (a sharded model needs that).

    Args:
        count: of the rows.
        copies: neighbouring ranks that get the same rows
            (:func:`~cheapertraining.influence.sharding.sample_copies`).
    """
    rank, world = (each // copies for each in rank_and_world())
    mine = [(row, 1.0) for row in range(rank, count, world)]
    return mine + [(0, 0.0)] * (math.ceil(count / world) - len(mine))


def sum_over_ranks(values: torch.Tensor, copies: int = 1) -> None:
    """Replace ``values`` by their sum over all ranks, where there are several.

    Args:
        values: on the device that the ranks communicate on.
        copies: ranks that each hold the same values, of which one is to count; then ``values`` are no integers.
    """
    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    if copies > 1:
        values /= copies


def check_equal_counts(count: int, what: str, device: torch.device) -> None:
    """Refuse, on every rank alike, work that would leave ranks waiting for each other for ever.

    Args:
        count: what this rank has.
        what: is counted, for the message: "passes over ...".
        device: that the process group's backend works on.

    Raises:
        UserError: the ranks' counts differ.
    """
    world = rank_and_world()[1]
    if world == 1:
        return
    gathered = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(gathered, torch.tensor([count], dtype=torch.int64, device=device))
    counts = [int(each) for each in gathered]
    if len(set(counts)) > 1:
        raise UserError(
            f"influence: expected equally many {what} on each rank, found {counts}, by rank. Give every rank batches "
            "alike in number and kind."
        )
