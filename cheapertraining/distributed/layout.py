"""Who holds what, from a config and a number of processes; no torch, so that a run can be planned before it starts.

A layout has three sizes: ``replicate`` copies of the model, each cut into ``shard`` pieces by data parallelism (ZeRO-3,
arXiv 1910.02054; FSDP, arXiv 2304.11277), each piece of a layer cut into ``tensor`` pieces (Megatron, arXiv
1909.08053). Their product is the number of processes. Ranks of one tensor parallel group read the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cheapertraining.config import ParallelismConfig
from cheapertraining.errors import UserError

__all__ = ["Layout", "StagePlan", "plan_layout", "plan_stages"]

Engine = Literal["replicas", "fsdp", "fsdp2", "pipeline"]


@dataclass(frozen=True)
class Layout:
    """What is spread how.

    Attributes:
        engine: ``replicas`` (one process, or DDP), ``fsdp`` (FSDP1), ``fsdp2``, which tensor parallelism also uses, or
            ``pipeline``, which has no mesh.
        replicate, shard, tensor: sizes of the mesh, see the module's docstring.
        stages: ranks of the pipeline.
    """

    engine: Engine
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    stages: int = 1

    @property
    def copies(self) -> int:
        """Ranks that read the same samples."""
        return self.tensor * self.stages

    @property
    def data(self) -> int:
        """Ranks that read samples of their own."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        """Processes."""
        return self.data * self.copies


def plan_layout(config: ParallelismConfig, world_size: int) -> Layout:
    """The layout of ``world_size`` processes.

    Raises:
        UserError: the sizes asked for do not make up that number of processes.
    """
    if config.pp is not None:
        if config.pp.pipeline_parallel_degree not in (-1, world_size):
            raise UserError(
                f"parallelism.pp.pipeline_parallel_degree: expected the number of processes ({world_size}), found "
                f"{config.pp.pipeline_parallel_degree}. Set it to -1, or start that number of processes."
            )
        return Layout("pipeline", stages=world_size)
    if config.tp is not None:
        tensor = config.tp.tensor_parallel_degree
        tensor = world_size if tensor == -1 else tensor
        if world_size % tensor:
            raise _does_not_fit("tp.tensor_parallel_degree", tensor, world_size)
        if config.fsdp2 is None and tensor != world_size:
            raise UserError(
                f"parallelism.tp.tensor_parallel_degree: expected the number of processes ({world_size}), found "
                f"{tensor}. Add fsdp2: {{}} (compose.distributed=fsdp2_tp) to spread the rest, or set it to -1."
            )
        replicate, shard = _data_sizes("fsdp2", config, world_size // tensor)
        return Layout("fsdp2", replicate, shard, tensor)
    if config.fsdp2 is not None:
        return Layout("fsdp2", *_data_sizes("fsdp2", config, world_size))
    if config.fsdp is not None:
        return Layout("fsdp", *_data_sizes("fsdp", config, world_size))
    return Layout("replicas", replicate=world_size)


def _data_sizes(section: Literal["fsdp", "fsdp2"], config: ParallelismConfig, ranks: int) -> tuple[int, int]:
    """Replicas and shards that ``ranks`` ranks of data parallelism make."""
    settings = config.fsdp if section == "fsdp" else config.fsdp2
    if settings is None:
        return 1, ranks
    replicate, shard = settings.data_parallel_replicate_degree, settings.data_parallel_shard_degree
    if replicate is not None and ranks % replicate:
        raise _does_not_fit(f"{section}.data_parallel_replicate_degree", replicate, ranks)
    if shard == -1:
        return replicate or 1, ranks // (replicate or 1)
    if (replicate or 1) * shard != ranks:
        raise _does_not_fit(f"{section}.data_parallel_shard_degree", shard, ranks // (replicate or 1))
    return replicate or 1, shard


def _does_not_fit(key: str, found: int, ranks: int) -> UserError:
    divisors = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
    return UserError(
        f"parallelism.{key}: expected a size that fits the {ranks} processes it divides ({', '.join(divisors)}), found "
        f"{found}. Change it, or start another number of processes."
    )


@dataclass(frozen=True)
class StagePlan:
    """Which decoder layers are in which stage.

    Attributes:
        ranks: of the pipeline; stage ``s`` is on rank ``s % ranks``.
        layers: numbers of the decoder layers, by stage. The embedding is with the first, norm and head with the last.
    """

    ranks: int
    layers: tuple[range, ...]

    @property
    def stages(self) -> int:
        return len(self.layers)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in the order that a sample passes through them."""
        return list(range(rank, self.stages, self.ranks))

    @property
    def last_rank(self) -> int:
        """The rank of the last stage."""
        return (self.stages - 1) % self.ranks


def plan_stages(num_layers: int, ranks: int, stages_per_rank: int) -> StagePlan:
    """Divide layers among stages, as evenly as whole layers can be.

    Raises:
        UserError: there are fewer layers than stages.
    """
    stages = ranks * stages_per_rank
    if num_layers < stages:
        raise UserError(
            f"parallelism.pp: {ranks} ranks with {stages_per_rank} stages each need at least {stages} decoder layers, "
            f"found {num_layers}. Use fewer ranks, fewer stages_per_rank, or a deeper model."
        )
    bounds = [num_layers * stage // stages for stage in range(stages + 1)]
    return StagePlan(ranks, tuple(range(a, b) for a, b in pairwise(bounds)))
