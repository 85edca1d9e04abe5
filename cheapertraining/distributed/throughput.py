"""How fast a run can be: arithmetic at a utilization, or what must go over the wire, if that takes longer."""

from __future__ import annotations

from dataclasses import dataclass

from cheapertraining.distributed.estimate import FLOAT, HALF, Plan, Shape

__all__ = ["GPU", "GPUS", "Speed", "estimate_speed"]


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory: bytes.
        peak: dense matrix operations a second, bfloat16 with float32 accumulation.
        link: bytes a second to others of its node, one way.
        utilization: share of the peak that published training runs reach, recomputation counted.
    """

    memory: float
    peak: float
    link: float
    utilization: float = 0.40


GPUS = {
    "b200": GPU(180e9, 2250e12, 900e9),
    "h200": GPU(141e9, 989e12, 450e9),
    "h100": GPU(80e9, 989e12, 450e9),
    "a100": GPU(80e9, 312e12, 300e9, 0.60),
    "a100-40gb": GPU(40e9, 312e12, 300e9, 0.60),
    "l40s": GPU(48e9, 362e12, 32e9),
    "rtx4090": GPU(24e9, 165e12, 32e9),
}
"""SXM variants, but for the last two, which have PCIe 4.0 x16 alone. ``docs/planning.md`` names the sources."""


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
    shape: Shape, plan: Plan, gpu: GPU, *, utilization: float | None = None, network: float = 50e9
) -> Speed:
    """Time of a step: arithmetic at a utilization, bubbles, recomputation; or what must go over the wire, if more.

    Args:
        shape, plan, gpu: of the run.
        utilization: share of the peak that arithmetic reaches; None is the GPU's.
        network: bytes a second and GPU between nodes, one way.
    """
    tokens = plan.batch * plan.length
    work = tokens * shape.flops_per_token(plan.length)
    again = 4 / 3 if plan.checkpointing else 1.0  # the forward pass of the layers once more
    # Ranks wait p - 1 micro-batches for the first, divided by the stages of each (arXiv 2104.04473, section 2.2).
    waiting = (plan.stages - 1) / (plan.microbatches * plan.stages_per_rank)
    compute = work * again * (1 + waiting) / (plan.ranks * gpu.peak * (utilization or gpu.utilization))
    communication = _communication(shape, plan, gpu.link, network)
    seconds = max(compute, communication)
    return Speed(
        tokens / seconds, work / (seconds * plan.ranks * gpu.peak), compute, communication, waiting / (1 + waiting)
    )


def _communication(shape: Shape, plan: Plan, link: float, network: float) -> float:
    """Seconds that a step's transfers take: parameters and gradients between data parallel ranks, states between layers
    of tensor parallel ones; what a pipeline sends is negligible beside them."""
    held = shape.parameters / (plan.tensor * plan.stages)
    gather = HALF if plan.cast else FLOAT
    seconds = 0.0
    if plan.shard > 1:
        ring = (plan.shard - 1) / plan.shard
        passes = 1 if plan.gathered_whole else 2
        reduced = gather if plan.mixed == "PURE" else FLOAT
        size = held * ring * (passes * gather + reduced) * plan.microbatches
        seconds += size / _bandwidth(plan, plan.shard, plan.tensor, link, network)
    if plan.replicate > 1:
        size = held / plan.shard * 2 * (plan.replicate - 1) / plan.replicate * FLOAT
        seconds += size / _bandwidth(plan, plan.replicate, plan.shard * plan.tensor, link, network)
    if plan.tensor > 1:
        # Four all-gathers and four reduce-scatters a layer and step (arXiv 2205.05198), of hidden states.
        tokens = plan.batch * plan.length / (plan.replicate * plan.shard)
        ring = (plan.tensor - 1) / plan.tensor
        size = 8 * shape.layers / plan.stages * tokens * shape.hidden * plan.element * ring
        seconds += size / _bandwidth(plan, plan.tensor, 1, link, network)
    return seconds


def _bandwidth(plan: Plan, size: int, step: int, link: float, network: float) -> float:
    """Bytes a second of a ring through ``size`` ranks, each ``step`` after the one before; one of several rings, each
    of which leaves the node by the network card of another member."""
    if size * step <= plan.ranks_per_node:
        return link
    return min(link, network * max(1, plan.ranks_per_node // step))
