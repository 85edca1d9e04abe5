"""What a run takes of a GPU's memory, and how fast it can be: formulas alone, nothing is built.

``docs/planning.md`` derives each formula and says what it is checked against. Sizes are bytes on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["GPU", "GPUS", "Memory", "Plan", "Shape", "Speed", "activation_bytes", "estimate_memory", "estimate_speed"]

FLOAT, HALF = 4, 2


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
class Shape:
    """Sizes of a decoder with gated MLPs and rotary positions (Llama, Mistral, Qwen)."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool

    @property
    def block(self) -> int:
        """Parameters of a decoder layer: four projections, three matrices of the MLP, two norms."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate + 2)

    @property
    def outside(self) -> int:
        """Parameters that are in no layer: embedding, head where it is another matrix, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.outside

    def flops_per_token(self, length: int) -> int:
        """Of a training step, per token of rows of ``length``: 6 a multiplying parameter, 12 L H S for attention.

        PaLM (arXiv 2204.02311, appendix B); an embedding multiplies only where it is the head too.
        """
        multiplying = self.parameters - (0 if self.tied else self.vocabulary * self.hidden)
        return 6 * multiplying + 12 * self.layers * self.heads * self.head_size * length


@dataclass(frozen=True)
class Plan:
    """A run on GPUs.

    Attributes:
        length: tokens of a row.
        rows: of a micro-batch on each rank.
        batch: rows of a global batch.
        half: whether matrices multiply in half precision (``amp_bf16``); parameters stay float32 in any case.
        replicate, shard, tensor, stages: sizes of the layout, see :mod:`cheapertraining.distributed.parallelism`.
        schedule: of the pipeline.
        stages_per_rank: of the interleaved schedule.
        flash: attention that needs no mask for packed documents (flash_attention_2).
        checkpointing: only inputs of layers are kept for the backward pass.
        gathered_whole: FSDP2 keeps gathered layers till their backward pass (``reshard_after_forward: false``).
        chunk: tokens whose logits exist at a time; None is all of a micro-batch.
        teacher: parameters of a live teacher, 0 for none.
        teacher_sharded: whether it is cut as the student is.
        ranks_per_node: GPUs in a node.
    """

    length: int
    rows: int
    batch: int
    half: bool = True
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    stages: int = 1
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    stages_per_rank: int = 1
    flash: bool = True
    checkpointing: bool = False
    gathered_whole: bool = False
    chunk: int | None = None
    teacher: int = 0
    teacher_sharded: bool = False
    ranks_per_node: int = 8

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tensor * self.stages

    @property
    def microbatches(self) -> int:
        """Of a step on each rank."""
        return max(1, self.batch // (self.replicate * self.shard * self.rows))


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU at the fullest moment.

    Attributes:
        parameters, gradients, optimizer: float32; two moments of AdamW.
        gathered: whole layers of FSDP2 and their gradients before they are cut; half-precision copies of autocast;
            DDP's buckets.
        activations: kept for the backward pass, over all micro-batches under way.
        logits: with their log-softmax and their gradient.
        teacher: its weights and logits.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(float(getattr(self, field.name)) for field in fields(self))


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


def estimate_memory(shape: Shape, plan: Plan) -> Memory:
    """Memory of the fullest GPU: under a pipeline one at its ends, which have embedding or head besides layers."""
    layers, outside = shape.layers / plan.stages, _outside(shape, plan)
    here = layers * shape.block + outside
    held = here / (plan.shard * plan.tensor)
    gather = HALF if plan.half else FLOAT
    if plan.shard > 1:
        blocks = layers if plan.gathered_whole else min(2.0, layers)  # the one at work and the next
        whole = (blocks * shape.block + outside) * gather + shape.block * (gather + FLOAT)
        gathered = whole / plan.tensor
    else:
        gathered = held * (HALF if plan.half else 0) + (held * FLOAT if plan.replicate > 1 else 0)
    tokens = plan.rows * plan.length
    logits = (tokens if plan.chunk is None else min(plan.chunk, tokens)) * shape.vocabulary * 3 * FLOAT / plan.tensor
    share = plan.shard if plan.teacher_sharded else 1
    teacher = plan.teacher * gather / share + (logits * 2 / 3 if plan.teacher else 0.0)
    return Memory(
        parameters=held * FLOAT,
        gradients=held * FLOAT,
        optimizer=2 * held * FLOAT,
        gathered=gathered,
        activations=_activations(shape, plan, layers, tokens),
        logits=logits,
        teacher=teacher,
    )


def activation_bytes(shape: Shape, half: bool, mask: int = 0) -> int:
    """Bytes that a decoder layer of transformers keeps of a token for its backward pass.

    Twice: the input of a norm and its normalized form, and what the matrices take: the product with the norm's weight,
    or in half precision a copy for each of five matrices. Queries, keys and values (repeated for each head), what
    attention gives, and that once more in the order of tokens. Of the MLP: gate, its SiLU, up, and their product.

    Args:
        shape: of the model.
        half: whether matrices multiply in half precision (autocast).
        mask: tokens of a row, where attention keeps a mask of numbers (sdpa with packed documents); 0 for none.
    """
    width, element = shape.heads * shape.head_size, HALF if half else FLOAT
    norms = (4 * FLOAT + (5 * HALF if half else 2 * FLOAT)) * shape.hidden
    # A normalizer of each norm, a log-sum-exp of each head.
    small = FLOAT * (2 + shape.heads)
    return norms + element * (5 * width + 4 * shape.intermediate + mask) + small


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


def _outside(shape: Shape, plan: Plan) -> float:
    """Parameters beside the layers on the fullest rank."""
    return shape.outside if plan.stages == 1 else shape.vocabulary * shape.hidden + shape.hidden


def _activations(shape: Shape, plan: Plan, layers: float, tokens: int) -> float:
    whole = activation_bytes(shape, plan.half, 0 if plan.flash else plan.length)
    kept = layers * FLOAT * shape.hidden + whole if plan.checkpointing else layers * whole
    # Of the last norm and the head; cos and sin of the positions; ids and targets.
    ends = (2 * FLOAT + (HALF if plan.half else FLOAT)) * shape.hidden + 2 * FLOAT * shape.head_size + 5 * FLOAT
    under_way = 1
    if plan.stages > 1:
        every = plan.microbatches
        under_way = every if plan.schedule == "gpipe" else min(every, plan.stages + plan.stages_per_rank - 1)
    return tokens * (kept + ends) * under_way / plan.tensor


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
