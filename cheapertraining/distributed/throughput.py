"""How fast a run can be: arithmetic at a utilization, or what must go over the wire, if that takes longer."""

from __future__ import annotations

from dataclasses import dataclass

from cheapertraining.distributed.estimate import FLOAT, HALF, Plan, Shape

__all__ = ["GPU", "GPUS", "Speed", "estimate_speed"]


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, from its vendor's data sheet.

    Attributes:
        memory: bytes.
        peak: dense matrix operations a second, bfloat16 with float32 accumulation.
        link: bytes a second to others of its node, one way.
    """

    memory: float
    peak: float
    link: float


GPUS = {
    "h200": GPU(141e9, 989e12, 450e9),
    "h100": GPU(80e9, 989e12, 450e9),
    "a100": GPU(80e9, 312e12, 300e9),
    "a100-40gb": GPU(40e9, 312e12, 300e9),
    "l40s": GPU(48e9, 362e12, 32e9),
}
"""SXM variants; ``l40s`` has PCIe 4.0 alone."""


@dataclass(frozen=True)
class Speed:
    """Of the whole job.

    Attributes:
        tokens_per_second: expected.
        mfu: model FLOP utilization that it comes to, after bubbles, recomputation and communication.
        compute, communication: seconds of a step; the larger counts, since they overlap.
        bubble: share of a step that pipeline ranks idle.
    """

    tokens_per_second: float
    mfu: float
    compute: float
    communication: float
    bubble: float


def estimate_speed(
    shape: Shape, plan: Plan, gpu: GPU, *, mfu: float = 0.35, network: float = 50e9, nodes_apart: bool | None = None
) -> Speed:
    """Time of a step: arithmetic at a utilization, bubbles, recomputation; or what must go over the wire, if more.

    Args:
        shape, plan, gpu: of the run.
        mfu: share of the peak that arithmetic reaches on a GPU by itself; 0.35 is what published runs of 8B have.
        network: bytes a second and GPU between nodes, one way.
        nodes_apart: whether shards are exchanged between nodes; None: where there are more of them than in a node.
    """
    tokens = plan.batch * plan.length
    work = tokens * shape.flops_per_token(plan.length)
    again = 4 / 3 if plan.checkpointing else 1.0  # the forward pass of the layers once more
    # Ranks wait p - 1 micro-batches for the first, divided by the stages of each (arXiv 2104.04473, section 2.2).
    waiting = (plan.stages - 1) / (plan.microbatches * plan.stages_per_rank)
    compute = work * again * (1 + waiting) / (plan.ranks * gpu.peak * mfu)
    apart = plan.shard * plan.tensor > plan.ranks_per_node if nodes_apart is None else nodes_apart
    communication = _communication(shape, plan, gpu.link, network, network if apart else gpu.link)
    seconds = max(compute, communication)
    return Speed(
        tokens / seconds, work / (seconds * plan.ranks * gpu.peak), compute, communication, waiting / (1 + waiting)
    )


def _communication(shape: Shape, plan: Plan, inside: float, between: float, shards: float) -> float:
    """Seconds that a step's transfers take: parameters and gradients between data parallel ranks, states between layers
    of tensor parallel ones; what a pipeline sends is negligible beside them."""
    held = shape.parameters / (plan.tensor * plan.stages)
    gather = HALF if plan.half else FLOAT
    seconds = 0.0
    if plan.shard > 1:
        ring = (plan.shard - 1) / plan.shard
        passes = 1 if plan.gathered_whole else 2
        seconds += held * ring * (passes * gather + FLOAT) * plan.microbatches / shards
    if plan.replicate > 1:
        ring = 2 * (plan.replicate - 1) / plan.replicate
        together = plan.replicate * plan.shard * plan.tensor <= plan.ranks_per_node
        seconds += held / plan.shard * ring * FLOAT / (inside if together else between)
    if plan.tensor > 1:
        # Four all-gathers and four reduce-scatters a layer and step (arXiv 2205.05198), of hidden states.
        tokens = plan.batch * plan.length / (plan.replicate * plan.shard)
        ring = (plan.tensor - 1) / plan.tensor
        link = inside if plan.tensor <= plan.ranks_per_node else between
        seconds += 8 * shape.layers / plan.stages * tokens * shape.hidden * gather * ring / link
    return seconds
