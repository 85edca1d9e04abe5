"""Tokens laid out by unit, and the gradient of a weight matrix, unit by unit, in blocks that fit into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cheapertraining.influence.aggregation import By, unit_index

__all__ = ["Factors", "Units", "blocks", "wide"]

# Larger blocks make better matrix products, smaller ones are read again from the cache.
_CPU_BLOCK, _CUDA_BLOCK = 4 << 20, 256 << 20


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in its own float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Units:
    """Which unit (sample or document) each token of one batch belongs to.

    Attributes:
        count: of units, ``N``.
        shape: ``(B, S)`` of the batch.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], by: By, device: torch.device) -> None:
        index, self.count = unit_index(batch, by)
        self.shape = (int(index.shape[0]), int(index.shape[1]))
        self._index = index.reshape(-1).to(device)
        self.bounds: list[int] | None = None
        if by == "document":
            lengths = torch.bincount(self._index, minlength=self.count)
            self.bounds = [0, *lengths.cumsum(0).tolist()]
        self._scratch: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """All tokens of the batch, ``B * S``."""
        return self.shape[0] * self.shape[1]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``[B * S, ...]`` summed over the tokens of each unit: ``[N, ...]``, at least float32."""
        if self.bounds is None:
            dtype = torch.promote_types(values.dtype, torch.float32)
            return values.view(*self.shape, *values.shape[1:]).sum(1, dtype=dtype)
        values = wide(values)
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self._index, values)

    def sum_counts(self, counted: torch.Tensor) -> torch.Tensor:
        """Loss-counting tokens of each unit, int64 ``[N]``, from bool ``[B, S]``."""
        counts = counted.reshape(-1).long()
        return torch.zeros(self.count, dtype=torch.int64, device=counts.device).index_add_(0, self._index, counts)

    def scratch(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        """Memory to write to, the same at each call: what is fetched from the system anew costs as much as it holds."""
        held = self._scratch
        if held is None or len(held) < elements or held.dtype != like.dtype:
            held = self._scratch = like.new_empty(elements)
        return held[:elements]

    def of_tokens(self) -> torch.Tensor:
        """int64 ``[B * S]``."""
        return self._index


@dataclass(frozen=True)
class Factors:
    """What one site gives for one matrix ``[R, C]``: its gradient for a unit is ``sum_t left_t right_t^T``.

    Attributes:
        left: ``[B * S, R]``; or int64 ``[B * S]``, indices of one-hot rows (embeddings).
        right: ``[B * S, C]``.
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def one_hot(self) -> bool:
        """Whether ``left`` holds indices."""
        return self.left.dim() == 1

    def products(self, units: Units, rows: slice, out: torch.Tensor, *, first: bool) -> None:
        """Write the units' gradients of some rows to ``out`` ``[N, r, C]``, or add them where not ``first``."""
        if self.one_hot:
            if first:
                out.zero_()
            self._scatter(units, rows, out)
        elif units.bounds is None:
            left = self.left.view(*units.shape, -1)[:, :, rows].transpose(1, 2)
            right = self.right.view(*units.shape, -1)
            torch.baddbmm(out, left, right, beta=0 if first else 1, out=out)
        else:
            for unit, (start, stop) in enumerate(zip(units.bounds, units.bounds[1:], strict=False)):
                left, target = self.left[start:stop, rows].t(), out[unit]
                torch.addmm(target, left, self.right[start:stop], beta=0 if first else 1, out=target)

    def _scatter(self, units: Units, rows: slice, out: torch.Tensor) -> None:
        here = (self.left >= rows.start) & (self.left < rows.stop)
        place = units.of_tokens()[here] * (rows.stop - rows.start) + self.left[here] - rows.start
        out.view(-1, out.shape[-1]).index_add_(0, place, self.right[here].to(out.dtype))


def blocks(
    factors: Sequence[Factors], units: Units, shape: torch.Size, gradient: torch.Tensor | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Per-unit gradients of a matrix, a few of its rows at a time.

    Args:
        factors: of every site of the matrix.
        units: of the batch.
        shape: ``(R, C)`` of the matrix.
        gradient: where to write the sum over the units, ``[R, C]``.

    Yields:
        the rows, and ``[N, r, C]``, overwritten by the next and by any other use of the units' scratch memory.
    """
    dense = next((f.left for f in factors if not f.one_hot), factors[0].right)
    limit = _CUDA_BLOCK if dense.is_cuda else _CPU_BLOCK
    step = max(1, min(shape[0], limit // (units.count * shape[1] * dense.element_size())))
    ones = dense.new_ones(units.count)
    buffer = units.scratch(units.count * step * shape[1], dense)
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        block = buffer[: units.count * (rows.stop - start) * shape[1]].view(units.count, rows.stop - start, shape[1])
        for place, part in enumerate(factors):
            part.products(units, rows, block, first=place == 0)
        if gradient is not None:
            # A sum over the units, twice as fast as `sum`.
            torch.mv(block.view(units.count, -1).t(), ones, out=gradient[rows].view(-1))
        yield rows, block
