"""Ranks that were started with different yamls or packages are told apart before they hang or train nonsense, and what
one rank alone finds wrong ends all of them."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import torch.distributed as dist

from cheapertraining.errors import UserError

__all__ = ["check_alike", "failing_together", "versions"]


def versions() -> dict[str, str]:
    """Versions of what ranks must have alike."""
    packages = ("cheapertraining", "torch", "mosaicml", "transformers", "mosaicml-streaming")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def check_alike(mine: Mapping[str, str]) -> None:
    """Compare what each rank says with what rank 0 says; a collective call where there are several ranks.

    Args:
        mine: what must be alike, by name; a text of several lines is compared line by line.

    Raises:
        UserError: on all ranks: the first rank that differs, in what, and the two values.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    told: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, dict(mine))
    for rank, theirs in enumerate(told):
        for name, first in told[0].items():
            if theirs.get(name) != first:
                here, there = _first_difference(first, theirs.get(name, ""))
                raise UserError(
                    f"ranks differ in their {name}: rank 0 has '{here}', rank {rank} has '{there}'. Start all of them "
                    "with the same files, overrides and packages."
                )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Let a UserError of one rank be raised on all of them, or the others would wait for it; a collective call at the
    end where there are several ranks.

    Raises:
        UserError: on all ranks: that of the first one that has one.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    told: list[UserError | None] = [failure]
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, failure)
    first = next((each for each in told if each is not None), None)
    if first is not None:
        raise failure or first


def _first_difference(one: str, other: str) -> tuple[str, str]:
    lines, others = one.splitlines() or [""], other.splitlines() or [""]
    pairs = zip(lines + [""] * len(others), others + [""] * len(lines), strict=False)
    return next((a.strip(), b.strip()) for a, b in pairs if a != b)
