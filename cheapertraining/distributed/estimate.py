"""What a run takes of a GPU's memory: formulas alone, nothing is built and no torch is imported.

    shape = shape_of_model(config.model, vocabulary)
    memory_of_run(config, shape, world_size, on_gpu=True).total        # bytes of the fullest rank

``docs/planning.md`` derives each formula and says what it is checked against. Sizes are bytes on one rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cheapertraining.config import ModelConfig, RunConfig, TeacherConfig
from cheapertraining.distributed.layout import plan_layout, plan_stages
from cheapertraining.errors import UserError

__all__ = [
    "Memory",
    "Plan",
    "Shape",
    "estimate_memory",
    "kept_bytes",
    "layer_bytes",
    "memory_by_stage",
    "memory_of_run",
    "plan_of_run",
    "shape_of_model",
]

FLOAT, HALF = 4, 2
CHUNK_LOGITS, BLOCK_LOGITS = {False: 1 << 22, True: 1 << 27}, {False: 1 << 18, True: 1 << 27}
"""Logits that the distillation loss makes at a time, and works on at a time; on a CPU, and on a GPU (True)."""
CHUNK_TOKENS = 128
"""Tokens that it makes logits of, at least."""


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
    def norms(self) -> int:
        """Parameters of the norms of a layer, which tensor parallelism does not cut."""
        return 2 * self.hidden

    @property
    def matrix(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters that are in no layer: embedding, head where it is another matrix, last norm."""
        return self.matrix * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.outside

    def flops_per_token(self, length: int) -> int:
        """Of a training step, per token of rows of ``length``: 6 a multiplying parameter, 12 L H S for attention.

        PaLM (arXiv 2204.02311, appendix B); an embedding multiplies only where it is the head too.
        """
        multiplying = self.parameters - (0 if self.tied else self.matrix)
        return 6 * multiplying + 12 * self.layers * self.heads * self.head_size * length


@dataclass(frozen=True)
class Plan:
    """A run on GPUs; :func:`plan_of_run` makes it of a config.

    Attributes:
        length: tokens of a row.
        rows: of a micro-batch on each rank.
        batch: rows of a global batch.
        half: whether matrices multiply in half precision (``amp_bf16``); parameters stay float32 in any case.
        replicate, shard, tensor, stages: sizes of the layout, see :mod:`cheapertraining.distributed.layout`.
        schedule: of the pipeline.
        stages_per_rank: of the interleaved schedule.
        flash: attention that needs no mask for packed documents (flash_attention_2).
        checkpointing: only inputs of layers are kept for the backward pass.
        gathered_whole: FSDP2 keeps gathered layers till their backward pass (``reshard_after_forward: false``).
        fsdp: whether FSDP gathers parameters; it does so under tensor parallelism too.
        mixed: ``mixed_precision`` of FSDP.
        offloaded: shards, gradients and optimizer state are in host memory (``cpu_offload``).
        chunk, block: tokens of the distillation loss whose logits exist at a time, and that elementwise work is done
            on; None is the cross entropy of all of a micro-batch.
        teacher: bytes of a live teacher's weights.
        live: whether a teacher's logits are made beside the student's.
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
    fsdp: bool = False
    mixed: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    offloaded: bool = False
    chunk: int | None = None
    block: int = 0
    teacher: float = 0.0
    live: bool = False
    ranks_per_node: int = 8

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tensor * self.stages

    @property
    def microbatches(self) -> int:
        """Of a step on each rank."""
        return max(1, -(-self.batch // (self.replicate * self.shard * self.rows)))

    @property
    def element(self) -> int:
        """Bytes of a number that matrices multiply."""
        return HALF if self.half else FLOAT

    @property
    def cast(self) -> bool:
        """Whether FSDP gathers parameters in half precision, and passes states between layers in it."""
        return self.half and self.fsdp and self.mixed != "FULL"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank at the fullest moment.

    Attributes:
        parameters, gradients, optimizer: float32; two moments of AdamW.
        gathered: whole layers of FSDP and their gradients before they are cut; half-precision copies of autocast;
            DDP's buckets; what a pipeline's stages receive and send.
        activations: kept for the backward pass, of a micro-batch, under a pipeline of all that are under way.
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


# ---- from a run --------------------------------------------------------------------------------------------
def memory_of_run(
    config: RunConfig, shape: Shape, world_size: int, *, on_gpu: bool, teacher: Shape | None = None
) -> Memory:
    """What each part of a run takes of its fullest rank, in bytes; nothing is read or built.

    Left out are what mixing strategies and influence scores measure on the side, and what the allocator, cuBLAS and
    NCCL have for themselves.

    Args:
        config: of the run.
        shape: of its model, see :func:`shape_of_model`.
        world_size: processes that train it.
        on_gpu: whether on CUDA, which decides what ``precision``, ``attention`` and the teacher's ``auto`` are.
        teacher: of a live teacher that is another model; without it that is left out.

    Raises:
        UserError: the layout does not fit ``world_size``, or the batch cannot be divided.
    """
    return estimate_memory(shape, plan_of_run(config, shape, world_size, on_gpu=on_gpu, teacher=teacher))


def plan_of_run(
    config: RunConfig, shape: Shape, world_size: int, *, on_gpu: bool, teacher: Shape | None = None
) -> Plan:
    """What a run's layout and batch come to; arguments and errors are those of :func:`memory_of_run`.

    Micro-batches of ``auto`` size are those that are tried first: all rows of a rank.
    """
    parts = config.parallelism
    layout = plan_layout(parts, world_size)
    size, rows = config.train_loader.global_batch_size, config.train_loader.device_microbatch_size
    if size % layout.data:
        below = size - size % layout.data
        raise UserError(
            f"train_loader.global_batch_size: expected a multiple of the ranks that read samples of their own "
            f"({layout.data}), found {size}. Use {f'{below} or ' if below else ''}{below + layout.data}."
        )
    each = size // layout.data if rows == "auto" else min(rows, size // layout.data)
    half = on_gpu if config.precision == "auto" else config.precision != "fp32"
    attention = config.model.attention
    sharding = parts.fsdp2 or parts.fsdp
    if layout.engine == "pipeline":
        plan_stages(shape.layers, layout.stages, 1 if parts.pp is None else parts.pp.stages)
    plan = Plan(
        length=config.data.seq_len,
        rows=each,
        batch=size,
        half=half,
        flash=attention == "flash_attention_2" or (attention == "auto" and half and on_gpu),
        replicate=layout.replicate,
        shard=layout.shard,
        tensor=layout.tensor,
        stages=layout.stages,
        schedule="1f1b" if parts.pp is None else parts.pp.schedule,
        stages_per_rank=1 if parts.pp is None else parts.pp.stages,
        checkpointing=parts.activation_checkpointing,
        fsdp=layout.engine in ("fsdp", "fsdp2"),
        gathered_whole=parts.fsdp2 is not None and not parts.fsdp2.reshard_after_forward,
        mixed="DEFAULT" if sharding is None else sharding.mixed_precision,
        offloaded=sharding is not None and sharding.cpu_offload,
    )
    return _with_distillation(plan, config, shape, teacher, on_gpu)


def _with_distillation(plan: Plan, config: RunConfig, shape: Shape, teacher: Shape | None, on_gpu: bool) -> Plan:
    settings = config.algorithms.distillation
    if settings is None:
        return plan
    chunk = max(CHUNK_TOKENS, CHUNK_LOGITS[on_gpu] // shape.vocabulary)
    block = max(1, BLOCK_LOGITS[on_gpu] // shape.vocabulary)
    live = settings.cache is None
    weights = 0.0
    if live and settings.teacher.kind == "average":
        weights = shape.parameters * FLOAT / (plan.shard * plan.tensor)
    elif live and settings.teacher.kind == "model" and teacher is not None:
        weights = _teacher_bytes(teacher, settings.teacher, plan, on_gpu)
    return replace(plan, chunk=chunk, block=block, teacher=weights, live=live)


def _teacher_bytes(shape: Shape, who: TeacherConfig, plan: Plan, on_gpu: bool) -> float:
    """Weights of a teacher on a rank: whole, in shards, or in host memory, from where a layer comes at a time."""
    half = on_gpu if who.dtype is None else who.dtype != "float32"
    outside = shape.outside * (HALF if half else FLOAT)
    each = {None: HALF if half else FLOAT, "8bit": 1.0, "4bit": 0.5}[who.quantization] * shape.block
    where = who.placement if who.placement != "auto" else "sharded" if plan.shard > 1 else "replicated"
    if where == "replicated":
        return shape.layers * each + outside
    if where == "offloaded":
        return each + outside
    return (shape.layers * each + outside) / plan.shard + min(2, shape.layers) * each + outside


def shape_of_model(model: ModelConfig, vocabulary: int | None = None) -> Shape:
    """Sizes from a run's ``model`` section, or from the config.json of the Hugging Face folder that it names.

    Args:
        model: the section.
        vocabulary: the tokenizer's, where the section gives none.

    Raises:
        UserError: there is no such folder, it lacks a size, or the vocabulary is not known.
    """
    if model.name_or_path is None:
        size = model.vocab_size or vocabulary
        if size is None:
            raise UserError("model.vocab_size: expected a number, found null. Set it, e.g. model.vocab_size=32000.")
        head = model.hidden_size // model.num_heads
        sizes = (size, model.hidden_size, model.intermediate_size, model.num_layers, model.num_heads)
        return Shape(*sizes, model.num_kv_heads, head, model.tie_embeddings)
    file = Path(model.name_or_path) / "config.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        heads = found["num_attention_heads"]
        return Shape(
            found["vocab_size"],
            found["hidden_size"],
            found["intermediate_size"],
            found["num_hidden_layers"],
            heads,
            found.get("num_key_value_heads") or heads,
            found.get("head_dim") or found["hidden_size"] // heads,
            bool(found.get("tie_word_embeddings")),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file}: expected the sizes of a Llama-like model, found none ({error}). Name such a folder, or set "
            "model.name_or_path=null and the sizes."
        ) from error


# ---- formulas ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Part:
    """What the ranks of a pipeline stage have of a model; without a pipeline all of it.

    Attributes:
        layers: decoder layers.
        first, last: whether the embedding, and whether norm and head are here.
        under_way: layers of micro-batches whose activations are kept at a time.
        logits_under_way: micro-batches whose log-softmax is kept besides the one at work.
        messages: micro-batches' hidden states that are received or sent, for which there are buffers.
    """

    layers: int
    first: bool
    last: bool
    under_way: int
    logits_under_way: int = 0
    messages: int = 0


def estimate_memory(shape: Shape, plan: Plan) -> Memory:
    """Memory of the fullest rank."""
    return max(memory_by_stage(shape, plan), key=lambda memory: memory.total)


def memory_by_stage(shape: Shape, plan: Plan) -> list[Memory]:
    """Memory of each rank of the pipeline; one for all ranks where there is none."""
    return [_memory_of(part, shape, plan) for part in _parts(shape, plan)]


def layer_bytes(shape: Shape, plan: Plan) -> float:
    """Bytes that a decoder layer of transformers keeps of a token of a rank's rows for its backward pass.

    Twice: the input of a norm in float32, its normalized form, and what the matrices take of it: the product with the
    norm's weight, or under autocast a copy for each of five matrices. Queries, keys and values (repeated for each
    head), what attention gives, and that once more in the order of tokens. Of the MLP: gate, its SiLU, up, and their
    product. A normalizer of each norm, a log-sum-exp of each head. Tensor parallelism cuts all but what it gathers for
    the matrices, and the mask that sdpa has for packed documents.
    """
    width = shape.heads * shape.head_size
    wide = plan.half and not plan.cast  # norms give float32, of which autocast makes copies
    norms = 2 * (FLOAT + (HALF if plan.cast else FLOAT)) * shape.hidden
    matrices = (5 if wide else 2) * plan.element * shape.hidden
    inner = plan.element * (5 * width + 4 * shape.intermediate) + FLOAT * (2 + shape.heads)
    mask = 0 if plan.flash else plan.element * plan.length
    return (norms + inner) / plan.tensor + matrices + mask


def _parts(shape: Shape, plan: Plan) -> list[_Part]:
    if plan.stages == 1:
        return [_Part(shape.layers, first=True, last=True, under_way=shape.layers)]
    stages = plan_stages(shape.layers, plan.stages, plan.stages_per_rank)
    every, parts = plan.microbatches, []
    for rank in range(plan.stages):
        here = stages.stages_of(rank)
        layers = [len(stages.layers[stage]) for stage in here]
        first, last = here[0] == 0, here[-1] == stages.stages - 1
        after = plan.stages - 1 - rank
        if plan.schedule == "gpipe":
            passes = every
        elif plan.schedule == "1f1b":
            passes = min(every, after + 1)
        else:  # torch's ScheduleInterleaved1F1B: so many passes forward before the first back, and one more
            passes = min(every * len(here), (len(here) - 1) * plan.stages + 2 * after + 1)
        # A buffer of each micro-batch for what comes, for gradients that come back, and what went is kept too.
        messages = every * ((len(here) - first) + 2 * (len(here) - last))
        behind = every - 1 if plan.schedule == "gpipe" and last else 0
        parts.append(_Part(sum(layers), first, last, passes * max(layers), behind, messages))
    return parts


def _memory_of(part: _Part, shape: Shape, plan: Plan) -> Memory:
    held = _held(part, shape, plan)
    on_device = 0.0 if plan.offloaded else held * FLOAT
    tokens = plan.rows * plan.length
    logits = _logits(shape, plan, tokens, part.logits_under_way) if part.last else 0.0
    return Memory(
        parameters=on_device,
        gradients=on_device,
        optimizer=2 * on_device,
        gathered=_gathered(part, shape, plan, held, tokens),
        activations=_kept(part, shape, plan) + _again(shape, plan, logits),
        logits=logits,
        teacher=(plan.teacher + _chunk(plan, tokens) * shape.vocabulary * FLOAT * plan.live) * part.last,
    )


def _held(part: _Part, shape: Shape, plan: Plan) -> float:
    """Parameters of a rank."""
    matrices, norms = part.layers * (shape.block - shape.norms), part.layers * shape.norms
    if part.first or (part.last and plan.stages > 1):
        matrices += shape.matrix
    if part.first and part.last and not shape.tied:
        matrices += shape.matrix
    if part.last:
        norms += shape.hidden
    return (matrices / plan.tensor + norms) / plan.shard


def _gathered(part: _Part, shape: Shape, plan: Plan, held: float, tokens: int) -> float:
    if plan.fsdp:
        gather = HALF if plan.cast else FLOAT
        reduced = HALF if plan.cast and plan.mixed == "PURE" else FLOAT
        blocks = part.layers if plan.gathered_whole else min(2, part.layers)  # the one at work and the next
        whole = (blocks * shape.block + shape.outside) * gather + shape.block * (gather + reduced)
        copies = (part.layers * shape.block + shape.matrix) * HALF if plan.half and not plan.cast else 0.0
        return (whole + copies) / plan.tensor
    embedded = shape.matrix if part.first and not (part.last and shape.tied) else 0  # looked up, not multiplied
    copies = (held - embedded) * HALF if plan.half else 0.0
    buckets = held * FLOAT if plan.replicate > 1 else 0.0
    return copies + buckets + part.messages * tokens * shape.hidden * FLOAT


def kept_bytes(shape: Shape, plan: Plan) -> float:
    """What autograd keeps of a micro-batch for its backward pass, but for the logits' log-softmax; no pipeline."""
    return _kept(_parts(shape, plan)[0], shape, plan)


def _kept(part: _Part, shape: Shape, plan: Plan) -> float:
    ends = (2 * FLOAT * shape.hidden / plan.tensor + plan.element * shape.hidden) if part.last else 0.0
    ends += 2 * FLOAT * shape.head_size + 5 * FLOAT  # cos and sin of the positions; ids and targets
    if plan.checkpointing:
        each = (HALF if plan.cast else FLOAT) * shape.hidden / plan.tensor  # the layer's input
    else:
        each = layer_bytes(shape, plan)
    return plan.rows * plan.length * (part.under_way * each + ends)


def _again(shape: Shape, plan: Plan, logits: float) -> float:
    """Of a checkpointed layer that runs once more, when of the logits only they and their gradient are left."""
    return max(0.0, plan.rows * plan.length * layer_bytes(shape, plan) - logits / 2) if plan.checkpointing else 0.0


def _logits(shape: Shape, plan: Plan, tokens: int, behind: int) -> float:
    """Of the loss: logits, log-softmax, and its gradient before and after; half-precision ones are kept besides."""
    each = shape.vocabulary / plan.tensor
    if plan.chunk is not None:
        # Those of a chunk, and five temporaries of a block; the head's gradient, and in half precision two copies.
        head = (FLOAT + (2 * FLOAT if plan.cast else 0)) * shape.matrix
        return (_chunk(plan, tokens) + 5 * min(plan.block, tokens)) * each * FLOAT + head
    if plan.tensor > 1:  # cross entropy over a cut vocabulary works in place
        return 3 * FLOAT * tokens * each
    return tokens * each * (3 * FLOAT + plan.element + behind * FLOAT)


def _chunk(plan: Plan, tokens: int) -> int:
    return tokens if plan.chunk is None else min(plan.chunk, tokens)
