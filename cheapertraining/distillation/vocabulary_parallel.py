"""What a loss over the vocabulary does with a row of logits, where they are whole and where ranks hold a part each.

Every divergence is a sum over tokens, so that a rank's part of it needs from the others only what normalises the row:
its largest logit and the sum of exponentials (Megatron-LM, arXiv 1909.08053, section 3); the parts are then added up.
The gradient of this rank's logits takes the same few numbers a row and nothing else. Arguments are rows ``[n, V]``, or
``[n, V / N]`` on each of ``N`` ranks; nothing here has a graph.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cheapertraining.distillation.divergences import FLOOR, log_softmax

__all__ = ["WHOLE", "Vocabulary", "VocabularyPart"]


class Vocabulary:
    """The whole of it, on this rank."""

    ranks = 1
    """That it is divided over."""

    def largest(self, logits: Tensor) -> Tensor:
        """Of each row, ``[n, 1]``."""
        return logits.amax(dim=-1, keepdim=True)

    def sums(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over the ranks of ``[n, k]`` each, with any ``k``."""
        return parts

    def log_softmax(self, logits: Tensor) -> Tensor:
        """As :func:`~cheapertraining.distillation.divergences.log_softmax`, of all tokens."""
        return log_softmax(logits)

    def take(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Those of tokens ``[n, k]`` that this rank holds, 0 of the others: a summand for :meth:`sums`."""
        return logits.gather(1, ids)

    def put(self, logits: Tensor, ids: Tensor, values: Tensor | float) -> None:
        """Overwrite those of distinct tokens ``[n, k]`` by ``[n, k]`` or one number, where they are held."""
        if isinstance(values, Tensor):
            logits.scatter_(1, ids, values)
        else:
            logits.scatter_(1, ids, values)

    def add(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add ``[n, k]`` to those of tokens ``[n, k]``, which may repeat, where they are held."""
        logits.scatter_add_(1, ids, values)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Tokens of the largest logits, int64 ``[n]``."""
        return logits.argmax(dim=-1)


class VocabularyPart(Vocabulary):
    """Equal parts of it on the ranks of a group, in their order; every call that needs the others is collective.

    Args:
        group: the ranks.
        width: how many tokens each holds.
    """

    def __init__(self, group: dist.ProcessGroup, width: int) -> None:
        self.group, self.width = group, width
        self.ranks = group.size()
        self.first = dist.get_rank(group) * width

    def largest(self, logits: Tensor) -> Tensor:
        top = logits.amax(dim=-1, keepdim=True)
        # Not every backend's maximum hands NaN on, and ranks that differ about it would wait for one another.
        top = torch.where(top.isnan(), torch.inf, top)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return top

    def sums(self, *parts: Tensor) -> tuple[Tensor, ...]:
        together = torch.cat(parts, dim=1)
        dist.all_reduce(together, group=self.group)
        return torch.split(together, [part.shape[1] for part in parts], dim=1)

    def log_softmax(self, logits: Tensor) -> Tensor:
        shifted = logits - self.largest(logits).clamp(min=torch.finfo(logits.dtype).min)
        (total,) = self.sums(shifted.exp().sum(dim=-1, keepdim=True))
        return shifted.sub_(total.log()).clamp_(min=FLOOR)

    def take(self, logits: Tensor, ids: Tensor) -> Tensor:
        column, here = self._columns(ids)
        return torch.where(here, logits.gather(1, column), 0)

    def put(self, logits: Tensor, ids: Tensor, values: Tensor | float) -> None:
        column, here = self._columns(ids)
        row, entry = here.nonzero(as_tuple=True)
        logits[row, column[row, entry]] = values[row, entry] if isinstance(values, Tensor) else values

    def add(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        column, here = self._columns(ids)
        logits.scatter_add_(1, column, torch.where(here, values, 0))

    def likeliest(self, logits: Tensor) -> Tensor:
        top, column = logits.max(dim=-1)
        none = torch.iinfo(torch.int64).max
        token = torch.where(top == self.largest(logits).squeeze(1), column + self.first, none)
        dist.all_reduce(token, op=dist.ReduceOp.MIN, group=self.group)
        return token

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens stand on this rank (0 for others), and whether they do."""
        local = ids - self.first
        here = (local >= 0) & (local < self.width)
        return torch.where(here, local, 0), here


WHOLE = Vocabulary()
