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
from cheapertraining.models.causal_lm import CausalLM
from cheapertraining.models.sharded import build_shell, fill_buffers

__all__ = ["STAGED", "PipelinedLM", "build_pipelined"]

STAGED = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (model_type) whose body does nothing to hidden states that it is given in place of embeddings."""

_HEAD = "model.lm_head.weight"


class _Cut(nn.Module, FSDPModule):
    """Tells Composer, which looks for a module of this class, that ranks hold parts of a model and not copies (DDP)."""

    def __new__(cls) -> _Cut:
        return object.__new__(cls)  # FSDPModule's own makes an object of the class that it was mixed into


class Stage(nn.Module):
    """Some decoder layers of a model, with its embedding before or its norm and head behind them.

    Args:
        body: of the architecture, with these layers alone.
        head: None but in the last stage.
        first: whether it takes token ids.
    """

    def __init__(self, body: nn.Module, head: nn.Module | None, first: bool) -> None:
        super().__init__()
        self.body, self.head, self.first = body, head, first

    def forward(self, x: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Return hidden states float32 ``[B, S, H]``; the last stage the sum of losses of each sample ``[B]``.

        Args:
            x: token ids int64 ``[B, S]`` or hidden states ``[B, S, H]``.
            position_ids: int64 ``[B, S]``, restarting at each document.
            labels: int64 ``[B, S]``, unshifted; only the last stage looks at them.
        """
        given = {"input_ids": x} if self.first else {"inputs_embeds": x}
        hidden: Tensor = self.body(**given, position_ids=position_ids, use_cache=False).last_hidden_state
        if self.head is None:
            return hidden.float()
        return per_sample_loss(self.head(hidden), labels)[0]


class PipelinedLM(CausalLM):
    """A :class:`CausalLM` of which this rank holds some stages; made by :func:`build_pipelined` on all ranks together.

    All ranks are given the same batches. In training, ``forward`` runs the whole schedule, backward passes included,
    as micro-batches go back while others go forth: gradients are there when it returns, of the mean over the batch's
    loss-counting tokens, and the loss has nothing behind it.

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
            modules[stage] = Stage(own, self.model.lm_head if last else None, stage == 0)
        device = next(self.model.parameters()).device
        shape = (rows, length, int(self.model.config.hidden_size))
        self._pipeline = Pipeline(plan, modules, pp.schedule, microbatches, shape, device)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run a batch through all stages, and in training back; ``sample_loss_sum`` and ``sample_tokens`` are as
        :meth:`CausalLM.loss` leaves them, and ``loss`` is their mean."""
        assert self._pipeline is not None
        ids, positions = self._inputs(batch)
        labels = batch["labels"]
        tokens = (labels[:, 1:] != IGNORED).sum(dim=1)
        if self.training and torch.is_grad_enabled():
            sums = self._pipeline.train(ids, positions, labels, int(tokens.sum()))
            self._add_tied_gradients()
        else:
            sums = self._pipeline.evaluate(ids, positions, labels)
        # All ranks have seen the same samples, of which sums over all ranks are to hold each once.
        reported = 1 if dist.get_rank() == 0 else 0
        mean = sums.sum() / tokens.sum().clamp(min=1)
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
