"""The damped Gauss-Newton matrix itself, by products with vectors: slow references for what is faster.

``(G + damping * I)^-1 u`` with ``G = 1/n sum_i sum_t J_it^T (diag(p_it) - p_it p_it^T) J_it`` over the ``n`` units of a
set of batches, where ``J_it`` is the Jacobian of the logits, ``p_it`` their softmax, at tokens whose loss counts. For a
softmax model ``G`` is the Fisher matrix of a unit's summed loss (Martens, 1412.1193), EK-FAC's scale as well.

A product is one forward pass with forward-mode derivatives and one backward pass (Schraudolph, 2002).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from cheapertraining.errors import UserError
from cheapertraining.influence.aggregation import By, units_with_loss
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import full_precision, model_logits, no_trace
from cheapertraining.influence.parameters import Directions, canonical_name
from cheapertraining.influence.preconditioners.base import check_covered, check_same_parameters, count_units
from cheapertraining.influence.ranks import check_equal_counts, sum_over_ranks
from cheapertraining.influence.sharding import Shards

__all__ = ["GGNConjugateGradient", "LiSSA"]

Batch = Mapping[str, torch.Tensor]


class _GaussNewton:
    """Common to both: the set, and products with ``G + damping * I`` over flat vectors ``[P]``."""

    name: ClassVar[str]

    def __init__(self, parameters: Mapping[str, nn.Parameter], damping: float, by: By) -> None:
        if not damping > 0:
            raise UserError(f"{self.name}: expected a damping above 0, found {damping}.")
        self.parameters = dict(parameters)
        self.damping = damping
        self.by = by
        self._batches: list[Batch] = []
        self._units: list[int] = []

    def _fit(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        device = next(iter(self.parameters.values())).device
        count_units(self.name, batches, self.by, device)
        check_equal_counts(len(batches), f"batches for {self.name}", device)
        if Shards(model, self.parameters).sharded:
            raise UserError(
                f"{self.name}: expected whole parameters on each rank, found them sharded by FSDP, whose gathering has "
                "no forward-mode derivative. Use 'ekfac'."
            )
        self._model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        counts = torch.tensor([int(units_with_loss(batch, self.by).sum()) for batch in batches], device=device)
        sum_over_ranks(counts)
        # Batches without a token that counts on any rank add nothing. All ranks leave out the same.
        kept = [(batch, count) for batch, count in zip(batches, counts.tolist(), strict=True) if count]
        self._batches, self._units = [batch for batch, _ in kept], [count for _, count in kept]

    def _flat(self, directions: Directions) -> torch.Tensor:
        """``[K, P]``."""
        if not self._batches:
            raise UserError(f"{self.name}: expected to be fitted before it is applied. Call fit(model, batches) first.")
        check_covered(self.name, directions, {name: p.shape for name, p in self.parameters.items()})
        check_same_parameters(self.name, directions, list(self.parameters))
        return torch.cat([directions.tensors[name].flatten(1) for name in self.parameters], dim=1)

    def _unflat(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[K, P]`` to ``[K, *shape]`` by name."""
        parts = torch.split(flat, [p.numel() for p in self.parameters.values()], dim=1)
        return {name: part.view(-1, *p.shape) for part, (name, p) in zip(parts, self.parameters.items(), strict=True)}

    def _product(self, vector: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """``(G + damping * I) vector``, with ``G`` over some of the batches."""
        total = torch.zeros_like(vector)
        with no_trace(self._model), full_precision(vector.device), torch.set_grad_enabled(True):
            for place in places:
                total += self._curved(vector, self._batches[place])
        sum_over_ranks(total)
        product = total / sum(self._units[place] for place in places) + self.damping * vector
        if not bool(torch.isfinite(product).all()):
            raise UserError(
                f"{self.name}: expected finite products with the Gauss-Newton matrix, found NaN or infinity. Fit on a "
                "model whose loss is finite."
            )
        return product

    def _curved(self, vector: torch.Tensor, batch: Batch) -> torch.Tensor:
        raw = {canonical_name(name): name for name, _ in self._model.named_parameters()}
        leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        tangents = self._unflat(vector[None])
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals: dict[str, Any] = {
                raw[name]: forward_ad.make_dual(leaf, tangents[name][0].to(leaf.dtype))  # type: ignore[no-untyped-call]
                for name, leaf in leaves.items()
            }
            found = forward_ad.unpack_dual(model_logits(self._model, batch, duals))  # type: ignore[no-untyped-call]
            logits: torch.Tensor = found.primal
            slope = torch.zeros_like(logits) if found.tangent is None else found.tangent.detach()
        chances = torch.softmax(logits.detach(), -1)
        curved = chances * (slope - (chances * slope).sum(-1, keepdim=True))
        curved[:, :-1].masked_fill_((batch["labels"][:, 1:] == IGNORED)[..., None], 0)
        curved[:, -1] = 0  # predicts no label of the row
        grads = torch.autograd.grad(logits, list(leaves.values()), curved, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads]).to(vector.dtype)


class GGNConjugateGradient(_GaussNewton):
    """``(G + damping * I)^-1 u`` by conjugate gradients, one direction after another.

    Args:
        parameters: by canonical name; directions are over all of them.
        damping: ``lambda``, in the unit of ``G``.
        tolerance: of the residual's norm, relative to the direction's.
        max_iterations: for each direction; each costs a forward-mode and a backward pass over the set.
        by: what a unit is.
    """

    name: ClassVar[str] = "ggn_cg"

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        damping: float,
        tolerance: float = 1e-5,
        max_iterations: int = 200,
        by: By = "sample",
    ) -> None:
        super().__init__(parameters, damping, by)
        if not 0 < tolerance < 1 or max_iterations < 1:
            raise UserError(
                f"{self.name}: expected a tolerance between 0 and 1 and at least one iteration, found {tolerance} and "
                f"{max_iterations}."
            )
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def fit(self, model: nn.Module, batches: Sequence[Batch]) -> GGNConjugateGradient:
        """Keep the model, looked at as it is when directions are applied, and the batches of the set.

        Raises:
            UserError: no batch, only masked labels, sharded parameters.
        """
        self._fit(model, batches)
        return self

    def apply(self, directions: Directions) -> Directions:
        """See :class:`~cheapertraining.influence.preconditioners.Preconditioner`.

        Raises:
            UserError: before :meth:`fit`; directions over other parameters; no convergence.
        """
        flat = self._flat(directions)
        solved = torch.stack([self._solve(name, u) for name, u in zip(directions.names, flat, strict=True)])
        return Directions(directions.names, self._unflat(solved))

    def _solve(self, name: str, u: torch.Tensor) -> torch.Tensor:
        every = range(len(self._batches))
        solution, residual = torch.zeros_like(u), u.clone()
        step, square = residual.clone(), residual @ residual
        goal = self.tolerance**2 * float(square)
        for _ in range(self.max_iterations):
            if float(square) <= goal:
                return solution
            product = self._product(step, every)
            length = square / (step @ product)
            solution += length * step
            residual -= length * product
            before, square = square, residual @ residual
            step = residual + square / before * step
        if float(square) <= goal:
            return solution
        left = math.sqrt(float(square) / float(u @ u))
        raise UserError(
            f"{self.name}: expected direction '{name}' to be solved to {self.tolerance:g} in {self.max_iterations} "
            f"iterations, found a residual of {left:.2g}. Raise max_iterations, damping or tolerance."
        )


class LiSSA(_GaussNewton):
    """``(G + damping * I)^-1 u`` by its Neumann series, one batch a term (Agarwal et al., 1602.03943).

        r <- u + r - (G_batch r + damping * r) / scale,    H^-1 u ~ r / scale

    With one batch it goes to the solution like ``(1 - damping / scale)^terms``; with several, which take turns, it
    comes near and stays noisy. (The baseline published with DataInf has the damping's sign the other way.)

    Args:
        parameters: by canonical name; directions are over all of them.
        damping: ``lambda``, in the unit of ``G``.
        terms: of the series.
        scale: above half of the largest eigenvalue of ``G + damping * I``; by default that eigenvalue of the first
            batch, by power iteration.
        by: what a unit is.
    """

    name: ClassVar[str] = "lissa"

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        damping: float,
        terms: int = 100,
        scale: float | None = None,
        by: By = "sample",
    ) -> None:
        super().__init__(parameters, damping, by)
        if terms < 1 or (scale is not None and not scale > 0):
            raise UserError(f"{self.name}: expected terms of at least 1 and a scale above 0, found {terms}, {scale}.")
        self.terms, self.scale = terms, scale

    def fit(self, model: nn.Module, batches: Sequence[Batch]) -> LiSSA:
        """As of :class:`GGNConjugateGradient`."""
        self._fit(model, batches)
        return self

    def apply(self, directions: Directions) -> Directions:
        """See :class:`~cheapertraining.influence.preconditioners.Preconditioner`.

        Raises:
            UserError: before :meth:`fit`; directions over other parameters; a series that diverges.
        """
        flat = self._flat(directions)
        scale = self.scale or self._largest(flat)
        solved = torch.stack([self._series(u, scale) for u in flat])
        return Directions(directions.names, self._unflat(solved))

    def _series(self, u: torch.Tensor, scale: float) -> torch.Tensor:
        total = u.clone()
        bound = 2 * scale / self.damping * float(u.norm())  # The solution is at most half as long.
        for term in range(self.terms):
            total = u + total - self._product(total, [term % len(self._batches)]) / scale
            if float(total.norm()) > bound:
                raise UserError(
                    f"{self.name}: expected a series that converges, found one that grows at scale {scale:g}. Raise "
                    "scale."
                )
        return total / scale

    def _largest(self, like: torch.Tensor) -> float:
        """Largest eigenvalue of ``G + damping * I`` over the first batch, from below, within some per cent."""
        generator = torch.Generator(like.device).manual_seed(0)
        vector = torch.randn(like.shape[1], generator=generator, device=like.device, dtype=like.dtype)
        for _ in range(10):
            vector = self._product(vector / vector.norm(), [0])
        return float(vector.norm())
