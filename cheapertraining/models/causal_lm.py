"""A Hugging Face causal language model as a Composer model, with packed documents kept apart.

    build_causal_lm(config, vocab_size, *, seed=0, precision="fp32") -> CausalLM
    CausalLM(model)                      # model: a transformers causal LM; .model is the same object
    TokenCrossEntropy()                  # the evaluation metric, named "TokenCrossEntropy"

One row of a batch holds several documents. They never attend to each other: `position_ids` restart at each document
and transformers derives the block-diagonal mask (or the variable-length flash attention) from these restarts, but
only where no `attention_mask` is given and no cache is kept. A 2-D mask of ones switches the isolation off without a
word, so this model passes none, and `isolation_of` proves on a tiny input that the architecture at hand isolates.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate
from torchmetrics import Metric
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from cheapertraining.distributed.vocabulary import vocabulary_parallel_token_losses
from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.losses import token_losses

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cheapertraining.config import ModelConfig

__all__ = [
    "CausalLM",
    "HeadInputs",
    "Objective",
    "TokenCrossEntropy",
    "attention_for",
    "build_causal_lm",
    "head_mismatch",
    "isolation_of",
]

ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "flex_attention", "eager")

Isolation = Literal["positions", "mask"]


class TokenCrossEntropy(Metric):
    """Cross entropy in nats per loss-counting token, over all batches and all ranks.

    Sums (float64) and counts (int64) are kept and reduced, never means, so that batches of unequal token counts and any
    number of ranks give the same value. Without a single loss-counting token the value is NaN.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    loss_sum: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, tokens: Tensor) -> None:
        """Add per-sample sums of losses (``[B]``, nats) and counts of loss-counting tokens (``[B]``)."""
        self.loss_sum += loss_sum.double().sum()
        self.tokens += tokens.sum()

    def compute(self) -> Tensor:
        """Return the mean over everything added, a float64 scalar."""
        return self.loss_sum / self.tokens


class HeadInputs(NamedTuple):
    """What a model makes of a batch but for its logits, ``cap(logit_scale * (hidden @ weight.T + bias))``.

    Attributes:
        hidden: ``[B, S, H]``, what the head multiplies (after the last norm).
        layers: ``[B, S, H]`` each, the embeddings and what each decoder layer gives; empty unless asked for.
        weight: ``[V, H]``; whole where parameters are sharded, until they are sharded again. Under tensor parallelism
            this rank's rows ``[V / n, H]``: the gradient of ``hidden`` is then what they add to it, to be summed over
            the ranks by backward.
        bias: ``[V]`` (``[V / n]``) or None.
        logit_scale: a factor.
        soft_cap: ``cap(z) = soft_cap * tanh(z / soft_cap)``; None: no cap.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    soft_cap: float | None


class Objective(Protocol):
    """What stands in for the cross entropy for as long as it is set, see :attr:`CausalLM.objective`."""

    @property
    def layers(self) -> bool:
        """Whether the states of all layers are needed."""

    def __call__(self, inputs: HeadInputs, batch: Mapping[str, Any], outputs: MutableMapping[str, Any]) -> Tensor:
        """Return the mean loss over the batch's loss-counting tokens and write into ``outputs`` what
        :meth:`CausalLM.loss` writes."""


class CausalLM(ComposerModel):
    """A causal language model over packed rows.

    Batches are mappings with ``input_ids``, ``labels`` and ``position_ids``, int64 ``[B, S]``. Labels are unshifted
    and -100 where no loss counts, which includes the first token of every document; ``position_ids`` restart at each
    document, and trailing padding is a document of its own. Without ``position_ids`` a row is one document. Any
    ``attention_mask`` is ignored (see the module's docstring). Other keys ride along.

    Args:
        model: A transformers model with a language-modelling head. Its cache is switched off.
        isolation: How packed documents are kept apart, where it was found out already; None tries it on the model.

    Raises:
        UserError: The model lets packed documents see each other and offers no way to stop it.
    """

    def __init__(self, model: PreTrainedModel, isolation: Isolation | None = None) -> None:
        super().__init__()
        model.config.use_cache = False
        self.model = model
        self.isolation: Isolation = isolation or isolation_of(model)
        if self.isolation == "mask" and model.config._attn_implementation.startswith("fl"):
            model.config._attn_implementation = "sdpa"  # flash kernels take no 4-D mask
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self.objective: Objective | None = None
        """Where one is set, `forward` returns ``{"head_inputs": HeadInputs}``, so that logits never exist as a whole,
        and `loss` is the objective's."""
        self.vocabulary_group: dist.ProcessGroup | None = None
        """The ranks that each hold a part of the logits' vocabulary, under tensor parallelism."""
        self.mesh: DeviceMesh | None = None
        """All dimensions of the mesh that it was spread over, where ours did that."""
        self._flops = _FlopCount(model)
        for layer in _decoder_layers(model):
            layer._fsdp_wrap = True  # type: ignore[assignment]  # Composer shards it as one unit

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``{"logits": [B, S, V]}`` for a batch.

        Raises:
            UserError: The rows are longer than the model's positions reach.
        """
        if self.objective is not None:
            return {"head_inputs": self.head_inputs(batch, self.objective.layers)}  # type: ignore[dict-item]
        return {"logits": _call(self.model, *self._inputs(batch), self.isolation).logits}

    def head_inputs(self, batch: Mapping[str, Any], layers: bool = False) -> HeadInputs:
        """Run the model on a batch but for its head.

        Args:
            batch: As for `forward`.
            layers: Whether to return the states of all layers; not under tensor parallelism, which cuts them.

        Raises:
            UserError: As `forward`.
        """
        assert not (layers and self.vocabulary_group is not None)
        options: dict[str, Any] = {"logits_to_keep": 1} if _takes(self.model, "logits_to_keep") else {}
        arguments = (self.model, *self._inputs(batch), self.isolation)
        if layers or torch.is_grad_enabled():
            # As outputs of the whole model they have its hooks, without which FSDP2 does not expect their gradients.
            states = _call(*arguments, output_hidden_states=True, **options).hidden_states
            hidden, kept = states[-1], tuple(states) if layers else ()
        else:
            hidden, kept = _last_hidden(*arguments, **options), ()
        weight, bias, scale, cap = _head_of(self.model)
        if self.vocabulary_group is not None:
            hidden, weight, bias = _beside_the_part(hidden), _part(weight), None if bias is None else _part(bias)
        return HeadInputs(hidden, kept, weight, bias, scale, cap)

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Token ids and positions of a batch, ``[B, S]`` each."""
        input_ids = batch["input_ids"]
        length = input_ids.shape[1]
        if self.max_positions is not None and length > self.max_positions:
            raise UserError(
                f"the batch has rows of {length} tokens, but the model was built for {self.max_positions}: "
                f"lower data.seq_len or raise model.max_position_embeddings"
            )
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        return input_ids, positions

    def loss(self, outputs: MutableMapping[str, Any], batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean cross entropy over the batch's loss-counting tokens, a float32 scalar in nats.

        Also writes ``outputs["sample_loss_sum"]`` (float32 ``[B]``) and ``outputs["sample_tokens"]`` (int64 ``[B]``),
        both detached: the same numbers, before the mean, for whoever wants the loss by source. With an `objective`
        they are its cross entropy.
        """
        if self.objective is not None:
            return self.objective(outputs["head_inputs"], batch, outputs)
        losses, counted = self.token_losses(outputs["logits"], batch["labels"])
        sums, tokens = losses.sum(dim=1), counted.sum(dim=1)
        outputs["sample_loss_sum"] = sums.detach() * self.reports
        outputs["sample_tokens"] = tokens.detach() * self.reports
        # A microbatch may hold nothing but prompt or padding; its loss is then zero, not 0/0.
        return sums.sum() / tokens.sum().clamp(min=1)

    def token_losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return :func:`~cheapertraining.influence.losses.token_losses` of the logits that `forward` gives, which may
        be a part of the vocabulary."""
        if self.vocabulary_group is None:
            return token_losses(logits, labels)
        return vocabulary_parallel_token_losses(logits, labels, self.vocabulary_group)

    def eval_forward(self, batch: Mapping[str, Any], outputs: Any | None = None) -> Any:
        """Return the outputs of `forward` with ``sample_loss_sum`` and ``sample_tokens`` beside the logits."""
        outputs = self.forward(batch) if outputs is None else outputs
        if "sample_loss_sum" not in outputs:
            self.loss(outputs, batch)
        return outputs

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the metrics by name: token cross entropy in evaluation, none in training, where the loss is logged."""
        return {} if is_train else {"TokenCrossEntropy": TokenCrossEntropy()}

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        """Add one evaluated batch to a metric that takes per-sample loss sums and token counts."""
        metric.update(outputs["sample_loss_sum"], outputs["sample_tokens"])

    @property
    def reports(self) -> bool:
        """Whether this rank is the one of its `vocabulary_group` that tells of the samples that all of them see: sums
        over all ranks are to hold each sample once."""
        return self.vocabulary_group is None or dist.get_rank(self.vocabulary_group) == 0

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated decoder layers, in the order they run; empty where the model has no such list."""
        return _decoder_layers(self.model)

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Return the floating-point operations of one training step on this batch (Composer's SpeedMonitor asks).

        Forward: 2 per parameter that multiplies and token, and 4 L H S per token for attention scores and values over
        rows of S tokens (L layers of H = heads x head size); backward counts twice the forward. This is the convention
        of the PaLM paper (arXiv 2204.02311, appendix B): neither causality nor document isolation lower it.
        """
        rows, length = (int(size) for size in batch["input_ids"].shape)
        ranks = 1 if self.vocabulary_group is None else self.vocabulary_group.size()  # which share the work on them
        return 3 * rows * length * self._flops.forward_per_token(length) // ranks


class _FlopCount:
    """What `CausalLM.flops_per_batch` needs, counted once, before anything shards the parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        head = model.get_output_embeddings()
        output_weight = None if head is None else head.weight
        # Looking up a row multiplies nothing; a tied embedding does multiply, as the output head.
        looked_up = {
            id(module.weight): module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.weight is not output_weight
        }
        self.multiplying: int = sum(p.numel() for p in model.parameters()) - sum(looked_up.values())
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention_width: int = config.num_hidden_layers * config.num_attention_heads * head_size

    def forward_per_token(self, length: int) -> int:
        return 2 * self.multiplying + 4 * self.attention_width * length


def build_causal_lm(config: ModelConfig, vocab_size: int, *, seed: int = 0, precision: str = "fp32") -> CausalLM:
    """Build the model that a run's ``model:`` section describes.

    Args:
        config: The section. With ``name_or_path`` the model is loaded from that local folder, whatever its
            architecture, and the fields that describe a shape are not read; without it a Llama is initialised.
        vocab_size: The tokenizer's. Used where the section gives none.
        seed: Of the initial weights. The same seed gives the same weights on every rank; global random state is
            left as it was.
        precision: The run's, resolved: ``"fp32"``, ``"amp_bf16"`` or ``"amp_fp16"``.

    Returns:
        The model, float32, on the CPU (or on the device of an enclosing ``torch.device`` context).

    Raises:
        UserError: The section contradicts itself, the tokenizer, or the machine; or the folder cannot be loaded.
    """
    attention = attention_for(config.attention, precision)
    if config.name_or_path is not None:
        model = _load(Path(config.name_or_path), attention, config)
    else:
        model = _initialise(config, config.vocab_size or vocab_size, attention, seed)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(
            f"the model has embeddings for {rows} tokens, but the tokenizer knows {vocab_size}: "
            f"use the tokenizer the model was made with, or set model.vocab_size to at least {vocab_size}"
        )
    return CausalLM(model)


def attention_for(requested: str, precision: str) -> str | None:
    """Return the attention implementation to ask transformers for; None leaves the choice to it (sdpa, else eager).

    ``"auto"`` is flash attention where a CUDA device, the flash_attn package and a half-precision run come together.

    Raises:
        UserError: The name is unknown, or this machine or precision cannot run what was asked for.
    """
    if requested not in ATTENTIONS:
        raise UserError(
            f"model.attention: expected one of {', '.join(ATTENTIONS)}, found '{requested}'."
            f"{nearest(requested, ATTENTIONS)}"
        )
    cuda, half = torch.cuda.is_available(), precision.startswith("amp_")
    flash = cuda and half and is_flash_attn_2_available()
    if requested == "auto":
        return "flash_attention_2" if flash else None
    if requested == "flash_attention_2" and not flash:
        raise UserError(
            "model.attention: flash_attention_2 needs a CUDA device, the flash_attn package and precision amp_bf16 or "
            f"amp_fp16; found {'CUDA' if cuda else 'no CUDA'}, precision {precision}: set model.attention=auto"
        )
    if requested == "flex_attention" and not cuda:
        raise UserError("model.attention: flex_attention cannot train without a CUDA device: set model.attention=auto")
    return requested


def _initialise(config: ModelConfig, vocab_size: int, attention: str | None, seed: int) -> PreTrainedModel:
    """Make a Llama with seeded weights: normal(0, init_std), residual projections scaled by 1/sqrt(2 layers)."""
    _check_shape(config)
    llama = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_embeddings,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        bos_token_id=None,
        eos_token_id=0,
        use_cache=False,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(llama)
    # Each layer adds two terms to the residual stream; the scale keeps its variance from growing with depth (GPT-2).
    scale = 1.0 / math.sqrt(2 * config.num_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def _check_shape(config: ModelConfig) -> None:
    """Raise UserError where the fields of a model made from configuration do not fit together."""
    if config.architecture != "llama":
        raise UserError(
            f"model.architecture: expected 'llama', found '{config.architecture}': "
            f"another architecture is loaded from a local folder by model.name_or_path"
        )
    for divided, by in (("hidden_size", "num_heads"), ("num_heads", "num_kv_heads")):
        whole, parts = getattr(config, divided), getattr(config, by)
        if parts is not None and whole % parts:
            raise UserError(f"model.{divided}={whole} is not divisible by model.{by}={parts}: change one of the two")
    if config.hidden_size // config.num_heads % 2:
        raise UserError(
            f"model.hidden_size / model.num_heads = {config.hidden_size // config.num_heads} is odd: "
            f"rotary positions need an even head size"
        )


def _load(folder: Path, attention: str | None, config: ModelConfig) -> PreTrainedModel:
    """Load any causal LM from a local folder, in float32, without network."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.name_or_path: expected a local folder with config.json and weights, found '{folder}': "
            f"download the model first and give its folder"
        )
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": config.trust_remote_code,
        "torch_dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        try:
            model, found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **options)
        except ValueError:
            if config.attention != "auto" or attention is None:
                raise
            # Chosen by us, not by the user: an architecture without flash attention gets what it has.
            model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(
            f"model.name_or_path: '{folder}' cannot be loaded as a causal language model: {error}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model.name_or_path: the weights in '{folder}' lack {len(missing)} that its config.json asks for, such as "
            f"{missing[0]}: the folder is incomplete or is not a causal language model"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated layers: the first list of modules as long as the configuration says the model is deep."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    return []


def _call(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, isolation: Isolation, **options: Any) -> Any:
    """Run the model on packed rows; its outputs, such as ``logits`` ``[B, S, V]`` in the model's precision."""
    inputs: dict[str, Tensor] = {"input_ids": input_ids, "position_ids": position_ids}
    if isolation == "mask":
        inputs["attention_mask"] = _additive_mask(position_ids, next(model.parameters()).dtype)
    with _runnable_attention(model, input_ids.device):
        return model(**inputs, use_cache=False, **options)


def _last_hidden(*arguments: Any, **options: Any) -> Tensor:
    """Arguments of `_call`; what the model's body gives to its head, without keeping the states of other layers."""
    found: list[Tensor] = []
    body: nn.Module = arguments[0].base_model
    handle = body.register_forward_hook(lambda module, inputs, outputs: found.append(outputs[0]))
    try:
        _call(*arguments, **options)
    finally:
        handle.remove()
    return found[0]


def _head_of(model: PreTrainedModel) -> tuple[Tensor, Tensor | None, float, float | None]:
    """Weight, bias, logit scale and soft cap of the output head; the last two as configurations name them."""
    head, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0))
    cap = getattr(config, "final_logit_softcapping", None)
    return head.weight, getattr(head, "bias", None), scale, None if cap is None else float(cap)


def _beside_the_part(hidden: Any) -> Tensor:
    """States that are cut along the sequence, whole on each rank, of whose gradient each rank finds a summand."""
    whole = hidden.redistribute(placements=[Replicate()])
    found: Tensor = whole.to_local(grad_placements=[Partial()])
    return found


def _part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter that is cut along the vocabulary."""
    found: Tensor = parameter.to_local()
    return found


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def _runnable_attention(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Fall back to sdpa where the configured kernel cannot run.

    Flash kernels know half precision only, while influence estimates run in float32; flex attention needs CUDA, while
    models are built on the CPU. All three take document bounds from the same position ids.
    """
    config, attention = model.config, model.config._attn_implementation
    flash = attention == "flash_attention_2" and not torch.is_autocast_enabled(device.type)
    flex = attention == "flex_attention" and device.type == "cpu"
    if flash or flex:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = attention


def _additive_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the causal, block-diagonal mask ``[B, 1, S, S]``: 0 where a token may look, else the lowest number."""
    length = position_ids.shape[1]
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    document = starts.cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    visible = same & torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def isolation_of(model: PreTrainedModel) -> Isolation:
    """Return how this model keeps packed documents apart, after trying it on a row of two tiny documents.

    ``"positions"``: restarting position ids are enough (every architecture on transformers' common mask code, also
    under flash attention). ``"mask"``: it needs an explicit 4-D mask, which costs S x S numbers a row (GPT-2). Weights
    on the meta device cannot be tried; such a model is taken at its word if it uses the common mask code.

    Raises:
        UserError: Neither works, so training on packed rows would mix documents.
    """
    _check_finite(model)
    module = inspect.getmodule(type(model))
    choices: dict[Isolation, str] = {"positions": "restarting position_ids", "mask": "a 4-D attention mask"}
    failures = []
    if "position_ids" not in inspect.signature(model.forward).parameters:
        failures = ["it takes no position_ids"]
    elif next(model.parameters()).device.type == "meta":
        if hasattr(module, "create_causal_mask"):
            return "positions"
        failures = ["it cannot be tried on the meta device"]
    else:
        for isolation, means in choices.items():
            failure = _leak(model, isolation)
            if failure is None:
                return isolation
            failures.append(f"with {means}, {failure}")
    raise UserError(
        f"model: {type(model).__name__} lets documents that are packed into one row attend to each other "
        f"({'; '.join(failures)}): use another architecture, such as Llama, Qwen2, Mistral, GPT-NeoX or GPT-2"
    )


def _check_finite(model: PreTrainedModel) -> None:
    """Raise UserError for weights that are NaN or infinite: whatever is tried with them then fails in its own way."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"model: expected finite weights, found NaN or infinity in {name}: use weights from before the "
                f"training diverged"
            )


def head_mismatch(model: CausalLM) -> float:
    """Return how far the logits are from what `HeadInputs` say they are, relative to the largest, on a tiny row."""
    device = next(model.parameters()).device
    ranks = 1 if model.vocabulary_group is None else model.vocabulary_group.size()  # which cut sequences too
    batch = {"input_ids": torch.arange(1, 1 + 4 * ranks, device=device)[None]}
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = _call(model.model, *model._inputs(batch), model.isolation).logits
        errors = []
        for layers in (False, True) if ranks == 1 else (False,):
            hidden, _, weight, bias, scale, cap = model.head_inputs(batch, layers)
            made = scale * nn.functional.linear(hidden, weight, bias)
            made = made if cap is None else cap * torch.tanh(made / cap)
            errors.append(float((made - logits).abs().max() / logits.abs().max()))
    model.train(training)
    return max(errors)


def _leak(model: PreTrainedModel, isolation: Isolation) -> str | None:
    """Return how a row's second document fails to be independent of its first, or None if it is independent."""
    device = next(model.parameters()).device
    row = torch.arange(1, 9, device=device)[None]
    changed = row.clone()
    changed[0, :3] = torch.tensor([7, 8, 5], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before, after = (_call(model, ids, positions, isolation).logits[0, 3:] for ids in (row, changed))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"it fails: {error}"
    finally:
        model.train(training)
    # Exactly zero in every dense model; a mixture of experts groups its tokens differently and so rounds differently.
    leak = float((before - after).abs().max() / before.abs().max())
    return None if leak <= 1e-5 else f"logits change by {leak:.1e} of their size"
