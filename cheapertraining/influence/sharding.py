"""Models whose parameters are spread over the ranks: FSDP1 (``use_orig_params=True``) and FSDP2 (DTensor), the latter
also of layers that tensor parallelism has cut.

Influence works on what a rank holds: its local shards. Wrappers are told by their names, so that neither FSDP nor
DTensor need be imported where nobody uses them.

``FullyShardedDataParallel`` shows a parameter between passes as a flat slice, possibly empty; the slices of all ranks
in order make up the flattened parameter. ``fully_shard`` makes DTensors, split along a dimension. Both keep what they
gathered for the root module after a pass without gradients, hence :func:`reshard`.

Under tensor parallelism ranks that hold parts of the same layers see the same samples, of which each must count once
(:func:`sample_copies`), while their shards, as all shards, make up one parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.ranks import rank_and_world, sum_over_ranks

__all__ = [
    "Gathered",
    "Shards",
    "check_reduced",
    "gradient_scale",
    "gradients_set_aside",
    "is_sharded",
    "local",
    "low_precision",
    "reshard",
    "sample_copies",
]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, detached, in the same memory; the tensor itself unless it is a DTensor."""
    found: torch.Tensor = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 spreads the model's parameters over ranks.

    Raises:
        UserError: they are spread in a way that influence does not know (tensor parallelism without FSDP2, FSDP1 with
            flat parameters).
    """
    handles, modules = _handles(model), _fsdp2_modules(model)
    if any(not handle._use_orig_params for handle in handles):
        raise UserError(
            "influence: expected FullyShardedDataParallel with use_orig_params=True, found flat parameters, in which "
            "layers cannot be told apart. Set use_orig_params=True."
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh") and (not modules or not _is_over_all_ranks(parameter)):
            raise UserError(
                f"influence: expected parameters replicated, or sharded by FSDP, over all ranks, found {name} as "
                f"{getattr(parameter, 'placements', None)}. Shard what tensor parallelism has cut with fully_shard as "
                "well, or use a mixing strategy that needs no influence."
            )
    return bool(handles or modules)


def sample_copies(model: nn.Module) -> int:
    """Number of neighbouring ranks that see the same samples: those that FSDP2 does not spread the model over, since
    tensor parallelism has cut its layers over them; else 1."""
    groups = _fsdp2_groups(model)
    return rank_and_world()[1] // int(groups[0].mesh_info.mesh.size()) if groups else 1


def reshard(model: nn.Module) -> None:
    """Drop every gathered parameter, so that shards are what is seen, and what the next pass gathers."""
    for module in _fsdp2_modules(model):
        module.reshard()
    for handle in _handles(model):
        if not hasattr(handle.flat_param, "_local_shard"):
            continue  # Before the first pass nothing is gathered.
        handle.reshard(handle.uses_sharded_strategy)
        handle.post_reshard()
        handle._prefetched = False


def low_precision(model: nn.Module) -> torch.dtype | None:
    """The half precision that FSDP casts parameters to for its passes, if it does."""
    found = [handle._fwd_bwd_param_dtype for handle in _handles(model)]
    found += [group.mp_policy.param_dtype for group in _fsdp2_groups(model)]
    halves = [dtype for dtype in found if dtype in (torch.bfloat16, torch.float16)]
    return halves[0] if halves else None


class Shards:
    """How the selected parameters of a model lie on the ranks. Making one is a collective call.

    Args:
        model: as it is trained, wrapped.
        parameters: by name, as :func:`~cheapertraining.influence.parameters.select_parameters` gives them.

    Raises:
        UserError: see :func:`is_sharded`.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.sharded = is_sharded(model)
        self._parameters = dict(parameters)
        self._flat: dict[str, tuple[torch.Size, Any, list[int]]] = {}
        flat = {
            id(parameter): (shape, handle.process_group)
            for handle in _handles(model)
            if handle.uses_sharded_strategy
            for parameter, shape in zip(handle.flat_param._params, handle.flat_param._shapes, strict=True)
        }
        for name, parameter in parameters.items():
            if id(parameter) in flat:
                shape, group = flat[id(parameter)]
                sizes = [torch.zeros(1, dtype=torch.int64, device=parameter.device) for _ in range(group.size())]
                dist.all_gather(sizes, torch.tensor([parameter.numel()], device=parameter.device), group=group)
                self._flat[name] = shape, group, [int(size) for size in sizes]

    def gather(self, name: str, shards: torch.Tensor) -> torch.Tensor:
        """The whole of what lies in shards like a parameter: ``[K, *local]`` on each rank to ``[K, *full]`` on all.

        A collective call; the tensor itself where the parameter is not sharded. Without gradient.
        """
        if name in self._flat:
            return self._gather_flat(name, shards)
        parameter: Any = self._parameters[name]
        if not hasattr(parameter, "device_mesh"):
            return shards
        from torch.distributed.tensor import DTensor

        full = torch.empty((len(shards), *parameter.shape), device="meta")
        whole: torch.Tensor = DTensor.from_local(
            shards.detach().contiguous(),
            parameter.device_mesh,
            _behind_first(parameter),
            run_check=False,
            shape=full.shape,
            stride=full.stride(),
        ).full_tensor()
        return whole

    def scatter(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor that all ranks hold whole: ``[K, *full]`` to ``[K, *local]``, a copy if cut."""
        if name in self._flat:
            _, group, sizes = self._flat[name]
            first = sum(sizes[: group.rank()])
            return full.reshape(len(full), -1)[:, first : first + sizes[group.rank()]].clone()
        parameter: Any = self._parameters[name]
        if not hasattr(parameter, "device_mesh"):
            return full
        part, mesh = full.detach(), parameter.device_mesh
        cuts = zip(mesh.shape, mesh.get_coordinate(), _behind_first(parameter), strict=True)
        # FSDP2 cuts what tensor parallelism has cut before, which a strided placement says.
        for size, place, placement in sorted(cuts, key=lambda cut: hasattr(cut[2], "split_factor")):
            if placement.is_shard():
                part = _chunk(part, size, place, placement.dim)
        return part.clone()

    def shape(self, name: str) -> torch.Size:
        """A parameter's whole shape."""
        return self._flat[name][0] if name in self._flat else self._parameters[name].shape

    def copies(self, name: str) -> int:
        """Number of ranks that hold the same part of a parameter."""
        world = rank_and_world()[1]
        if name in self._flat:
            return world // int(self._flat[name][1].size())
        parameter: Any = self._parameters[name]
        if not hasattr(parameter, "device_mesh"):
            return world
        held = 1
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            held *= size if placement.is_replicate() else 1
        return held

    def norm(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Euclidean norm of tensors that lie like the parameters, ``{name: local}``, over all ranks' shards."""
        norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors.values()])
        if not self.sharded:
            return float(torch.linalg.vector_norm(norms))
        copies = torch.tensor([self.copies(name) for name in tensors], dtype=torch.float64, device=norms.device)
        total = (norms**2 / copies).sum()
        sum_over_ranks(total)
        return float(total.sqrt())

    def _gather_flat(self, name: str, shards: torch.Tensor) -> torch.Tensor:
        shape, group, sizes = self._flat[name]
        # Collectives want one size: the shorter slices are filled up, and cut again.
        padded = shards.new_zeros(len(shards), max(sizes))
        padded[:, : shards[0].numel()] = shards.reshape(len(shards), -1)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)
        return whole.view(len(shards), *shape)


class Gathered(Mapping[str, torch.Tensor]):
    """Tensors that lie in shards, ``{name: [K, *local]}``, gathered when they are asked for: ``[K, *full]``.

    The last one is kept. All ranks ask for the same, in the same order.
    """

    def __init__(self, shards: Shards, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shards, self._tensors = shards, tensors
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, self._shards.gather(name, self._tensors[name])
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def gradient_scale(model: nn.Module) -> float:
    """What backward leaves in ``.grad`` of a model on several ranks, as a multiple of the sum over the ranks' losses.

    Copies of a loss (:func:`sample_copies`) are taken once.

    A collective call. FSDP1 and DistributedDataParallel average, so ``1 / world``. FSDP2 leaves it to the backend,
    and torch 2.7 on gloo sums where NCCL averages (pytorch issue 162338), unless somebody has put it right by a hook;
    so it is measured, on one parameter of known gradient with the settings of the model's own.
    """
    groups = _fsdp2_groups(model)
    if not groups:
        return 1.0 / rank_and_world()[1]
    from torch.distributed.fsdp import fully_shard

    group: Any = groups[0]
    mesh = group.mesh_info.mesh
    # Of the model's dtype: torch reduces float64 in another way than float32.
    known = _Sum(torch.ones(mesh.shape[-1], dtype=group.fsdp_params[0].sharded_param.dtype, device=group.device))
    fully_shard(known, mesh=mesh, mp_policy=group.mp_policy)
    state: Any = known._get_fsdp_state()  # type: ignore[operator]  # comes with fully_shard
    for setting in _REDUCTION:
        if hasattr(group, setting):
            setattr(state._fsdp_param_group, setting, getattr(group, setting))
    with torch.set_grad_enabled(True):
        known().backward()  # On each rank a gradient of ones: their sum is the number of ranks.
    assert known.weight.grad is not None
    return float(local(known.weight.grad).mean()) / int(mesh.size())


class _Sum(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> torch.Tensor:
        return self.weight.float().sum()


# What of a parameter group changes the factor, by torch's version.
_REDUCTION = ("_all_reduce_hook", "_all_reduce_hook_stream", "reduce_scatter_reduce_op", "gradient_divide_factor")


@contextlib.contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Within, ``.grad`` of a sharded model is empty, and no hook on a finished gradient fires; on leaving all is back.

    Raises:
        UserError: the model holds gradients that it has not reduced yet, which another backward pass would spoil.
    """
    check_reduced(model)
    reshard(model)
    tensors = [*model.parameters(), *(handle.flat_param for handle in _handles(model))]
    saved = [(tensor, tensor.grad) for tensor in tensors]
    hooks = [(t._post_accumulate_grad_hooks, dict(t._post_accumulate_grad_hooks or {})) for t in tensors]
    for tensor, (live, _) in zip(tensors, hooks, strict=True):
        tensor.grad = None
        if live:
            live.clear()
    try:
        yield
    finally:
        reshard(model)
        for tensor, grad in saved:
            tensor.grad = grad
        for live, kept in hooks:
            if live is not None:
                live.update(kept)


def check_reduced(model: nn.Module) -> None:
    """Refuse a sharded model that is told to put off the reduction of its gradients (``no_sync`` and the like).

    Raises:
        UserError: it is.
    """
    later = [group for group in _fsdp2_groups(model) if not group.reduce_grads]
    if later or any(not module._sync_gradients for module in model.modules() if _is_a(module, _FSDP1)):
        raise UserError(
            "influence: expected FSDP to reduce the gradients of every microbatch, found gradient synchronization off "
            "(no_sync, set_requires_gradient_sync(False)). Leave it on, or measure between steps."
        )


_FSDP1, _FSDP2 = "FullyShardedDataParallel", "FSDPModule"


def _is_a(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _handles(model: nn.Module) -> list[Any]:
    """FSDP1: what manages the flat parameter of each wrapped module."""
    wrapped: list[Any] = [module for module in model.modules() if _is_a(module, _FSDP1)]
    return [module._handle for module in wrapped if module._handle is not None]


def _fsdp2_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_a(module, _FSDP2)]


def _fsdp2_groups(model: nn.Module) -> list[Any]:
    """FSDP2: what manages the parameters of each wrapped module that has some of its own."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in _fsdp2_modules(model)]
    return [group for group in groups if group is not None]


def _behind_first(parameter: Any) -> list[Any]:
    """The placements of a parameter, for tensors with one more dimension in front."""
    moved = []
    for placement in parameter.placements:
        strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
        moved.append(type(placement)(placement.dim + 1, **strided) if placement.is_shard() else placement)
    return moved


def _chunk(tensor: torch.Tensor, size: int, place: int, dim: int) -> torch.Tensor:
    """The part of a tensor that the ``place``-th of ``size`` ranks holds; empty where there are fewer."""
    parts = tensor.chunk(size, dim)
    return parts[place] if place < len(parts) else tensor.narrow(dim, 0, 0)


def _is_over_all_ranks(parameter: Any) -> bool:
    kinds = {type(placement).__name__ for placement in parameter.placements}
    return kinds <= {"Shard", "_StridedShard", "Replicate"} and parameter.device_mesh.size() == rank_and_world()[1]
