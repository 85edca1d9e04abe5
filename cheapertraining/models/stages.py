"""A causal language model cut into stages of decoder layers, of which each rank holds one or several.

The cut model keeps the names of the whole one: layer 7 is ``model.model.layers.7`` on the rank that has it, and nothing
on the others. What a stage does with positions, masks of packed documents and rotary embeddings is the architecture's
own forward pass, given the hidden states in place of token embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from cheapertraining.config import ParallelismConfig
from cheapertraining.distributed.fsdp2 import checkpoint_blocks, compile_blocks
from cheapertraining.distributed.pipeline import Pipeline, StagePlan, plan_stages
from cheapertraining.distributed.pipeline_state import clip_across_stages
from cheapertraining.errors import UserError
from cheapertraining.influence.losses import IGNORED, per_sample_loss
from cheapertraining.models.causal_lm import CausalLM, HeadInputs
from cheapertraining.models.sharded import build_shell, fill_buffers

__all__ = ["STAGED", "PipelinedLM", "build_pipelined"]

STAGED = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (model_type) whose body does nothing to hidden states that it is given in place of embeddings, and
whose logits are those of a plain linear head."""

_HEAD = "model.lm_head.weight"


class _Cut(nn.Module, FSDPModule):
    """Tells Composer, which looks for a module of this class, that ranks hold parts of a model and not copies (DDP)."""

    def __new__(cls) -> _Cut:
        return object.__new__(cls)  # FSDPModule's own makes an object of the class that it was mixed into


class Stage(nn.Module):
    """Some decoder layers of a model, with its embedding before or its norm behind them.

    Args:
        body: of the architecture, with these layers alone.
        first: whether it takes token ids.
        losses: what the last stage makes of its hidden states and the batch; None in the others.
    """

    def __init__(self, body: nn.Module, first: bool, losses: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None):
        super().__init__()
        self.body, self.first, self.losses = body, first, losses

    def forward(self, x: Tensor, /, **batch: Tensor) -> Tensor:
        """Return hidden states float32 ``[B, S, H]``; the last stage what ``losses`` gives, ``[B, 2]``.

        Args:
            x: token ids int64 ``[B, S]`` or hidden states ``[B, S, H]``.
            batch: ``position_ids`` int64 ``[B, S]``, restarting at each document; only the last stage looks at others.
        """
        given = {"input_ids": x} if self.first else {"inputs_embeds": x}
        hidden: Tensor = self.body(**given, position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        return hidden.float() if self.losses is None else self.losses(hidden, batch)


class PipelinedLM(CausalLM):
    """A :class:`CausalLM` of which this rank holds some stages; made by :func:`build_pipelined` on all ranks together.

    All ranks are given the same batches. In training, ``forward`` runs the whole schedule, backward passes included,
    as micro-batches go back while others go forth: gradients are there when it returns, of the mean over the batch's
    loss-counting tokens, and the loss has nothing behind it. An `objective` is asked by the last stage about each
    micro-batch, on that rank alone; it gets hidden states, but not those of other layers.

    Args:
        whole: the whole model on the meta device.
        plan: of the stages.

    Attributes:
        whole: the whole model on the meta device, for its names and shapes.
        plan: of the stages.
        duplicates: this rank's parameters that another rank has too, and counts: the head, where it is the embedding.
    """

    def __init__(self, whole: CausalLM, plan: StagePlan) -> None:
        rank = dist.get_rank()
        cut: Any = copy.deepcopy(whole.model)
        super().__init__(cut, whole.isolation)
        self.cut = _Cut()
        self._whole = [whole]  # in a list, so that it is no submodule
        self.plan = plan
        self.tied = cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
        kept = [layer for stage in plan.stages_of(rank) for layer in plan.layers[stage]]
        cut.model.layers = _numbered(cut.model.layers, kept)
        if rank != 0:
            cut.model.embed_tokens = None
        if rank != plan.last_rank:
            cut.model.norm, cut.lm_head = nn.Identity(), None
        self.duplicates = frozenset({_HEAD} if self.tied and rank == plan.last_rank != 0 else ())
        self._shared = dist.new_group([0, plan.last_rank]) if self.tied and plan.last_rank != 0 else None
        self._pipeline: Pipeline | None = None

    @property
    def whole(self) -> CausalLM:
        return self._whole[0]

    @property
    def has_last_stage(self) -> bool:
        """Whether this is the rank that makes losses."""
        return dist.get_rank() == self.plan.last_rank

    @property
    def blocks(self) -> list[nn.Module]:
        """This rank's decoder layers."""
        return list(self._layers.values())

    @property
    def _layers(self) -> dict[int, nn.Module]:
        body: Any = self.model.base_model
        return {int(number): layer for number, layer in body.layers.named_children()}

    def start(self, settings: ParallelismConfig, microbatches: int, rows: int, length: int) -> None:
        """Make the stages and their schedule; the parameters are where they stay.

        Args:
            settings: of the run.
            microbatches: of a batch.
            rows, length: samples of a micro-batch, and their tokens.
        """
        pp, rank = settings.pp, dist.get_rank()
        assert pp is not None
        layers, body, plan = self._layers, self.model.base_model, self.plan
        modules: dict[int, nn.Module] = {}
        for stage in plan.stages_of(rank):
            last = stage == plan.stages - 1
            own: Any = copy.copy(body)
            own._modules = dict(body._modules)
            own.layers = nn.ModuleList(layers[number] for number in plan.layers[stage])
            own.norm = body.norm if last else nn.Identity()
            own.embed_tokens = body.embed_tokens if stage == 0 else None
            modules[stage] = Stage(own, stage == 0, self._losses if last else None)
        device = next(self.model.parameters()).device
        shape = (rows, length, int(self.model.config.hidden_size))
        self._pipeline = Pipeline(plan, modules, pp.schedule, microbatches, shape, device)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run a batch through all stages, and in training back; ``sample_loss_sum`` and ``sample_tokens`` are as
        :meth:`CausalLM.loss` leaves them, and ``loss`` is their mean, or in training that of the `objective`."""
        assert self._pipeline is not None
        rows = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        rows["input_ids"], rows["position_ids"] = self._inputs(batch)
        tokens = _count_tokens(batch["labels"])
        if self.training and torch.is_grad_enabled():
            found = self._pipeline.train(rows, int(tokens.sum()))
            self._add_tied_gradients()
        else:
            found = self._pipeline.evaluate(rows)
        trained_on, sums = found.unbind(dim=1)
        # All ranks have seen the same samples, of which sums over all ranks are to hold each once.
        reported = 1 if dist.get_rank() == 0 else 0
        mean = trained_on.sum() / tokens.sum().clamp(min=1)
        return {"loss": mean, "sample_loss_sum": sums * reported, "sample_tokens": tokens * reported}

    def loss(self, outputs: MutableMapping[str, Any], batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean loss of :meth:`forward`; a leaf, since its gradients have been taken."""
        loss: Tensor = outputs["loss"]
        return loss.detach().requires_grad_(self.training)

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """This rank's share of :meth:`CausalLM.flops_per_batch`, since Composer sums over the ranks."""
        return super().flops_per_batch(batch) // self.plan.ranks

    def clip_gradients(self, max_norm: float) -> Tensor:
        """See :func:`~cheapertraining.distributed.pipeline_state.clip_across_stages`."""
        return clip_across_stages(self, max_norm, self.duplicates)

    def _losses(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Of each sample the loss, with gradient, and the cross-entropy, both summed over its tokens: ``[B, 2]``.

        Args:
            hidden: ``[B, S, H]``, what the head multiplies.
            batch: rows of the micro-batch.
        """
        if self.objective is None or not torch.is_grad_enabled():
            sums = per_sample_loss(self.model.lm_head(hidden), batch["labels"])[0]
            return torch.stack([sums, sums.detach()], dim=1)
        outputs: dict[str, Tensor] = {}
        inputs = HeadInputs(hidden, (), self.model.lm_head.weight, self.model.lm_head.bias, 1.0, None)
        mean = self.objective(inputs, batch, outputs)
        sums = outputs["sample_loss_sum"]
        total = mean * _count_tokens(batch["labels"]).sum()
        return torch.stack([(total / len(sums)).expand_as(sums), sums], dim=1)  # only their sum is ever looked at

    def _add_tied_gradients(self) -> None:
        """One matrix embeds tokens in the first stage and makes logits in the last: its gradient is the sum of both."""
        if self._shared is None or dist.get_rank() not in (0, self.plan.last_rank):
            return
        matrix = self.model.lm_head if self.duplicates else self.model.base_model.embed_tokens
        dist.all_reduce(matrix.weight.grad, group=self._shared)


def build_pipelined(
    build: Callable[[], CausalLM],
    settings: ParallelismConfig,
    device: torch.device,
    *,
    batch_size: int,
    microbatch_size: int,
    seq_len: int,
) -> PipelinedLM:
    """Build a model in stages, the same numbers as ``build`` gives; a collective call.

    ``build`` is called on rank 0 alone, and the others get their layers from there, parameter by parameter.

    Args:
        build: makes the whole model on the CPU.
        settings: of the run, with ``pp``.
        device: of this rank.
        batch_size, microbatch_size: rows of a global batch and of what goes through a stage at a time.
        seq_len: tokens of a row.

    Raises:
        UserError: on every rank: ``build``'s own, or the model cannot be cut so.
    """
    assert settings.pp is not None
    source, whole = build_shell(build)
    config = whole.model.config
    if config.model_type not in STAGED or whole.isolation != "positions":
        raise UserError(
            f"parallelism.pp: {type(whole.model).__name__} (model_type '{config.model_type}') cannot be cut into "
            f"stages; {', '.join(STAGED)} can. Use compose.distributed=fsdp2."
        )
    plan = plan_stages(config.num_hidden_layers, dist.get_world_size(), settings.pp.stages)
    model = PipelinedLM(whole, plan)
    if settings.activation_checkpointing:
        checkpoint_blocks(model.model, model.blocks)
    if settings.compile_blocks:
        compile_blocks(model.blocks)
    _fill(model, source, device)
    model.start(settings, batch_size // microbatch_size, microbatch_size, seq_len)
    return model


def _count_tokens(labels: Tensor) -> Tensor:
    """Positions of each sample that a loss counts for, int64 ``[B]``, from unshifted labels."""
    return (labels[:, 1:] != IGNORED).sum(dim=1)


def _numbered(layers: Any, kept: Iterable[int]) -> nn.ModuleList:
    """Some layers, under the numbers that they have in the whole list."""
    chosen = nn.ModuleList()
    for number in kept:
        chosen.add_module(str(number), layers[number])
    return chosen


def _fill(model: PipelinedLM, source: CausalLM | None, device: torch.device) -> None:
    """Allocate this rank's layers and give them the numbers of rank 0's ``source``."""
    model.to_empty(device=device)
    if model.tied and dist.get_world_size() == 1:  # `to_empty` makes two of one
        model.model.tie_weights()
    own: dict[str, Any] = get_model_state_dict(model)
    full = {} if source is None else source.state_dict()
    for name, expected in model.whole.state_dict().items():
        sent = full[name].to(device) if full else torch.empty(expected.shape, dtype=expected.dtype, device=device)
        dist.broadcast(sent, src=0)
        if name in own:
            own[name].copy_(sent)
    fill_buffers(model.model, None if source is None else source.model, device)
