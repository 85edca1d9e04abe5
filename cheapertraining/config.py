"""What a yaml may say: typed dataclasses, and how parts, run file and command line become one of them.

A run is composed in this order, later on top: the parts named under ``compose`` (``model: llama_tiny`` takes
in ``yamls/model/llama_tiny.yaml``), the run yaml's own keys, then ``key=value`` overrides. ``${variables.x}``
refers to the free-form ``variables``. Everything is checked (:mod:`cheapertraining.strict`), all problems are
reported at once, and nothing heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from cheapertraining.errors import UserError, nearest
from cheapertraining.strict import Check, Problems, above, between, build, duration

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

__all__ = [
    "DataConfig",
    "DistillationConfig",
    "InfluenceScoresConfig",
    "ModelConfig",
    "OnlineMixingConfig",
    "RunConfig",
    "check_batch_size",
    "check_prepared",
    "data_config_names",
    "load_data_config",
    "load_run_config",
    "planned_tokens",
    "resolved_yaml",
    "split_duration",
]

Count = Annotated[int, between(1)]
"""A whole number of at least 1."""
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, between(0)]
Share = Annotated[float, between(0, 1)]
Duration = Annotated[str, duration("ba", "tok", "sp")]
"""How long to train: batches (optimizer steps), tokens, or samples."""
Interval = Annotated[str, duration("ba", "tok", "sp", "dur")]
Batches = Annotated[str, duration("ba", zero=True)]
FolderName = Annotated[
    str, Check("text of letters, digits and . _ -", lambda text: re.fullmatch(r"\w[\w.-]*", text) is not None)
]
LocalFolder = Annotated[
    str, Check("text that names a local folder", lambda text: "://" not in text and not re.search(r"[{}]", text))
]
Span = Annotated[str, duration("ba", "tok", "sp", "dur", zero=True)]
"""A part of the run, in the unit of ``max_duration`` or as a share of it (``dur``)."""


# ---- data --------------------------------------------------------------------------------------------------
@dataclass
class SourceConfig:
    """One training domain; its shards are in ``<local>/<split>``, downloaded from ``<remote>/<split>`` where set."""

    weight: NonNegative = 1.0
    """Sampling weight at the start, relative to the other sources'."""
    local: str | None = None
    """null is ``<data.local>/<name>``; likewise ``remote``."""
    remote: str | None = None
    max_epochs: Positive | None = None
    """No more passes than this over the source, whatever its weight."""
    from_batch: Annotated[int, between(0)] = 0
    """First batch that may have samples of it; the others share its weight until then."""


@dataclass
class ProbeConfig:
    """A target to steer the mixture towards: the ``probe`` split of ``source``, or a shard folder of its own."""

    source: str | None = None
    local: str | None = None
    remote: str | None = None
    weight: NonNegative = 1.0


@dataclass
class DataConfig:
    """Sources and probes, and the folder they are in."""

    local: str
    """Folder that holds ``<source>/<split>`` shard folders, and that remote shards are downloaded to."""
    seq_len: Count
    sources: dict[str, SourceConfig]
    probes: dict[str, ProbeConfig] = field(default_factory=dict)
    remote: str | None = None
    tokenizer: str | None = None
    """Tokenizer folder; null is ``<local>/tokenizer``."""
    on_exhaustion: Literal["cycle", "stop", "renormalize"] = "cycle"
    """When a source was passed through (or max_epochs times): begin anew, end the run, or leave it out."""
    shuffle_block_size: Count = 65536
    """Samples that are shuffled together, in blocks of whole shards."""
    cache_limit: str | None = None
    """Disk space for downloaded shards, e.g. ``100gb``."""
    validate_hash: str | None = None
    """Check downloaded shards against this hash, e.g. ``xxh64``."""
    download_retry: Annotated[int, between(0)] = 2
    prepare_hint: str | None = None
    """What to run when the shards are missing, e.g. ``make sample``."""


# ---- model, tokenizer --------------------------------------------------------------------------------------
@dataclass
class TokenizerConfig:
    path: str | None = None
    """Tokenizer folder; null is ``data.tokenizer``, else ``<data.local>/tokenizer``."""


@dataclass
class ModelConfig:
    """A decoder-only language model: from a local Hugging Face folder, or new from these sizes."""

    name_or_path: str | None = None
    """Local folder to load; its configuration then replaces the sizes below."""
    architecture: Literal["llama"] = "llama"
    vocab_size: Count | None = None
    """null is the tokenizer's."""
    hidden_size: Count = 128
    intermediate_size: Count = 352
    num_layers: Count = 4
    num_heads: Count = 4
    num_kv_heads: Count = 4
    """Below num_heads: grouped-query attention."""
    max_position_embeddings: Count = 2048
    tie_embeddings: bool = True
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = "auto"
    trust_remote_code: bool = False


# ---- loaders -----------------------------------------------------------------------------------------------
@dataclass
class TrainLoaderConfig:
    global_batch_size: Count = 32
    """Samples per optimizer step over all processes. Part of the data order: keep it when you resume."""
    device_microbatch_size: Count | Literal["auto"] = "auto"
    """Samples per forward pass; ``auto`` halves on CUDA out-of-memory, and is the whole batch on CPU."""
    num_workers: Annotated[int, between(0)] = 0
    prefetch_factor: Count = 4
    persistent_workers: bool = False
    pin_memory: bool = False
    lag: Count = 8
    """Batches from a weight change to the first one drawn with it; at least num_workers * prefetch_factor."""
    allow_source_changes: bool = False
    """Resume with other data.sources than the checkpoint's: those that stay go on, new ones begin at their weight."""


@dataclass
class EvalLoaderConfig:
    batch_size: Count = 32
    """Samples per forward pass and process."""
    interval: Interval = "100ba"
    subset_num_batches: Count | Literal[-1] = -1
    """Batches of each held-out split; -1 is all."""
    first: bool = True
    """Evaluate once before the first step."""


# ---- optimization ------------------------------------------------------------------------------------------
@dataclass
class OptimizerConfig:
    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Annotated[float, between(0, 0.999999)], Annotated[float, between(0, 0.999999)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    """Applies to matrices; norms and biases are left alone."""


@dataclass
class SchedulerConfig:
    """Linear warm-up, then constant with a linear decay at the end (wsd), a cosine, or constant."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: Span = "0ba"
    decay: Span = "0.2dur"
    """Length of the final decay (wsd only)."""
    alpha_f: Share = 0.1
    """Share of the learning rate that is left at the end."""


# ---- algorithms --------------------------------------------------------------------------------------------
@dataclass
class GradientClippingConfig:
    threshold: Positive = 1.0
    """Largest norm of the gradient of all parameters together."""


@dataclass
class ConstraintsConfig:
    """What sampling weights may be; weights are projected onto it after each decision."""

    floor: Share = 0.01
    ceiling: Share = 1.0
    kl_step: Positive | None = 0.5
    """Largest KL divergence of one step, in nats; null for no limit."""
    kl_prior: Positive | None = None
    """Largest KL divergence from the weights at the start, in nats."""
    max_epochs: Positive | None = None
    """Projected passes over any source by the end of the run."""


@dataclass
class InfluenceConfig:
    """Strategy ``influence``: move weight towards sources whose samples lower the loss on the probes."""

    learning_rate: Positive = 1.0
    """Step of the exponentiated-gradient update of the weights."""
    probe_samples: Count = 8
    """Samples of each probe in a measurement, of every strategy that measures."""
    source_samples: Annotated[int, between(2)] = 4
    """Samples of each source in a measurement, of every strategy that measures."""
    ema: Share = 0.9
    """Share of the old scores kept at each update."""
    metric: Literal["raw", "adam", "cosine", "layer_scale", "datainf", "kfac", "ekfac"] = "raw"
    """Inner product of gradients as they are, by the optimizer's second moments, divided by the norm of each source's
    own (scorer ``hook``), or by a curvature."""
    scorer: Literal["forward", "hook", "loop", "microbatch"] = "forward"
    """Forward passes along a direction; a backward pass, for half precision; one a sample, for any model; or none of
    its own: training's microbatches hold one source each, and their gradients are looked at as they add up."""
    layers: str | list[str] = "all"
    """Parameters that count: ``all``, ``embedding_and_output``, ``last_<k>`` (decoder blocks), or glob patterns."""
    probes: dict[str, NonNegative] | None = None
    """Fixed weights in the objective, in place of data.probes.<name>.weight; a probe that is not named is not
    measured."""
    step_size: Positive = 1e-4
    """Length of the look-ahead step, relative to the norm of the parameters."""
    threshold: NonNegative = 2.5
    """Scores nearer to the mean than this many standard errors count as no evidence."""
    update: Literal["exponentiated", "kl_proximal"] = "exponentiated"
    """The second also holds the weights near those at the start."""
    combine: bool = False
    """One direction for all probes together: cheaper by their number, but scores by probe are not seen."""
    robust: bool = False
    """Give the probes that improve least more weight in the objective."""
    guard: bool = False
    """Go back towards the weights at the start where predicted changes of the probes' losses do not come true."""


@dataclass
class ProportionalConfig:
    temperature: Positive = 1.0
    """1 is proportional to size; larger is more even."""


@dataclass
class UniMaxConfig:
    max_epochs: Positive = 4.0


@dataclass
class SchedulePointConfig:
    """Weights at one moment of the run; between two points they change linearly."""

    weights: dict[str, NonNegative]
    tokens: Annotated[int, between(0)] | None = None
    batch: Annotated[int, between(0)] | None = None


@dataclass
class ScheduleConfig:
    points: list[SchedulePointConfig] = field(default_factory=list)


@dataclass
class DoGEConfig:
    """Weight to the sources whose gradients are aligned with the others'."""

    mu: Positive = 0.05
    """Smaller moves the weights faster."""
    max_score: Positive = 5.0
    smoothing: Share = 0.0
    """Share of the uniform mixture mixed in; likewise below."""
    target: bool = False
    """Aligned with the probes' gradients (out-of-domain mode) in place of the other sources'."""


@dataclass
class DoReMiConfig:
    """Weight to the sources on which the model is furthest behind a reference model."""

    reference: str | None = None
    """A Hugging Face folder, or a checkpoint (.pt) of a run with this run's model."""
    step: Positive = 1.0
    smoothing: Share = 1e-3


@dataclass
class ODMConfig:
    """A bandit that is rewarded with loss."""

    ema: Annotated[float, between(0, 0.999999)] = 0.9
    """Share of the old reward kept at each decision."""


@dataclass
class PiKEConfig:
    """Squared norm of each source's gradient against its noise."""

    signal: NonNegative = 0.1
    noise: NonNegative = 0.1
    tilt: NonNegative = 0.0
    """Above 0, the fair variant: towards the sources with the largest losses."""


@dataclass
class RnBConfig:
    """A softmax of what each source's gradient does for a target mixture of the sources."""

    temperature: Positive = 0.1
    target: dict[str, NonNegative] | None = None
    """null is the weights at the start."""
    ema: Annotated[float, between(0, 0.999999)] = 0.0
    """Share of the old gradients' products kept at each decision."""


@dataclass
class MatchingConfig:
    """The mixture whose gradient is nearest to the probes' own."""

    ridge: NonNegative = 0.3
    """How strongly the noise of the gradients pulls to the weights at the start; 1 is its size."""
    ema: Annotated[float, between(0, 0.999999)] = 0.5
    """Share of the old gradients' products kept at each decision."""


@dataclass
class GRAPEConfig:
    """Several probes, those that improve least first."""

    mu_weights: Positive = 0.05
    mu_probes: Positive = 0.05


@dataclass
class AioliConfig:
    """Rounds of stretches that lean on one source each, then of training on what they taught."""

    eta: Positive = 0.2
    one_hot: Annotated[float, between(0.01, 1)] = 0.75
    """Share of the source that a stretch leans on."""
    rounds: Count = 1
    """Stretches of each source in a round."""
    stretch: Count = 1
    """Decisions that a stretch lasts; best at least the lag of new weights."""
    hold: Count = 8
    """Decisions of training between two sweeps over the sources."""
    ema: Annotated[float, between(0, 0.999999)] = 0.0


@dataclass
class SkillItConfig:
    """The probes' losses, sent back along a graph of which source teaches which probe."""

    eta: Positive = 0.2
    window: Count = 3
    """Decisions whose losses are summed."""
    graph: dict[str, dict[str, NonNegative]] | None = None
    """{source: {probe: strength}}; null: learnt at the start by stretches as Aioli's."""
    one_hot: Annotated[float, between(0.01, 1)] = 0.75
    rounds: Count = 1
    stretch: Count = 1


@dataclass
class MixingLawConfig:
    """The optimum of a law that is fitted to finished runs (tools/fit_mixing_law.py collects and judges them)."""

    table: str | None = None
    """CSV or JSON lines with weight/<source> and loss/<target> columns, a row a run."""
    losses: str | None = None
    """In RegMix's layout: the second CSV file, of losses; ``table`` then is that of the mixtures."""
    targets: dict[str, Positive] | None = None
    """Weights of the targets that count; null is all, equally."""
    kl: NonNegative = 0.1
    """Price of a nat from the weights at the start, in loss."""
    max_epochs: Positive | None = 4.0
    """Passes over a source by the end of the run."""


@dataclass
class RegMixConfig:
    """The same by boosted trees."""

    table: str | None = None
    losses: str | None = None
    targets: dict[str, Positive] | None = None
    max_epochs: Positive | None = 4.0


@dataclass
class OnlineMixingConfig:
    """Changes the mixture while it trains."""

    strategy: Literal[
        "static",
        "proportional",
        "unimax",
        "schedule",
        "influence",
        "doge",
        "doremi",
        "odm",
        "ado",
        "skillit",
        "pike",
        "rnb",
        "matching",
        "grape",
        "aioli",
        "mixing_law",
        "regmix",
    ] = "influence"
    interval: Annotated[str, duration("ba")] = "40ba"
    """Batches between two decisions."""
    warmup: Batches = "25ba"
    """Batches before the first decision."""
    updates: Count | list[Count] | None = None
    """Few decisions in place of one every interval: how many, spread from the warm-up on, or after which batches."""
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    proportional: ProportionalConfig = field(default_factory=ProportionalConfig)
    unimax: UniMaxConfig = field(default_factory=UniMaxConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    doge: DoGEConfig = field(default_factory=DoGEConfig)
    doremi: DoReMiConfig = field(default_factory=DoReMiConfig)
    odm: ODMConfig = field(default_factory=ODMConfig)
    skillit: SkillItConfig = field(default_factory=SkillItConfig)
    pike: PiKEConfig = field(default_factory=PiKEConfig)
    rnb: RnBConfig = field(default_factory=RnBConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    grape: GRAPEConfig = field(default_factory=GRAPEConfig)
    aioli: AioliConfig = field(default_factory=AioliConfig)
    mixing_law: MixingLawConfig = field(default_factory=MixingLawConfig)
    regmix: RegMixConfig = field(default_factory=RegMixConfig)


@dataclass
class InfluenceScoresConfig:
    """Scores every training sample against the probes within the training pass, and logs means by source."""

    estimator: Literal["dot", "adam", "datainf", "ekfac"] = "adam"
    layers: str | list[str] = "all"
    """``all``, ``embedding_and_output``, ``last_<k>`` (decoder blocks), or glob patterns of parameter names."""
    probe_samples: Count = 16
    """Samples of each probe in a direction."""
    refresh: Annotated[str, duration("ba")] = "25ba"
    """Batches that a direction serves before it is made anew."""
    log_interval: Annotated[str, duration("ba")] = "10ba"


@dataclass
class RampConfig:
    """A number that goes from one to another, then stays."""

    first: NonNegative
    last: NonNegative
    shape: Literal["linear", "cosine"] = "linear"


@dataclass
class TeacherConfig:
    """Who teaches: another model, the student without its adapters, or an average of what the student was."""

    kind: Literal["model", "adapters_off", "average"] = "model"
    path: str | None = None
    """A Hugging Face folder, or a checkpoint (.pt) of a run. With a cache: what it must have been made with."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null is float32 on CPU and bfloat16 on CUDA."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Of the weights, by bitsandbytes; CUDA only."""
    placement: Literal["auto", "replicated", "sharded", "offloaded"] = "auto"
    """Whole on each process (of a pipeline, the last), sharded as the student, in main memory; auto: as the student."""
    decay: Annotated[float, between(0, 0.999999)] = 0.999
    """Of the average, a step."""
    trust_remote_code: bool = False


@dataclass
class HiddenMatchConfig:
    """Draw the states after one decoder layer to the teacher's."""

    weight: Positive = 1.0
    student_layer: int = -1
    """From 0, or from the end with -1 the last; likewise below."""
    teacher_layer: int = -1
    form: Literal["mse", "cosine"] = "mse"


@dataclass
class RelationMatchConfig:
    """Draw relations among queries, keys and values of one decoder layer to the teacher's."""

    weight: Positive = 1.0
    student_layer: int = -1
    teacher_layer: int = -1
    heads: Count = 1
    """A divisor of the widths of queries, keys and values of both."""
    form: Literal["scaled", "cosine"] = "scaled"
    temperature: Positive = 1.0


@dataclass
class OnPolicyConfig:
    """In some batches the student writes the answers itself, a pass for each token: slow."""

    share: Share = 0.25
    """Of the batches."""
    temperature: Positive = 1.0


@dataclass
class DistillationConfig:
    """Learn from a teacher: (1 - alpha) cross-entropy + alpha T^2 divergence from the teacher's distribution."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cache: LocalFolder | None = None
    """What tools/cache_teacher.py wrote for the shards; no teacher is loaded then."""
    alpha: Share | RampConfig = 0.9
    temperature: Positive | RampConfig = 1.0
    """T; with a cache always that of the cache."""
    ramp: Span = "1dur"
    """How long alpha and temperature take where they change."""
    divergence: Literal[
        "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"
    ] = "forward_kl"
    divergence_weight: Annotated[float, between(1e-6, 1 - 1e-6)] | None = None
    """Of jensen_shannon (null: 0.5) and the skewed ones (null: 0.1)."""
    source_weights: dict[str, NonNegative] = field(default_factory=dict)
    """Factors of the divergence by source, 1 where none is given; sources at 0 need no cache."""
    hidden: HiddenMatchConfig | None = None
    relations: RelationMatchConfig | None = None
    on_policy: OnPolicyConfig | None = None
    log_interval: Annotated[str, duration("ba")] = "10ba"


@dataclass
class AlgorithmsConfig:
    gradient_clipping: GradientClippingConfig | None = None
    online_mixing: OnlineMixingConfig | None = None
    influence_scores: InfluenceScoresConfig | None = None
    distillation: DistillationConfig | None = None


# ---- callbacks, loggers ------------------------------------------------------------------------------------
@dataclass
class SpeedMonitorConfig:
    window_size: Count = 20


@dataclass
class MemoryMonitorConfig:
    """No settings."""


@dataclass
class LRMonitorConfig:
    """No settings."""


@dataclass
class GenerationsConfig:
    """Prompts that the model continues at intervals, for people to read: generations.jsonl, and a table in W&B."""

    prompts: list[str]
    interval: Annotated[str, duration("ba")] = "100ba"
    new_tokens: Count = 48
    """Of each text; a forward pass of all prompts for each."""
    temperature: Positive = 0.7


@dataclass
class CallbacksConfig:
    speed_monitor: SpeedMonitorConfig | None = None
    memory_monitor: MemoryMonitorConfig | None = None
    lr_monitor: LRMonitorConfig | None = None
    generations: GenerationsConfig | None = None


@dataclass
class ConsoleConfig:
    interval: Annotated[str, duration("ba")] = "10ba"


@dataclass
class JsonlConfig:
    """No settings: the log is ``<save_folder>/<run_name>/metrics.jsonl``."""


@dataclass
class WandbConfig:
    project: str = "cheapertraining"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto``: online where a key is found (WANDB_API_KEY or netrc), offline otherwise; it never asks."""


@dataclass
class LoggersConfig:
    progress_bar: bool = False
    console: ConsoleConfig | None = None
    jsonl: JsonlConfig | None = None
    wandb: WandbConfig | None = None


@dataclass
class FSDPConfig:
    """Parameters, gradients and optimizer state in shards, as FullyShardedDataParallel (FSDP1) does it."""

    data_parallel_shard_degree: Count | Literal[-1] = -1
    """Ranks that a model is cut over; -1 is all that are left."""
    data_parallel_replicate_degree: Count | None = None
    """Copies of the cut model (HSDP), best one a node."""
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    """With a half precision: parameters gathered in it and gradients reduced in float32; both in it; neither."""
    cpu_offload: bool = False
    """Keep shards and optimizer state in host memory."""
    load_monolith_rank0_only: bool = False
    """Refused; a key that configs of Composer have."""


@dataclass
class FSDP2Config(FSDPConfig):
    """The same as ``fully_shard`` (FSDP2) does it."""

    reshard_after_forward: bool = True
    """Free a block's gathered parameters between forward and backward; false gathers once, for more memory."""


@dataclass
class TensorParallelConfig:
    """Layers cut across ranks, which read the same samples, and sequences between them."""

    tensor_parallel_degree: Annotated[int, between(1)] | Literal[-1] = -1
    """Ranks that a layer is cut over, best those of one node; -1 is all."""


@dataclass
class PipelineConfig:
    """Decoder layers in stages on different ranks, and micro-batches (device_microbatch_size) going through them."""

    pipeline_parallel_degree: Annotated[int, between(1)] | Literal[-1] = -1
    """Ranks of the pipeline; -1 is all, and others are refused."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """All forward, then all backward; one by one, which keeps fewer activations; or that with several stages a rank."""
    stages_per_rank: Annotated[int, between(2)] = 2
    """Of the interleaved schedule; the others have one."""

    @property
    def stages(self) -> int:
        """Stages on each rank."""
        return self.stages_per_rank if self.schedule == "interleaved" else 1


@dataclass
class ParallelismConfig:
    """How several processes share a model; without fsdp, fsdp2, tp and pp each holds all of it (DDP)."""

    fsdp: FSDPConfig | None = None
    fsdp2: FSDP2Config | None = None
    tp: TensorParallelConfig | None = None
    pp: PipelineConfig | None = None
    activation_checkpointing: bool = False
    """Keep only the inputs of each decoder block, and run it again in the backward pass."""
    compile_blocks: bool = False
    """torch.compile for each decoder block."""
    state_dict_type: Literal["full", "sharded"] = "full"
    """Checkpoints as one file, which rank 0 writes, or as a folder that all ranks write; either loads anywhere."""
    async_save: bool = False
    """Write (sharded) checkpoints in the background, from a copy in host memory."""
    dist_timeout: Positive = 300.0
    """Seconds after which a rank that waits in vain for another gives up, and the job ends."""


# ---- the run -----------------------------------------------------------------------------------------------
@dataclass
class RunConfig:
    """A whole training run. ``null`` in place of an algorithm, callback or logger switches it off."""

    max_duration: Duration
    data: DataConfig
    run_name: FolderName | None = None
    """Folder of the run inside save_folder; null makes one up from the time."""
    seed: Annotated[int, between(0, 2**32 - 1)] = 17
    device: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"] = "auto"
    """``auto`` is fp32 on CPU and amp_bf16 on CUDA."""
    deterministic: bool = False
    """Refuse CUDA kernels that add up in varying order. CPU runs are repeatable without it."""
    save_folder: LocalFolder = "runs"
    save_interval: Interval = "100ba"
    save_num_checkpoints_to_keep: Count | Literal[-1] = 2
    """Newest checkpoints to keep, those of earlier starts of the run included; -1 is all."""
    save_overwrite: bool = False
    """Begin anew in a folder that already has checkpoints."""
    autoresume: bool = False
    """Go on from the run's latest checkpoint where there is one; needs run_name."""
    variables: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train_loader: TrainLoaderConfig = field(default_factory=TrainLoaderConfig)
    eval_loader: EvalLoaderConfig = field(default_factory=EvalLoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)


def split_duration(text: str) -> tuple[float, str]:
    """``"10_000tok"`` as ``(10000.0, "tok")``."""
    unit = text.lstrip("0123456789._")
    return float(text.removesuffix(unit)), unit


def planned_tokens(config: RunConfig) -> int:
    """Tokens (padding included) in the whole run."""
    value, unit = split_duration(config.max_duration)
    rows = {"ba": config.train_loader.global_batch_size, "sp": 1}
    return int(value) if unit == "tok" else int(value) * rows[unit] * config.data.seq_len


# ---- loading -----------------------------------------------------------------------------------------------
@dataclass
class _ComposeConfig:
    """The parts a run takes in: a name (``yamls/<group>/<name>.yaml``) or a path to a yaml file."""

    model: str | None = None
    data: str | None = None
    distributed: str | None = None


@dataclass
class _DataFile:
    """What a data yaml may hold when it is loaded for itself."""

    data: DataConfig
    variables: dict[str, Any] = field(default_factory=dict)


Config = TypeVar("Config", RunConfig, _DataFile)
_Layers = list[tuple[str, dict[str, Any]]]
"""(where it is from, its content), later on top."""


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a yaml and ``key=value`` overrides describe.

    Args:
        path: a file, or the name of a yaml that comes with the package (``mixed_pretrain``).

    Raises:
        UserError: everything that is wrong with it, a line each: key, where it is from, expected, found.
    """
    return _load(RunConfig, _find_yaml(str(path), group=None, beside=None), overrides, _problems_between_parts)


def load_data_config(config: str | Path | Mapping[str, Any] | DataConfig, overrides: Sequence[str] = ()) -> DataConfig:
    """The data part alone, for loops that are not the trainer's.

    Args:
        config: a name (``mixed_pretrain`` is ``yamls/data/mixed_pretrain.yaml``), a path to a yaml, a mapping
            (the content of ``data:``, or with ``data:`` and ``variables:`` at its top), or a config to change.
        overrides: as on the command line, e.g. ``data.sources.code.weight=2``.

    Raises:
        UserError: as :func:`load_run_config`.
    """
    if isinstance(config, DataConfig):
        config = asdict(config)
    base: Path | Mapping[str, Any]
    if isinstance(config, Mapping):
        base = config if "data" in config else {"data": config}
    else:
        base = _find_yaml(str(config), group="data", beside=None)
    return _load(_DataFile, base, overrides, lambda loaded: _data_problems(loaded.data)).data


def data_config_names() -> list[str]:
    """Names of the data configs that come with the package, sorted."""
    return sorted({file.stem for folder in _yaml_folders() for file in (folder / "data").glob("*.yaml")})


def resolved_yaml(config: RunConfig | DataConfig) -> str:
    """The config as yaml text, every default written out; loading it gives the same config."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _load(
    kind: type[Config],
    base: Path | Mapping[str, Any],
    overrides: Sequence[str],
    check: Callable[[Config], Problems],
) -> Config:
    from omegaconf import OmegaConf

    own = (str(base), _read(base)) if isinstance(base, Path) else ("mapping", dict(base))
    layers: _Layers = [own, ("command line", _parse_overrides(overrides))]
    problems: Problems = []
    chosen = OmegaConf.merge(*(content.pop("compose", None) or {} for _, content in layers))
    compose = build(_ComposeConfig, OmegaConf.to_container(chosen), "compose", problems)
    _raise(problems, [])
    beside = base.parent if isinstance(base, Path) else None
    parts = [_find_yaml(name, group, beside) for group, name in asdict(compose).items() if name is not None]
    layers = [(str(part), _read(part)) for part in parts] + layers
    plain = _resolve(OmegaConf.merge(*(content for _, content in layers)), "", problems)
    if kind is _DataFile:  # a data yaml may also bring keys of the run, which do not matter here
        of_the_run = {field.name for field in fields(RunConfig)} - {"data", "variables"}
        plain = {name: value for name, value in plain.items() if name not in of_the_run}
    _raise(problems, layers)
    config = build(kind, plain, "", problems)
    _raise(problems, layers)
    _raise(check(config), layers)
    return cast(Config, config)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    wrong = [text for text in overrides if "=" not in text]
    _raise([(text, "not an override; expected key=value, as in optimizer.lr=3e-4.") for text in wrong], [])
    try:
        return cast("dict[str, Any]", _plain(OmegaConf.from_dotlist(list(overrides))))
    except Exception as error:  # whatever the yaml reader raises, it is the text that is wrong
        raise UserError(f"command line: cannot read {' '.join(overrides)} ({_first_line(error)}).") from error


def _read(path: Path) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    try:
        content = OmegaConf.load(path)
    except Exception as error:  # whatever the yaml reader raises, it is the file that is wrong
        raise UserError(f"{path}: not a readable yaml ({' '.join(str(error).split())}).") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: expected a mapping of keys at the top of the file, found a list or plain text.")
    return cast("dict[str, Any]", _plain(content))


def _plain(content: DictConfig | ListConfig) -> Any:
    """Mappings and lists as written: interpolations are kept as text, missing values as ``???``."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(content, resolve=False)


def _resolve(node: Any, key: str, problems: Problems) -> Any:
    """``node`` as plain data, interpolations filled in; a missing value (``???``) or dangling one is a problem."""
    from omegaconf import DictConfig, ListConfig
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

    if not isinstance(node, DictConfig | ListConfig):
        return node
    result: dict[Any, Any] = {}
    for name in range(len(node)) if isinstance(node, ListConfig) else list(node):
        inner = f"{key}.{name}" if key else str(name)
        if inner == "variables":  # one that nothing refers to may stay without a value
            result[name] = _plain(node[name])
            continue
        try:
            result[name] = _resolve(node[name], inner, problems)
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            wanted = re.search(r"\$\{([\w.]+)\}", str(_plain(node)[name]))
            without = wanted[1] if wanted else inner
            problems.append((without, f"needs a value. Write it there, or give it as {without}=…"))
        except OmegaConfBaseException as error:
            problems.append((inner, f"{_first_line(error)}."))
    return list(result.values()) if isinstance(node, ListConfig) else result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _yaml_folders() -> list[Path]:
    """Where the package's yamls are: inside it (wheel), or beside it (checkout)."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "yamls", package.parent / "yamls") if folder.is_dir()]


def _find_yaml(name: str, group: str | None, beside: Path | None) -> Path:
    """The file that ``name`` stands for: a path, or a name in ``<beside>/<group>`` or the package's yamls."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    folders = [folder / group if group else folder for folder in ([beside] if beside else []) + _yaml_folders()]
    stem = name.removesuffix(".yaml").removeprefix("yamls/")
    for folder in folders:
        if (folder / f"{stem}.yaml").is_file():
            return folder / f"{stem}.yaml"
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    what = f"compose.{group}={name}: no such part" if group and beside else f"{name}: no such yaml"
    raise UserError(f"{what}. Expected a path to a yaml file or one of {', '.join(names)}.{nearest(stem, names)}")


def _raise(problems: Problems, layers: _Layers) -> None:
    """Raise all problems, a line each with the layer the key is from; do nothing where there are none."""
    if problems:
        lines = [f"{key}{_origin(key, layers)}: {text}" for key, text in problems]
        raise UserError("\n".join(dict.fromkeys(lines)))


def _origin(key: str, layers: _Layers) -> str:
    """`` (where)`` of the topmost layer that has ``key``; nothing where none has it."""
    for where, content in reversed(layers):
        node: Any = content
        for part in key.split("."):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                node = node[part]
            else:
                break
        else:
            return f" ({where})"
    return ""


# ---- checks across keys ------------------------------------------------------------------------------------
def check_batch_size(config: RunConfig, world_size: int) -> None:
    """Raise a UserError where the global batch cannot be split evenly over ``world_size`` processes.

    Those that tensor parallelism cuts a layer over, or a pipeline a model, count as one.
    """
    size = config.train_loader.global_batch_size
    if config.parallelism.pp is not None:
        world_size = 1
    if (tensor := config.parallelism.tp) is not None:
        degree = tensor.tensor_parallel_degree
        world_size = 1 if degree == -1 else max(1, world_size // degree)
    if size % world_size:
        below = size - size % world_size
        fitting = f"{below} or {below + world_size}" if below else str(world_size)
        raise UserError(
            f"train_loader.global_batch_size: expected a multiple of the number of processes ({world_size}), "
            f"found {size}. Use {fitting}, or another number of processes."
        )


def check_prepared(data: DataConfig) -> None:
    """Raise a UserError that says what to run where local-only shards do not exist; reads no file."""
    missing = []
    for name, source in data.sources.items():
        folder = Path(source.local) if source.local else Path(data.local) / name
        if not (source.remote or data.remote or (folder / "train" / "index.json").is_file()):
            missing.append(str(folder / "train"))
    if missing:
        more = f", nor of {len(missing) - 1} more sources" if len(missing) > 1 else ""
        present = _config_of_what_is_there(data)
        if present is not None:
            todo = f"{present} names the sources that are there: use compose.data={present}"
        else:
            todo = f"Run: {data.prepare_hint}" if data.prepare_hint else "Make them, or correct data.local."
        raise UserError(f"{missing[0]}: no shards here{more} (no index.json). {todo}")


def _config_of_what_is_there(data: DataConfig) -> Path | None:
    """The data config beside the shards that knows one of these sources: not all need have been made here."""
    for file in (Path(data.local) / "data.yaml", Path(data.local) / "downstream.yaml"):
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if any(line.strip().startswith(f"{name}:") for line in lines for name in data.sources):
            return file
    return None


_TOWARDS_PROBES = ("influence", "matching", "grape", "aioli", "skillit")


def _problems_between_parts(config: RunConfig) -> Problems:
    problems = _data_problems(config.data)
    mixing, model = config.algorithms.online_mixing, config.model
    unit = split_duration(config.max_duration)[1]
    for name, span in {"warmup": config.scheduler.warmup, "decay": config.scheduler.decay}.items():
        value, span_unit = split_duration(span)
        if value and span_unit not in (unit, "dur"):
            expected = f"expected the unit of max_duration ({unit}) or dur, found '{span}'."
            problems.append((f"scheduler.{name}", expected))
    if model.name_or_path is None and config.data.seq_len > model.max_position_embeddings:
        expected = f"expected at least data.seq_len ({config.data.seq_len}), found {model.max_position_embeddings}."
        problems.append(("model.max_position_embeddings", expected))
    if config.autoresume and config.run_name is None:
        problems.append(("run_name", "autoresume needs one, to find the run's checkpoints at the next start."))
    if mixing is not None and mixing.strategy in _TOWARDS_PROBES and not config.data.probes:
        problems.append(("data.probes", f"strategy '{mixing.strategy}' steers towards probes: name at least one."))
    if mixing is not None and mixing.strategy == "doremi" and mixing.doremi.reference is None:
        key = "algorithms.online_mixing.doremi.reference"
        problems.append((key, "strategy 'doremi' compares with a reference model: name its folder or checkpoint."))
    if config.algorithms.influence_scores is not None and not config.data.probes:
        problems.append(("data.probes", "influence_scores are towards probes: name at least one."))
    problems.extend(_distillation_problems(config))
    if mixing is not None and mixing.strategy == "schedule":
        problems.extend(_schedule_problems(mixing.schedule, config.data))
    if mixing is not None:
        problems.extend(_measuring_problems(mixing, config.data))
    return problems + _parallelism_problems(config.parallelism)


def _parallelism_problems(parallelism: ParallelismConfig) -> Problems:
    problems: Problems = []
    if parallelism.fsdp is not None and (parallelism.fsdp2 is not None or parallelism.tp is not None):
        problems.append(("parallelism.fsdp", "cannot be had beside fsdp2 or tp. Set it to null, or use fsdp2 alone."))
    for name in ("fsdp", "fsdp2"):
        section = getattr(parallelism, name)
        if section is not None and section.load_monolith_rank0_only:
            why = "loads only rank 0's shards and leaves the others as they were. Remove it: every rank reads its own."
            problems.append((f"parallelism.{name}.load_monolith_rank0_only", why))
    if parallelism.tp is not None and parallelism.fsdp2 and parallelism.fsdp2.data_parallel_replicate_degree:
        why = "cannot be had beside tp. Set it to null."
        problems.append(("parallelism.fsdp2.data_parallel_replicate_degree", why))
    if parallelism.pp is not None:
        problems.extend(_pipeline_problems(parallelism))
    if parallelism.async_save and parallelism.state_dict_type == "full":
        problems.append(("parallelism.async_save", "needs parallelism.state_dict_type: sharded."))
    return problems


def _pipeline_problems(parallelism: ParallelismConfig) -> Problems:
    problems: Problems = []
    for name in ("fsdp", "fsdp2", "tp"):
        if getattr(parallelism, name) is not None:
            why = f"cannot be had beside {name}: a stage is not cut any further. Set one of the two to null."
            problems.append(("parallelism.pp", why))
    if parallelism.state_dict_type == "sharded":
        why = "a pipeline writes checkpoints as one file, which loads under every layout. Use full."
        problems.append(("parallelism.state_dict_type", why))
    return problems


def _distillation_problems(config: RunConfig) -> Problems:
    settings, key = config.algorithms.distillation, "algorithms.distillation"
    if settings is None:
        return []
    problems: Problems = []
    teacher, live = settings.teacher, settings.cache is None
    if live and teacher.kind == "model" and teacher.path is None:
        problems.append((f"{key}.teacher.path", "expected a model folder or checkpoint, or a cache. Name one."))
    if not live and teacher.kind != "model":
        problems.append((f"{key}.cache", f"a teacher of kind '{teacher.kind}' changes with the student. Use null."))
    for name in ("hidden", "relations", "on_policy"):
        if not live and getattr(settings, name) is not None:
            problems.append((f"{key}.{name}", "needs a live teacher, which a cache is not. Set one to null."))
    for name in settings.source_weights.keys() - config.data.sources.keys():
        problems.append((f"{key}.source_weights.{name}", f"no such source.{nearest(name, config.data.sources)}"))
    if isinstance(settings.alpha, RampConfig) and max(settings.alpha.first, settings.alpha.last) > 1:
        problems.append((f"{key}.alpha", "expected numbers from 0 to 1."))
    if isinstance(settings.temperature, RampConfig) and min(settings.temperature.first, settings.temperature.last) <= 0:
        problems.append((f"{key}.temperature", "expected numbers above 0."))
    value, unit = split_duration(settings.ramp)
    if not value or unit not in (split_duration(config.max_duration)[1], "dur"):
        own = split_duration(config.max_duration)[1]
        problems.append((f"{key}.ramp", f"expected a length in the unit of max_duration ({own}) or dur."))
    if config.algorithms.influence_scores is not None:
        why = "scores are read from the output head's backward pass, which distillation does without. Set one to null."
        problems.append((f"{key}", why))
    return problems


def _data_problems(data: DataConfig) -> Problems:
    problems: Problems = []
    if not data.sources:
        problems.append(("data.sources", "expected at least one source, found none."))
    elif sum(source.weight for source in data.sources.values()) <= 0:
        problems.append(("data.sources", "the weights are all 0; at least one must be above."))
    for name, probe in data.probes.items():
        key = f"data.probes.{name}"
        if (probe.source is None) == (probe.local is None and probe.remote is None):
            problems.append((key, "expected either source (its probe split) or local/remote (a folder)."))
    return problems


def _measuring_problems(mixing: OnlineMixingConfig, data: DataConfig) -> Problems:
    key, own = "algorithms.online_mixing.influence", mixing.influence
    problems: Problems = []
    if own.metric == "cosine" and own.scorer != "hook":
        why = (
            f"'cosine' needs the norm of each source's gradient, which scorer '{own.scorer}' does not give: use 'hook'."
        )
        problems.append((f"{key}.metric", why))
    if own.scorer == "microbatch" and own.metric not in ("raw", "adam", "cosine"):
        why = f"scorer 'microbatch' sees no sample's gradient alone: expected raw or adam, found '{own.metric}'."
        problems.append((f"{key}.metric", why))
    if mixing.strategy == "doge" and mixing.doge.target and not data.probes:
        problems.append(("data.probes", "strategy 'doge' with a target steers towards probes: name at least one."))
    if mixing.strategy in ("mixing_law", "regmix") and getattr(mixing, mixing.strategy).table is None:
        why = "expected a table of finished runs; `tools/fit_mixing_law.py collect` makes one."
        problems.append((f"algorithms.online_mixing.{mixing.strategy}.table", why))
    for name in (own.probes or {}).keys() - data.probes.keys():
        problems.append((f"{key}.probes.{name}", f"no such probe in data.probes.{nearest(name, data.probes)}"))
    if own.probes is not None and not sum(own.probes.values()) > 0:
        problems.append((f"{key}.probes", "expected a weight above 0, found none."))
    if isinstance(mixing.updates, list) and mixing.updates != sorted(set(mixing.updates)):
        problems.append(("algorithms.online_mixing.updates", "expected batches that rise."))
    return problems


def _schedule_problems(schedule: ScheduleConfig, data: DataConfig) -> Problems:
    key = "algorithms.online_mixing.schedule.points"
    problems: Problems = [] if schedule.points else [(key, "expected at least one point, found none.")]
    for i, point in enumerate(schedule.points):
        if (point.tokens is None) == (point.batch is None):
            problems.append((f"{key}.{i}", "expected either tokens or batch, to say when."))
        for name in point.weights.keys() - data.sources.keys():
            problems.append((f"{key}.{i}.weights.{name}", f"no such source.{nearest(name, data.sources)}"))
    return problems
