"""One backward pass watched at the sites: what comes by there is handed to a consumer, unit by unit.

While :func:`watched` is open, the sites' ``forward`` goes through small autograd functions. Their backward sees, at
the moment when autograd has it anyway, what went into a site and the gradient of what came out; products of the two
are the gradients of single units (Goodfellow, 1510.01799). Nothing runs a backward pass inside another one, and
checkpointed blocks, whose forward runs twice, count once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.scorers.sites import Site
from cheapertraining.influence.scorers.units import Factors, Units, wide
from cheapertraining.influence.sharding import sample_copies

__all__ = ["Consumer", "Watch", "refuse_unwatchable", "watched"]

Forward = Callable[..., torch.Tensor]
Visit = Callable[..., None]
_WIDE = (torch.float32, torch.float64)


class Consumer(Protocol):
    """What is done with the gradients of units.

    ``additive``: the sites of a tied parameter may be handed over one by one, as what is wanted is linear in them;
    otherwise they come together, once the last has been reached.
    """

    additive: bool

    def matrix(self, name: str, factors: Sequence[Factors], units: Units, gradient: torch.Tensor | None) -> None:
        """Take a matrix, in the shape that it is stored in. ``gradient``, where given, is to be filled with the sum
        over the units."""

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """Take the gradients ``[N, *shape]`` of a norm's or a bias's parameter."""

    def merges(self, name: str, units: Units) -> bool:
        """Whether :meth:`matrix` forms all units' gradients in any case, so that their sum costs little more."""


class Watch:
    """One forward and backward of one batch, watched.

    Args:
        sites: where.
        consumer: for whom.
        units: of the batch.
        anchor: a scalar that requires grad, for passes in which no parameter does: it makes autograd go to every
            site. None in a training step.

    Attributes:
        reached: whether a backward pass has come by.
    """

    def __init__(
        self, sites: Sequence[Site], consumer: Consumer, units: Units, anchor: torch.Tensor | None = None
    ) -> None:
        self.sites, self.consumer, self.units, self.anchor = sites, consumer, units, anchor
        self._uses: dict[str, int] = {}
        for site in sites:
            for name in site.parameters.values():
                self._uses[name] = self._uses.get(name, 0) + 1
        self._factors: dict[str, list[Factors]] = {}
        self._vectors: dict[str, list[torch.Tensor]] = {}
        self._done: set[str] = set()
        self.reached = False

    def merges(self, name: str) -> bool:
        """Whether the gradient of ``name`` for the optimizer is to be made from those of the units."""
        waits = self._uses[name] > 1 and not self.consumer.additive
        return self.anchor is None and not waits and self.consumer.merges(name, self.units)

    def matrix(self, name: str, factors: Factors, gradient: torch.Tensor | None = None) -> None:
        """A site has the gradient of ``name``."""
        self.reached = True
        if self.consumer.additive:
            self.consumer.matrix(name, [factors], self.units, gradient)
            return
        self._once(name)
        gathered = self._factors.setdefault(name, [])
        gathered.append(factors)
        if len(gathered) == self._uses[name]:
            self._done.add(name)
            self.consumer.matrix(name, self._factors.pop(name), self.units, gradient)

    def vector(self, name: str, gradients: torch.Tensor) -> None:
        """A site has the gradients of ``name``, ``[N, *shape]``."""
        self.reached = True
        if self.consumer.additive:
            self.consumer.vector(name, gradients)
            return
        self._once(name)
        gathered = self._vectors.setdefault(name, [])
        gathered.append(gradients)
        if len(gathered) == self._uses[name]:
            self._done.add(name)
            self.consumer.vector(name, torch.stack(self._vectors.pop(name)).sum(0))

    def flush(self) -> None:
        """The backward pass is over: hand over what waited for a site that took no part in it."""
        for name in list(self._factors):
            self.consumer.matrix(name, self._factors.pop(name), self.units, None)
        for name in list(self._vectors):
            self.consumer.vector(name, torch.stack(self._vectors.pop(name)).sum(0))

    def _once(self, name: str) -> None:
        if name in self._done:
            raise UserError(
                f"influence: expected '{name}' to be used once by each of its modules in a forward pass, found a "
                "second use, which norms, Gram matrices and DataInf cannot tell from the first. Leave it out with "
                "`layers`."
            )

    def by_token(self, site: Site, tensor: torch.Tensor, width: int) -> torch.Tensor:
        """``[B * S, m, *own]`` from what a site saw: ``own`` its last ``width`` dimensions, ``m`` those between."""
        count, lead = self.units.tokens, tensor.shape[: tensor.dim() - width]
        if tuple(lead[:2]) == self.units.shape or lead[:1] == (count,):
            return tensor.reshape(count, -1, *tensor.shape[tensor.dim() - width :])
        raise self._misshapen(site, tensor)

    def rows(self, site: Site, tensor: torch.Tensor) -> torch.Tensor:
        """``[B * S, d]`` from what a site saw, one vector for each token."""
        if tensor.shape[:-1].numel() != self.units.tokens:
            raise self._misshapen(site, tensor)
        return tensor.reshape(self.units.tokens, tensor.shape[-1])

    def _misshapen(self, site: Site, tensor: torch.Tensor) -> UserError:
        return UserError(
            f"influence: expected '{site.name}' to see one vector for each of {self.units.shape[0]} x "
            f"{self.units.shape[1]} tokens, found the shape {tuple(tensor.shape)}. Leave it out with `layers`, or use "
            "the forward scorer."
        )


class _Tap(torch.autograd.Function):
    """Identity on what comes out of a site; on the way back, ``visit(input, gradient)``."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, seen: torch.Tensor, anchor: torch.Tensor | None, visit: Visit
    ) -> torch.Tensor:
        ctx.visit = visit
        ctx.save_for_backward(seen)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with _plain(gradients[0]):
            ctx.visit(*ctx.saved_tensors, gradients[0])
        return (gradients[0] if ctx.needs_input_grad[0] else None), None, None, None


class _MergedLinear(torch.autograd.Function):
    """A linear map whose weight gradient falls out of its units' gradients: ``visit(input, gradient, weight)``."""

    @staticmethod
    def forward(
        ctx: Any, seen: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool, visit: Visit
    ) -> torch.Tensor:
        ctx.visit, ctx.turned = visit, turned
        ctx.save_for_backward(seen, weight)
        return F.linear(seen, weight.t() if turned else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, weight = ctx.saved_tensors
        (gradient,) = gradients
        onward = None
        with _plain(gradient):
            if ctx.needs_input_grad[0]:
                onward = gradient @ (weight.t() if ctx.turned else weight)
            of_weight = weight.new_empty(weight.shape)
            ctx.visit(seen, gradient, of_weight)
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return onward, of_weight, of_bias, None, None


class _Spread(torch.autograd.Function):
    """A norm's parameter, repeated for every token; on the way back, ``visit(gradient of every token)``."""

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, shape: torch.Size, anchor: torch.Tensor | None, visit: Visit
    ) -> torch.Tensor:
        ctx.visit, ctx.extra = visit, len(shape) - parameter.dim()
        return parameter.expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        with _plain(gradient):
            ctx.visit(gradient)
            own = gradient.sum(tuple(range(ctx.extra))) if ctx.needs_input_grad[0] else None
        return own, None, None, None


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> torch.Tensor:
    return function.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


@contextlib.contextmanager
def _plain(like: torch.Tensor) -> Iterator[None]:
    """Autocast off, for loops that call ``backward`` under it."""
    if not torch.is_autocast_enabled(like.device.type):
        yield
        return
    with torch.autocast(like.device.type, enabled=False):
        yield


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast makes of a matrix product's operand."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Put the watched ``forward`` in place of each site's own, and the own back on leaving."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for site in watch.sites:
            own = site.module.__dict__.get("forward")
            watching = _FORWARDS[site.kind](watch, site, site.module.forward)
            before.append((site.module, own))
            site.module.forward = watching
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own


def _linear(watch: Watch, site: Site, original: Forward) -> Forward:
    module, turned = site.module, site.kind == "conv1d"
    weight, bias = site.parameters.get("weight"), site.parameters.get("bias")
    plain = "forward" not in module.__dict__ and (turned or type(module).forward is nn.Linear.forward)

    def visit(seen: torch.Tensor, gradient: torch.Tensor, of_weight: torch.Tensor | None = None) -> None:
        out = _matrix_operand(watch.rows(site, gradient))
        if bias is not None:
            watch.vector(bias, watch.units.sum(out))
        if weight is not None:
            into = _matrix_operand(watch.rows(site, seen))
            watch.matrix(weight, Factors(into, out) if turned else Factors(out, into), of_weight)

    def forward(input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return original(input)
        input = _cast(input)
        held: Any = module.weight
        # In half precision the sum of rounded units is not the rounded sum: autograd's own product makes the gradient.
        if plain and _cast(held).dtype in _WIDE and weight is not None and watch.merges(weight):
            return _apply(_MergedLinear, input, held, module.bias, turned, visit)
        return _apply(_Tap, original(input), input.detach(), watch.anchor, visit)

    return forward


def _matrix_operand(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU multiplies float32 faster, and CUDA half precision, which it sums up in float32 in any case."""
    return tensor if tensor.is_cuda else wide(tensor)


def _embedding(watch: Watch, site: Site, original: Forward) -> Forward:
    module: Any = site.module
    name = site.parameters["weight"]

    def visit(tokens: torch.Tensor, gradient: torch.Tensor) -> None:
        out = wide(watch.rows(site, gradient))
        if module.padding_idx is not None:
            out = out.masked_fill((tokens.reshape(-1) == module.padding_idx)[:, None], 0)
        watch.matrix(name, Factors(tokens.reshape(-1), out))

    def forward(input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return original(input)
        # Positions that all rows share come as one row; their gradient would come as a sum over the rows.
        if input.dim() == 2 and input.shape[0] == 1 and input.shape[1] == watch.units.shape[1]:
            input = input.expand(watch.units.shape)
        return _apply(_Tap, original(input), input, watch.anchor, visit)

    return forward


def _norm(watch: Watch, site: Site, original: Forward) -> Forward:
    if type(site.module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return _known_norm(watch, site, original)
    module: Any = site.module

    def visitor(name: str, width: int) -> Visit:
        def visit(gradient: torch.Tensor) -> None:
            watch.vector(name, watch.units.sum(watch.by_token(site, gradient, width).sum(1)))

        return visit

    def forward(*inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return original(*inputs, **named)
        lead = (inputs[0] if inputs else next(iter(named.values()))).shape
        own = {key: getattr(module, key) for key in site.parameters}
        # FSDP1 puts what it has gathered in front of the parameters.
        held = {key: module.__dict__ if key in module.__dict__ else module._parameters for key in own}
        try:
            for key, name in site.parameters.items():
                shape = lead[: len(lead) - own[key].dim()] + own[key].shape
                held[key][key] = _apply(_Spread, own[key], shape, watch.anchor, visitor(name, own[key].dim()))
            return original(*inputs, **named)
        finally:
            for key in own:
                held[key][key] = own[key]

    return forward


def _known_norm(watch: Watch, site: Site, original: Forward) -> Forward:
    module: Any = site.module
    shape = tuple(module.normalized_shape)
    weight, bias = site.parameters.get("weight"), site.parameters.get("bias")

    def visit(seen: torch.Tensor, gradient: torch.Tensor) -> None:
        out = wide(gradient)
        if bias is not None:
            watch.vector(bias, watch.units.sum(watch.by_token(site, out, len(shape)).sum(1)))
        if weight is not None:
            if isinstance(module, nn.RMSNorm):
                eps = module.eps if module.eps is not None else torch.finfo(seen.dtype).eps
                normal = F.rms_norm(wide(seen), shape, None, eps)
            else:
                normal = F.layer_norm(wide(seen), shape, None, None, module.eps)
            watch.vector(weight, watch.units.sum(watch.by_token(site, normal.mul_(out), len(shape)).sum(1)))

    def forward(input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return original(input)
        return _apply(_Tap, original(input), input.detach(), watch.anchor, visit)

    return forward


_FORWARDS: Mapping[str, Callable[[Watch, Site, Forward], Forward]] = {
    "linear": _linear,
    "conv1d": _linear,
    "embedding": _embedding,
    "elementwise": _norm,
}


def refuse_unwatchable(model: nn.Module) -> None:
    """Raise UserError for a model that ``torch.compile`` took in hand, whose graph does not see the sites, or that
    tensor parallelism has cut: no rank sees a site's whole input and gradient."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                "influence: expected a model that is not compiled, found one under torch.compile, whose graph hides "
                "the layers from the fused and hook scorers. Score with the forward or the microbatch scorer, or "
                "compile after scoring."
            )
    if sample_copies(model) > 1:
        raise UserError(
            "influence: expected layers in one piece, found them cut by tensor parallelism, whose parts the fused and "
            "hook scorers do not put together. Score with the forward or the microbatch scorer."
        )
