"""How the sources' gradients lie to each other: norms, products and the spread over samples.

Of ``n`` samples of each of ``K`` sources, one Gram matrix ``<G_i, G_j>`` of the gradients of their summed losses says
it all; no gradient is ever formed (:func:`~cheapertraining.influence.scorers.hook.hook_gram`), but where tensor
parallelism cuts the layers (:mod:`~cheapertraining.influence.scorers.gram_along`). With ``t_i`` tokens,
``T_k`` those of source ``k``, its mean gradient is the ratio ``g_k = sum_i G_i / T_k`` with residuals ``r_i = G_i - t_i
g_k``, and

    products[k, l]    = <g_k, g_l>
    variances[k]      = n**2 / (n - 1) * sum_i |r_i|**2 / T_k**2    of one sample's gradient, over all parameters
    squared_norms[k]  = |g_k|**2 - variances[k] / n                         without the bias of a finite sample
    errors[k, l]**2   = n / (n - 1) * (sum_i <r_i, g_l>**2 / T_k**2 + sum_j <g_k, r_j>**2 / T_l**2),   k != l
    errors[k, k]**2   = n / (n - 1) * 4 * sum_i <r_i, g_k>**2 / T_k**2

With probes, their samples are rows of the same matrix, and ``target_products[k] = <g_k, g_T>`` with ``g_T`` the
weighted mean of the gradients of the probes' token-mean losses.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import no_trace, to_device
from cheapertraining.influence.parameters import Layers, select_parameters
from cheapertraining.influence.probes import ProbeBank
from cheapertraining.influence.ranks import rank_rows, sum_over_ranks
from cheapertraining.influence.scorers.gram_along import gram_along
from cheapertraining.influence.scorers.hook import hook_gram
from cheapertraining.influence.sharding import sample_copies

__all__ = ["GradientEstimator", "SourceGradients", "moments_of", "target_products_of"]

Float64 = NDArray[np.float64]
_SEEDS = 1 << 31  # Keys are 64 bits wide: the seed above, the update below.
_SAMPLES_OF_HALVES = 4  # of a source: a half needs two for its variance.
_MODEL_INPUTS = ("input_ids", "labels", "position_ids")


@dataclass(frozen=True)
class SourceGradients:
    """Moments of the gradients of ``K`` sources' token-mean losses; the same numbers on every rank.

    Attributes:
        sources: names, ``[K]``.
        products: ``[K, K]``, of the sampled mean gradients.
        errors: ``[K, K]``, standard errors of ``products`` over the samples.
        squared_norms: ``[K]``, of the mean gradients, without bias; may come out below 0 for that.
        variances: ``[K]``, of one sample's gradient, summed over the parameters.
        samples: of each source.
        seconds: wall time that the measurement took on this rank.
        target_products: ``[K]``, of the sampled mean gradients with that of the probes' weighted loss; None where no
            probes were measured.
        halves: the same of every other sample of each source and probe, and of those between; where there are probes
            and at least two samples of each source for both.
    """

    sources: tuple[str, ...]
    products: Float64
    errors: Float64
    squared_norms: Float64
    variances: Float64
    samples: int
    seconds: float
    target_products: Float64 | None = None
    halves: tuple[SourceGradients, ...] = ()


class SampleSource(Protocol):
    """Where samples of each source are drawn from, off the training order."""

    @property
    def source_names(self) -> tuple[str, ...]: ...

    def draw(self, source: str, n: int, key: int) -> dict[str, torch.Tensor]: ...


class GradientEstimator:
    """Measures :class:`SourceGradients` on samples off the training order.

    Samples are taken in blocks of half a microbatch, and all pairs of blocks are spread over the ranks: for ``N``
    samples in all, ``N**2 / microbatch_size`` rows go through a forward and a backward pass without weight gradients,
    or ``N`` where they fit into one microbatch.

    Args:
        mixture: gives ``source_names`` and ``draw``.
        source_samples: samples of each source in a measurement, over all ranks; at least 2.
        seed: of the samples drawn.
        layers: which parameters count, see :data:`~cheapertraining.influence.parameters.Layers`.
        probes: measured as well where given, with their own number of samples and weights.

    Raises:
        UserError: too few samples.
    """

    def __init__(
        self,
        mixture: SampleSource,
        source_samples: int = 4,
        seed: int = 0,
        layers: Layers = "all",
        probes: ProbeBank | None = None,
    ) -> None:
        if source_samples < 2:
            raise UserError(f"source_samples: expected at least 2 (one has no variance), found {source_samples}.")
        self.mixture = mixture
        self.source_samples = source_samples
        self.seed = seed
        self.layers = layers
        self.probes = probes

    def measure(self, model: nn.Module, *, update_index: int, microbatch_size: int | None = None) -> SourceGradients:
        """Measure now. Call it on all ranks with the same ``update_index``, between optimizer steps.

        Args:
            model: of layers that the hook scorer knows.
            update_index: number of the measurement; says which samples are used.
            microbatch_size: samples in a pass; default all.

        Raises:
            UserError: a compiled model, layers of an unknown kind, gradients that are not finite.
        """
        started = time.perf_counter()
        names, n = tuple(self.mixture.source_names), self.source_samples
        key = (self.seed % _SEEDS << 32) + update_index
        drawn = [self.mixture.draw(name, n, key) for name in names]
        probed = [] if self.probes is None else self._probe_batches(self.probes, update_index)
        batches = [*drawn, *(batch for batch, _ in probed)]
        inputs = [name for name in _MODEL_INPUTS if all(name in batch for batch in batches)]
        rows = {name: torch.cat([batch[name] for batch in batches]) for name in inputs}
        tokens = (rows["labels"][:, 1:] != IGNORED).sum(dim=1).double().cpu().numpy()
        sizes = [n] * len(names) + [len(batch["labels"]) for batch, _ in probed]
        blocks = np.split(np.arange(len(tokens)), np.cumsum(sizes)[:-1])
        halved = bool(probed) and n >= _SAMPLES_OF_HALVES and min(sizes) >= 2
        parts = [[block[start::2][: len(block) // 2] for block in blocks] for start in range(2)] if halved else []
        gram, squares = _products(model, rows, microbatch_size, self.layers, blocks, parts)
        weights, seconds = [weight for _, weight in probed], time.perf_counter() - started
        whole, *halves = (_moments(names, gram, squares, tokens, part, weights, seconds) for part in (blocks, *parts))
        return dataclasses.replace(whole, halves=tuple(halves))

    @staticmethod
    def _probe_batches(bank: ProbeBank, update_index: int) -> list[tuple[Mapping[str, torch.Tensor], float]]:
        return [(bank.batch(name, bank.window(name, update_index)), weight) for name, weight in bank.weights.items()]


def _products(
    model: nn.Module,
    rows: Mapping[str, torch.Tensor],
    microbatch_size: int | None,
    layers: Layers,
    blocks: Sequence[NDArray[np.int64]],
    parts: Sequence[Sequence[NDArray[np.int64]]],
) -> tuple[Float64, Float64]:
    """``<G_i, G_j>`` of all rows, float64 ``[N, N]``, right at least in sums over the columns of a block or of a part
    of one, and ``|G_i|**2``; the same on all ranks."""
    if sample_copies(model) == 1:
        gram = _sample_gram(model, rows, microbatch_size, layers)
        return gram, np.diag(gram)
    groups: list[NDArray[np.int64]] = []
    for number, block in enumerate(blocks):
        taken = [part[number] for part in parts]
        left = np.setdiff1d(block, np.concatenate(taken)) if taken else block
        groups += [group for group in (*taken, left) if len(group)]
    with no_trace(model):
        return gram_along(model, select_parameters(model, layers), rows, groups, microbatch_size)


def _moments(
    names: tuple[str, ...],
    gram: Float64,
    squares: Float64,
    tokens: Float64,
    blocks: Sequence[NDArray[np.int64]],
    weights: Sequence[float],
    seconds: float,
) -> SourceGradients:
    """Of some of the rows: ``blocks`` has those of each source, then those of each probe, with ``weights``."""
    count = len(names)
    rows = np.concatenate(blocks[:count])
    by_source = tokens[rows].reshape(count, -1)
    products, errors, norms, variances = moments_of(gram[np.ix_(rows, rows)], by_source, squares[rows])
    target = None
    if weights:
        probes = blocks[count:]
        across = gram[np.ix_(rows, np.concatenate(probes))]
        target = target_products_of(across, by_source, [tokens[block] for block in probes], weights)
    return SourceGradients(names, products, errors, norms, variances, by_source.shape[1], seconds, target)


def target_products_of(
    gram: Float64, tokens: Float64, probe_tokens: Sequence[Float64], weights: Sequence[float]
) -> Float64:
    """``target_products`` of the module's formulas, ``[K]``.

    Args:
        gram: ``[K * n, M]``, products of the gradients of the summed losses of the sources' samples and the probes'.
        tokens: ``[K, n]``, loss-counting tokens of each sample of a source.
        probe_tokens: the same of each probe, ``M`` in all.
        weights: of the probes, sum 1.
    """
    share = [
        np.full(len(counts), weight / max(counts.sum(), 1.0))
        for counts, weight in zip(probe_tokens, weights, strict=True)
    ]
    along = (gram @ np.concatenate(share)).reshape(tokens.shape)
    found: Float64 = along.sum(axis=1) / np.maximum(tokens.sum(axis=1), 1.0)
    return found


def _sample_gram(
    model: nn.Module, rows: Mapping[str, torch.Tensor], microbatch_size: int | None, layers: Layers
) -> Float64:
    """``<G_i, G_j>`` of all rows, float64 ``[N, N]``, the same on all ranks."""
    parameters = select_parameters(model, layers)
    device = next(iter(parameters.values())).device
    count = len(rows["labels"])
    size = max(1, (microbatch_size or count) // 2)
    if microbatch_size is None or count <= microbatch_size:
        blocks = [list(range(count))]
        pairs: list[tuple[int, ...]] = [(0,)]
    else:
        blocks = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        pairs = list(itertools.combinations(range(len(blocks)), 2))
    table = torch.zeros(2, count, count, dtype=torch.float64, device=device)  # Sums, and how often each was added.
    with no_trace(model):
        for place, counts in rank_rows(len(pairs)):
            chosen = torch.tensor([row for block in pairs[place] for row in blocks[block]])
            batch = to_device({name: part[chosen.to(part.device)] for name, part in rows.items()}, device)
            gram = hook_gram(model, parameters, batch).to(device)
            at = chosen.to(device)
            table[0][at[:, None], at] += counts * gram
            table[1][at[:, None], at] += counts
    sum_over_ranks(table)
    found: Float64 = (table[0] / table[1]).cpu().numpy()
    return found


def moments_of(
    gram: Float64, tokens: Float64, squares: Float64 | None = None
) -> tuple[Float64, Float64, Float64, Float64]:
    """``products``, ``errors``, ``squared_norms`` and ``variances`` of the module's formulas.

    Args:
        gram: ``[K * n, K * n]``, products of the gradients of the samples' summed losses, source by source; only sums
            over the columns of a source matter.
        tokens: ``[K, n]``, loss-counting tokens of each sample.
        squares: ``[K * n]``, squared norms of the gradients; default the diagonal of ``gram``.
    """
    squares = np.diag(gram) if squares is None else squares
    count, n = tokens.shape
    total = np.maximum(tokens.sum(axis=1), 1.0)
    by_source = gram.reshape(count, n, count, n)
    # <G_i, g_l> of sample i of source k: [K, n, K]; then the same of the residuals.
    along = by_source.sum(axis=3) / total
    products: Float64 = along.sum(axis=1) / total[:, None]
    residuals = along - tokens[:, :, None] * products[:, None, :]
    own = np.arange(count)
    spread = squares.reshape(count, n) - 2 * tokens * along[own, :, own] + tokens**2 * np.diag(products)[:, None]
    variances: Float64 = n**2 / (n - 1) * np.maximum(spread, 0.0).sum(axis=1) / total**2
    one_side = n / (n - 1) * (residuals**2).sum(axis=1) / total[:, None] ** 2
    errors: Float64 = np.sqrt(one_side + one_side.T)
    errors[own, own] = np.sqrt(4 * np.diag(one_side))
    # Where products are measured along one side's gradient, the other side's differs by the error of measurement.
    return (products + products.T) / 2, errors, np.diag(products) - variances / n, variances
