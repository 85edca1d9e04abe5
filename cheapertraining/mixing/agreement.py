"""One decision for all ranks: what they draw next depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

__all__ = ["agreed"]

# Ranks compute the same numbers, but not always on the same hardware.
_AGREEMENT = 1e-6


def agreed(weights: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float] | None:
    """Return rank 0's weights on every rank, after making sure that the others came to the same.

    Args:
        weights: this rank's, by source; None where they stay as they are.
        names: the sources, in the same order on all ranks.

    Raises:
        RuntimeError: ranks differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None if weights is None else dict(weights)
    mine = [1.0, *(weights[name] for name in names)] if weights is not None else [0.0] * (len(names) + 1)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    ours = torch.tensor(mine, dtype=torch.float64, device=device)
    first = ours.clone()
    dist.broadcast(first, src=0)
    apart = (first - ours).abs().max()
    dist.all_reduce(apart, op=dist.ReduceOp.MAX)
    if not float(apart) <= _AGREEMENT:
        raise RuntimeError(
            f"mixing: ranks disagree on the new weights by up to {float(apart):.3g}, so they saw "
            "different signals: the batches of one rank would no longer fit those of another."
        )
    decided, *values = first.tolist()
    return dict(zip(names, values, strict=True)) if decided else None
