"""How a model is spread over processes: the device mesh of a :mod:`~cheapertraining.distributed.layout`."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cheapertraining.distributed.layout import Layout, plan_layout

__all__ = ["MESH_NAMES", "Layout", "build_mesh", "data_rank", "plan_layout"]

MESH_NAMES = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel")
"""Dimensions of the mesh, outermost first; the names are Composer's."""


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh ``[replicate, shard, tensor]``; a collective call on all ranks.

    Args:
        layout: of the run.
        device_type: ``"cuda"`` or ``"cpu"``.
    """
    return init_device_mesh(device_type, (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=MESH_NAMES)


def data_rank(layout: Layout, rank: int) -> int:
    """The rank among those that read samples of their own; the tensor dimension is the innermost of the mesh."""
    return rank // layout.copies
