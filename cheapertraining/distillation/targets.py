"""What a teacher says about one microbatch. Row ``n`` of a sequence is about token ``n + 1``, as with logits.

``B`` sequences of ``S`` positions, ``V`` tokens in the vocabulary. What stands in rows that no loss is computed for
(:func:`~cheapertraining.distillation.losses.shifted_mask`) is never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["DenseTargets", "HiddenTargets", "OutputHead", "SampledTargets", "Targets", "TopKTargets"]


@dataclass(frozen=True)
class OutputHead:
    """The last layer of a causal LM: ``logits = cap(logit_scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, H]``; whole, not sharded.
        bias: ``[V]`` or None.
        logit_scale: factor on the logits (Cohere; Granite divides, so its inverse).
        soft_cap: ``cap(z) = soft_cap * tanh(z / soft_cap)`` (Gemma 2); None: no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """``V``, padding included."""
        return self.weight.shape[0]

    def truncated(self, vocabulary: int) -> OutputHead:
        """The head of the first ``vocabulary`` tokens, as views."""
        if vocabulary == self.vocabulary:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)

    def part(self, number: int, parts: int) -> OutputHead:
        """The head of the ``number``-th of equal parts of the vocabulary, as views."""
        bias = None if self.bias is None else self.bias.chunk(parts)[number]
        return replace(self, weight=self.weight.chunk(parts)[number], bias=bias)

    def to(self, dtype: torch.dtype) -> OutputHead:
        """The same in another dtype."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``[..., V]`` from ``[..., H]``, projected and kept in float32 (float64 stays), whatever autocast says.

        Args:
            hidden: any floating dtype.
            out: where to write them, for ``[N, H]`` without a graph; its dtype is then that of the projection.
        """
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        dtype = dtype if out is None else out.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            wide = self.to(dtype)
            if out is None:
                logits = torch.nn.functional.linear(hidden.to(dtype), wide.weight, wide.bias)
                return self._transformed(logits)
            torch.mm(hidden.to(dtype), wide.weight.T, out=out)
            if wide.bias is not None:
                out.add_(wide.bias)
            return out.copy_(self._transformed(out)) if self._transforms else out

    def backward(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """The gradient of ``hidden @ weight.T + bias`` from that of the logits (overwritten), both ``[N, V]``; the
        logits themselves are needed with a soft-cap."""
        if self.soft_cap is not None:
            assert logits is not None
            gradient.mul_(1 - (logits / self.soft_cap).square())
        return gradient.mul_(self.logit_scale) if self.logit_scale != 1.0 else gradient

    @property
    def _transforms(self) -> bool:
        return self.logit_scale != 1.0 or self.soft_cap is not None

    def _transformed(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of ``[B, S, ...]`` seen as ``[B * S, ...]``, on the index's device."""
    flat = tensor.reshape(-1, *tensor.shape[2:])
    return flat.index_select(0, index.to(flat.device)).to(index.device, non_blocking=True)


@dataclass(frozen=True)
class DenseTargets:
    """A teacher's logits.

    Attributes:
        logits: ``[B, S, V]``, any floating dtype, as its head gives them (scale and soft-cap applied).
    """

    logits: Tensor

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    def rows(self, index: Tensor) -> DenseTargets:
        """The positions ``index`` (int64 ``[N]`` into ``B * S``): logits ``[N, V]``."""
        return DenseTargets(_rows(self.logits, index))

    def part(self, rows: slice) -> DenseTargets:
        """Some of the rows that :meth:`rows` gave."""
        return DenseTargets(self.logits[rows])


@dataclass(frozen=True)
class HiddenTargets:
    """A teacher's last hidden states and its head: logits are made chunk by chunk.

    Attributes:
        hidden: ``[B, S, Ht]``, what the head multiplies (after the last norm).
        head: of the teacher.
    """

    hidden: Tensor
    head: OutputHead

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary

    def rows(self, index: Tensor, out: Tensor | None = None) -> DenseTargets:
        """Logits ``[N, V]`` of the positions ``index`` (int64 ``[N]`` into ``B * S``), without a graph; in ``out``,
        where given."""
        with torch.no_grad():
            return DenseTargets(self.head.logits(_rows(self.hidden, index), out))


@dataclass(frozen=True)
class TopKTargets:
    """The ``K`` likeliest tokens and the mass of all others, as one tail bucket.

    Attributes:
        ids: int64 ``[B, S, K]``, distinct within a row.
        log_probs: ``[B, S, K]``, natural logarithms of the teacher's probabilities, of all its vocabulary.
        tail: ``[B, S]``, logarithm of the mass left out; -inf: none.
        temperature: that the probabilities were taken at.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    temperature: float = 1.0

    def rows(self, index: Tensor) -> TopKTargets:
        """The positions ``index`` (int64 ``[N]`` into ``B * S``): ``[N, K]`` and ``[N]``."""
        ids, log_probs, tail = (_rows(tensor, index) for tensor in (self.ids, self.log_probs, self.tail))
        return replace(self, ids=ids, log_probs=log_probs, tail=tail)

    def part(self, rows: slice) -> TopKTargets:
        """Some of the rows that :meth:`rows` gave."""
        return replace(self, ids=self.ids[rows], log_probs=self.log_probs[rows], tail=self.tail[rows])


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the teacher, as unbiased weights (RS-KD, arXiv 2503.16870).

    Attributes:
        ids: int64 ``[B, S, K]``; unused entries hold any valid id.
        weights: ``[B, S, K]``, sum to 1 over a counted row; 0 for unused entries.
        temperature: that the tokens were drawn at.
    """

    ids: Tensor
    weights: Tensor
    temperature: float = 1.0

    def rows(self, index: Tensor) -> SampledTargets:
        """The positions ``index`` (int64 ``[N]`` into ``B * S``): ``[N, K]``."""
        return replace(self, ids=_rows(self.ids, index), weights=_rows(self.weights, index))

    def part(self, rows: slice) -> SampledTargets:
        """Some of the rows that :meth:`rows` gave."""
        return replace(self, ids=self.ids[rows], weights=self.weights[rows])


Targets = DenseTargets | HiddenTargets | TopKTargets | SampledTargets
