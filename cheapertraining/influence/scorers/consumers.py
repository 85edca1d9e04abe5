"""What is made of the gradients of units: products with directions, Gram matrices, projections, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cheapertraining.influence.scorers.units import Factors, Units, blocks, wide

__all__ = ["Dense", "Moments", "Products", "Projected", "Projection"]

# Work for each element of a unit's gradient, in multiply-adds of a large matrix product: forming it costs its tokens;
# writing, reading and summing it cost as much as some fifteen, and each direction some four, measured on a CPU.
_FORMING, _READING = 15.0, 4.5
# Elements of what is made for some tokens at a time.
_TOKEN_BLOCK, _CACHED = 1 << 20, 1 << 16


class Products:
    """``<g_i, v_k>`` summed over all parameters: float64 ``[N, K]`` in ``scores``.

    Args:
        directions: ``[K, *shape]`` by parameter.
        units: of the batch.
    """

    additive = True

    def __init__(self, directions: Mapping[str, torch.Tensor], units: Units) -> None:
        self._directions = directions
        first = next(iter(directions.values()))
        self._count = len(first)
        self.scores = torch.zeros(units.count, self._count, dtype=torch.float64, device=first.device)

    def merges(self, name: str, units: Units) -> bool:
        """See :class:`~.backward.Consumer`."""
        return self._grouped(name, units, merged=True)

    def _grouped(self, name: str, units: Units, *, merged: bool) -> bool:
        tokens, count = units.tokens / units.count, self._count
        # Seen from the direction's side, each token costs one product with each direction.
        return tokens * count > (0 if merged else tokens) + _FORMING + _READING * count

    def matrix(self, name: str, factors: Sequence[Factors], units: Units, gradient: torch.Tensor | None) -> None:
        """See :class:`~.backward.Consumer`."""
        directions = self._directions[name]
        for part in factors:
            if part.one_hot:
                self.scores += units.sum(_gathered(part, directions))
            elif gradient is not None or self._grouped(name, units, merged=False):
                self.scores += _by_block(part, directions, units, gradient)
            else:
                self.scores += units.sum(_by_token(part, directions))

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """See :class:`~.backward.Consumer`."""
        self.scores += gradients.flatten(1) @ self._directions[name].flatten(1).t().to(gradients.dtype)


def _by_block(factors: Factors, directions: torch.Tensor, units: Units, gradient: torch.Tensor | None) -> torch.Tensor:
    # Directions before units: the product is twice as fast this way round.
    scores = directions.new_zeros(len(directions), units.count)
    for rows, block in blocks([factors], units, directions.shape[1:], gradient):
        scores.addmm_(directions[:, rows].flatten(1), wide(block).flatten(1).t().to(scores.dtype))
    return scores.t()


def _by_token(factors: Factors, directions: torch.Tensor) -> torch.Tensor:
    """``left_t^T V_k right_t`` of each token, ``[B * S, K]``."""
    scores = directions.new_empty(len(factors.right), len(directions))
    step = max(1, _TOKEN_BLOCK // directions.shape[1])
    for start in range(0, len(scores), step):
        left, right = (wide(part[start : start + step]).to(scores.dtype) for part in (factors.left, factors.right))
        for k, direction in enumerate(directions):
            torch.sum((right @ direction.t()).mul_(left), 1, out=scores[start : start + step, k])
    return scores


def _gathered(factors: Factors, directions: torch.Tensor) -> torch.Tensor:
    """``<right_t, V_k[token_t]>`` of each token, ``[B * S, K]``."""
    scores = directions.new_empty(len(factors.left), len(directions))
    step = max(1, _CACHED // directions.shape[2])
    for start in range(0, len(scores), step):
        tokens, right = factors.left[start : start + step], factors.right[start : start + step].to(scores.dtype)
        for k, direction in enumerate(directions):
            torch.sum(direction[tokens].mul_(right), 1, out=scores[start : start + step, k])
    return scores


@dataclass
class Moment:
    """What Gram matrices and DataInf need of one parameter.

    Attributes:
        products: ``[N, K]``, ``<g_i, v_k>``.
        gram: ``[N, N]``, ``<g_i, g_j>``; or its diagonal ``[N]``.
        elements: of the parameter.
    """

    products: torch.Tensor
    gram: torch.Tensor
    elements: int


class Moments:
    """Products with directions, and squared norms or Gram matrices, parameter by parameter, in ``found``.

    Args:
        directions: ``[K, *shape]`` by parameter; K may be 0.
        gram: whole matrices, not only their diagonals.
    """

    additive = False

    def __init__(self, directions: Mapping[str, torch.Tensor], *, gram: bool) -> None:
        self._directions, self._gram = directions, gram
        self.found: dict[str, Moment] = {}

    def merges(self, name: str, units: Units) -> bool:
        """See :class:`~.backward.Consumer`."""
        return True

    def matrix(self, name: str, factors: Sequence[Factors], units: Units, gradient: torch.Tensor | None) -> None:
        """See :class:`~.backward.Consumer`."""
        directions = self._directions[name]
        elements = directions[0].numel() if len(directions) else directions.shape[1:].numel()
        if all(part.one_hot for part in factors):
            factors, directions = _compact(factors, directions)
        products = directions.new_zeros(len(directions), units.count)
        gram = directions.new_zeros((units.count, units.count) if self._gram else (units.count,))
        for rows, block in blocks(factors, units, directions.shape[1:], gradient):
            flat = wide(block).flatten(1).to(products.dtype)
            if len(directions):
                products.addmm_(directions[:, rows].flatten(1), flat.t())
            if self._gram:
                gram.addmm_(flat, flat.t())
            else:
                gram += torch.linalg.vecdot(flat, flat)
        self.found[name] = Moment(products.t(), gram, elements)

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """See :class:`~.backward.Consumer`."""
        directions = self._directions[name]
        flat = gradients.flatten(1).to(directions.dtype)
        gram = flat @ flat.t() if self._gram else (flat * flat).sum(1)
        self.found[name] = Moment(flat @ directions.flatten(1).t(), gram, flat.shape[1])


def _compact(factors: Sequence[Factors], directions: torch.Tensor) -> tuple[list[Factors], torch.Tensor]:
    """An embedding's gradient is zero but for the rows of the tokens that occur: keep these."""
    rows, places = torch.unique(torch.cat([part.left for part in factors]), return_inverse=True)
    split = places.split([len(part.left) for part in factors])
    kept = [Factors(place, part.right) for place, part in zip(split, factors, strict=True)]
    return kept, directions[:, rows]


class Dense:
    """Hands the gradients of all units to ``consume(name, [N, *shape])``, one parameter at a time."""

    additive = False

    def __init__(self, shapes: Mapping[str, torch.Size], consume: Callable[[str, torch.Tensor], None]) -> None:
        self._shapes, self._consume = shapes, consume

    def merges(self, name: str, units: Units) -> bool:
        """See :class:`~.backward.Consumer`."""
        return False

    def matrix(self, name: str, factors: Sequence[Factors], units: Units, gradient: torch.Tensor | None) -> None:
        """See :class:`~.backward.Consumer`."""
        shape = self._shapes[name]
        parts = [Factors(part.left if part.one_hot else wide(part.left), wide(part.right)) for part in factors]
        whole = parts[0].right.new_empty(units.count, *shape)
        for place, part in enumerate(parts):
            part.products(units, slice(0, shape[0]), whole, first=place == 0)
        self._consume(name, whole)

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """See :class:`~.backward.Consumer`."""
        self._consume(name, gradients)


@dataclass(frozen=True)
class Projection:
    """Two small matrices for each matrix parameter, which keep a gradient ``G [R, C]`` as ``left G right^T``.

    LoGra's projection (Choe et al., 2405.13954): of the gradients' norms and products it keeps the expectation, as
    all entries are independent, normal, of variance ``1 / rank``.

    Attributes:
        left: ``[rank, R]`` by parameter.
        right: ``[rank, C]`` by parameter.
    """

    left: dict[str, torch.Tensor]
    right: dict[str, torch.Tensor]

    @classmethod
    def random(cls, parameters: Mapping[str, torch.Tensor], rank: int, seed: int) -> Projection:
        """Draw one for the matrices among ``parameters``; the same on every machine for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        left: dict[str, torch.Tensor] = {}
        right: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            if parameter.dim() == 2:
                for side, width in ((left, parameter.shape[0]), (right, parameter.shape[1])):
                    drawn = torch.randn(rank, width, generator=generator, dtype=torch.float64) / rank**0.5
                    side[name] = drawn.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        return cls(left, right)


@dataclass
class Projected:
    """``left g_i right^T`` of each matrix, flattened: ``[N, rank * rank]`` by parameter in ``found``."""

    projection: Projection
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    additive = True

    def merges(self, name: str, units: Units) -> bool:
        """See :class:`~.backward.Consumer`."""
        return False

    def matrix(self, name: str, factors: Sequence[Factors], units: Units, gradient: torch.Tensor | None) -> None:
        """See :class:`~.backward.Consumer`."""
        onto_left, onto_right = self.projection.left[name], self.projection.right[name]
        for part in factors:
            left = onto_left.t()[part.left] if part.one_hot else wide(part.left) @ onto_left.t()
            right = wide(part.right) @ onto_right.t()
            out = right.new_empty(units.count, left.shape[1], right.shape[1])
            Factors(left, right).products(units, slice(0, left.shape[1]), out, first=True)
            self.found[name] = self.found[name] + out.flatten(1) if name in self.found else out.flatten(1)

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """Vectors are not projected."""
