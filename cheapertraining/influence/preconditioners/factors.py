"""Kronecker factors: what of a backward pass they are summed up from, and their eigenbases.

A matrix's gradient of one unit is ``G_i = sum_t left_t right_t^T``, in the shape that the parameter is stored in: of a
linear layer, ``left`` is the gradient of what comes out and ``right`` what goes in. Its block of the Fisher matrix,
``E_i[vec(G_i) vec(G_i)^T]``, is taken for ``left (x) right`` with

    left  = sum_t left_t left_t^T,    right = sum_t right_t right_t^T,    block = left (x) right / (tokens * units)

as if tokens were independent (Martens & Grosse, 1503.05671). A matrix with several sites ``s`` (a tied embedding) has a
sum of such products, replaced by the one product with the same partial traces:

    left = sum_s tr(right_s) left_s,    right = sum_s tr(left_s) right_s,    over sum_s tr(left_s) tr(right_s)

Only tokens up to the last one of their document that a loss counts for are summed over: padding would be in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cheapertraining.influence.aggregation import By, unit_index, units_with_loss
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.ranks import rank_and_world, sum_over_ranks
from cheapertraining.influence.scorers.units import Factors, Units, blocks, wide

__all__ = ["Basis", "Observer", "Sums", "decompose", "live_tokens", "rotate", "transferred"]

Batch = Mapping[str, torch.Tensor]


class Sums:
    """Named sums over what was observed, and how much that was.

    ``left/<parameter>/<site>``, ``right/...``: factors, or their diagonals; ``squares/<parameter>``: squared entries of
    the units' gradients (of a matrix, in its eigenbasis). ``tokens``, ``units``: behind the factors; ``corrected``,
    ``vectors``: units behind the squares of matrices, of vectors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.tensors = dict(tensors or {})

    def add(self, key: str, value: torch.Tensor) -> None:
        """Add to a sum, which is kept on the device and in the dtype of what came first."""
        self.tensors[key] = self.tensors[key] + value if key in self.tensors else value

    def merge(self, other: Sums, decay: float = 1.0) -> None:
        """Add all of another's sums to what is left of these after ``decay``."""
        for tensor in self.tensors.values():
            tensor.mul_(decay)
        for key, value in other.tensors.items():
            self.add(key, value)

    def count(self, key: str) -> float:
        """A number among the sums; 0 where there is none."""
        return float(self.tensors[key]) if key in self.tensors else 0.0

    def over_ranks(self, *without: str) -> Sums:
        """Means of the sums over all ranks: quotients of two of them are those of the whole. A collective call.

        Args:
            without: beginnings of keys that are left out.
        """
        kept = [key for key in sorted(self.tensors) if not key.startswith(without)]
        means = Sums({key: self.tensors[key].clone() for key in kept})
        for tensor in means.tensors.values():
            sum_over_ranks(tensor)
            tensor.div_(rank_and_world()[1])
        return means

    def sites(self, side: str, name: str) -> list[torch.Tensor]:
        """A parameter's factors of one side, by site."""
        keys = [key for key in self.tensors if key.startswith(f"{side}/{name}/")]
        return [self.tensors[key] for key in sorted(keys)]

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity got in."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors.values())


@dataclass(frozen=True)
class Basis:
    """Eigenvectors (columns) and eigenvalues of the two factors of a matrix ``[R, C]``.

    Attributes:
        left: ``[R, R]``; None for a diagonal factor, whose eigenvectors are the axes.
        right: ``[C, C]``, likewise.
        left_values: ``[R]``, together with the next scaled so that their outer product is K-FAC's Fisher matrix.
        right_values: ``[C]``.
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    left_values: torch.Tensor
    right_values: torch.Tensor

    def to(self, like: torch.Tensor) -> Basis:
        """On the device and in the dtype of a tensor."""
        parts = (self.left, self.right, self.left_values, self.right_values)
        left, right, left_values, right_values = (None if part is None else part.to(like) for part in parts)
        assert left_values is not None
        assert right_values is not None
        return Basis(left, right, left_values, right_values)


def decompose(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], tokens: float, units: float) -> Basis:
    """The eigenbasis of one matrix's factors, in float64 on the CPU.

    Args:
        left: by site, ``[R, R]`` or diagonals ``[R]``.
        right: by site, ``[C, C]`` or diagonals ``[C]``.
        tokens: behind the factors.
        units: that the tokens belong to.
    """
    lefts, rights = ([factor.double().cpu() for factor in side] for side in (left, right))
    traces = [(_trace(a), _trace(b)) for a, b in zip(lefts, rights, strict=True)]
    whole_left = torch.stack([b * factor for factor, (_, b) in zip(lefts, traces, strict=True)]).sum(0)
    whole_right = torch.stack([a * factor for factor, (a, _) in zip(rights, traces, strict=True)]).sum(0)
    scale = sum(a * b for a, b in traces) * tokens * units
    left_vectors, left_values = _eigen(whole_left)
    right_vectors, right_values = _eigen(whole_right)
    return Basis(left_vectors, right_vectors, left_values / (scale or 1.0), right_values)


def _trace(factor: torch.Tensor) -> float:
    return float(factor.sum() if factor.dim() == 1 else factor.trace())


def _eigen(factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    if factor.dim() == 1:
        return None, factor
    values, vectors = torch.linalg.eigh(factor)
    return vectors, values.clamp_min(0)


def rotate(basis: Basis, matrices: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """``left^T M right`` of each matrix ``[K, R, C]``; or ``left M right^T``, the way back."""
    if basis.left is not None:
        matrices = (basis.left if back else basis.left.t()) @ matrices
    if basis.right is not None:
        matrices = matrices @ (basis.right.t() if back else basis.right)
    return matrices


def transferred(squares: torch.Tensor, old: Basis, new: Basis) -> torch.Tensor:
    """Squares ``[R, C]`` known in one basis, in another: those of ``old``'s own model of the Fisher matrix."""
    for before, after, side in ((old.left, new.left, 0), (old.right, new.right, 1)):
        if before is not None and after is not None:
            overlap = (after.t() @ before).square()
            squares = overlap @ squares if side == 0 else squares @ overlap.t()
    return squares


class Observer:
    """Sums up factors, squares of gradients, or both, of some rows of a batch.

    Args:
        sums: that are added to.
        vocabularies: rows of the matrices that are embeddings, by name.
        batch: that passes by.
        by: what a unit is.
        bases: by matrix, to take the squares in; none to leave squares of matrices out.
        factors: whether factors are summed up.
        max_dim: sides above it have a diagonal factor.
        rows: of the batch, that matrices are looked at with.
        scale: of the losses in the pass; it is taken out again.
    """

    additive = False

    def __init__(
        self,
        sums: Sums,
        vocabularies: Mapping[str, int],
        batch: Batch,
        by: By,
        *,
        bases: Mapping[str, Basis],
        factors: bool,
        max_dim: int,
        rows: slice = slice(None),
        scale: float = 1.0,
    ) -> None:
        self._sums, self._vocabularies, self._bases, self._factors = sums, vocabularies, bases, factors
        self._max_dim, self._rows, self._scale = max_dim, rows, scale
        self._shape = tuple(batch["labels"].shape)
        picked = {key: batch[key][rows] for key in ("labels", "position_ids") if key in batch}
        device = picked["labels"].device
        self._units = Units(picked, by, device)
        live = live_tokens(picked).reshape(-1)
        self._live = None if bool(live.all()) else live.nonzero().squeeze(1)
        matrix_units = int(units_with_loss(picked, by).sum())
        if factors:
            self._add_count("tokens", int(live.sum()))
            self._add_count("units", matrix_units)
        if bases:
            self._add_count("corrected", matrix_units)
        self._add_count("vectors", int(units_with_loss(batch, by).sum()))

    def merges(self, name: str, units: Units) -> bool:
        """See :class:`~cheapertraining.influence.scorers.backward.Consumer`."""
        return False

    def matrix(self, name: str, factors: Sequence[Factors], units: Units, gradient: torch.Tensor | None) -> None:
        """See :class:`~cheapertraining.influence.scorers.backward.Consumer`."""
        picked = [Factors(self._pick(each.left), self._pick(each.right)) for each in factors]
        if self._factors:
            rows, columns = self._shape_of(name, picked)
            sparse = any(each.one_hot for each in picked)
            for site, each in enumerate(picked):
                left, right = self._kept(each.left), self._kept(each.right)
                of_left = (
                    torch.bincount(left, minlength=rows).to(right.dtype)
                    if each.one_hot
                    else _second_moment(left, diagonal=sparse or rows > self._max_dim)
                )
                self._sums.add(f"left/{name}/{site}", of_left / self._scale)
                of_right = _second_moment(right, diagonal=columns > self._max_dim)
                self._sums.add(f"right/{name}/{site}", of_right / self._scale)
        if name in self._bases:
            self._sums.add(f"squares/{name}", self._squares(name, picked) / self._scale**2)

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """See :class:`~cheapertraining.influence.scorers.backward.Consumer`."""
        self._sums.add(f"squares/{name}", gradients.square().sum(0) / self._scale**2)

    def _squares(self, name: str, factors: Sequence[Factors]) -> torch.Tensor:
        basis, shape = self._bases[name], self._shape_of(name, factors)
        projected = [
            Factors(
                each.left if each.one_hot or basis.left is None else each.left @ basis.left,
                each.right if basis.right is None else each.right @ basis.right,
            )
            for each in factors
        ]
        squares = projected[0].right.new_zeros(shape)
        if all(each.one_hot for each in projected):
            return _squares_of_rows(projected, self._units, squares)
        for rows, block in blocks(projected, self._units, shape):
            squares[rows] += block.square_().sum(0)
        return squares

    def _shape_of(self, name: str, factors: Sequence[Factors]) -> torch.Size:
        dense = [each.left.shape[1] for each in factors if not each.one_hot]
        return torch.Size((dense[0] if dense else self._vocabularies[name], factors[0].right.shape[1]))

    def _pick(self, tensor: torch.Tensor) -> torch.Tensor:
        inner = tensor.shape[1:]
        picked = tensor.view(*self._shape, *inner)[self._rows].reshape(-1, *inner)
        return wide(picked) if picked.is_floating_point() else picked

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._live is None else tensor[self._live]

    def _add_count(self, key: str, value: int) -> None:
        device = self._units.of_tokens().device
        self._sums.add(key, torch.tensor(float(value), dtype=torch.float64, device=device))


def _second_moment(vectors: torch.Tensor, *, diagonal: bool) -> torch.Tensor:
    return vectors.square().sum(0) if diagonal else vectors.t() @ vectors


def _squares_of_rows(factors: Sequence[Factors], units: Units, squares: torch.Tensor) -> torch.Tensor:
    """Squares of an embedding's gradients, of which a unit has as many rows as it has different tokens."""
    tokens = torch.cat([each.left for each in factors])
    right = torch.cat([each.right for each in factors])
    keys, places = torch.unique(units.of_tokens().repeat(len(factors)) * len(squares) + tokens, return_inverse=True)
    rows = right.new_zeros(len(keys), right.shape[1]).index_add_(0, places, right)
    return squares.index_add_(0, keys % len(squares), rows.square_())


def live_tokens(batch: Batch) -> torch.Tensor:
    """bool ``[B, S]``: whether a token can have a part in any loss, that of the last one of its document to count."""
    counted = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted[:, :-1] = batch["labels"][:, 1:] != IGNORED
    documents, count = unit_index(batch, "document" if "position_ids" in batch else "sample")
    order = torch.arange(counted.numel(), device=counted.device).view(counted.shape)
    last = torch.full((count,), -1, device=counted.device)
    last.scatter_reduce_(0, documents.reshape(-1), torch.where(counted, order, -1).reshape(-1), "amax")
    return order <= last[documents]
