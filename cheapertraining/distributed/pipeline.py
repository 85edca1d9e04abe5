"""Pipeline parallelism: decoder layers in stages, a stage or several a rank, micro-batches going through them in turn.

The schedules are those of ``torch.distributed.pipelining``: GPipe (arXiv 1811.06965), 1F1B (PipeDream-flush, arXiv
2006.09503) and interleaved 1F1B (arXiv 2104.04473). A stage is any module ``(x, **batch) -> output``; the last one
gives losses in place of logits, so that no rank keeps the logits of more than one micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from cheapertraining.distributed.layout import StagePlan, plan_stages
from cheapertraining.errors import UserError

__all__ = ["Pipeline", "ScheduleName", "StagePlan", "mend_pipeline_on_gloo", "plan_stages"]

log = logging.getLogger(__name__)

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


class Pipeline:
    """This rank's stages and their schedule; the process group is the default one, all of it.

    Args:
        plan: of the stages.
        modules: this rank's, by number of the stage, in order.
        schedule: which.
        microbatches: of a batch.
        shape: rows of a micro-batch, tokens of a row, and width of the hidden states between stages.
        device: of this rank.
    """

    def __init__(
        self,
        plan: StagePlan,
        modules: dict[int, nn.Module],
        schedule: ScheduleName,
        microbatches: int,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        mend_pipeline_on_gloo()
        self.plan = plan
        self._modules = modules
        self._width, self._device = shape[2], device
        self._tokens = 1.0
        self._schedule = _build_schedule(plan, modules, schedule, microbatches, shape, device, self._mean_loss)

    def train(self, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
        """Forward and backward passes of a batch, gradients added to those of this rank's parameters.

        Args:
            batch: the whole of it, the same on all ranks: ``[B, ...]``, of which each stage gets the rows of a
                micro-batch. ``input_ids`` int64 ``[B, S]`` are what goes into the first.
            tokens: loss-counting tokens in the batch; gradients are those of the mean over them.

        Returns:
            What the last stage gives, the same on all ranks: the sum of losses of each sample that is trained on, and
            that is reported, float32 ``[B, 2]``.

        Raises:
            UserError: on the rank of the stage that did.
        """
        self._tokens = float(max(tokens, 1))
        rank, plan, ids = dist.get_rank(), self.plan, batch["input_ids"]
        try:
            sums = self._schedule.step(*((ids,) if rank == 0 else ()), target=ids, **batch)
        except RuntimeError as error:  # torch's own, about the stage and the shapes of its inputs
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        return self._from_last(None if rank != plan.last_rank else sums.detach(), len(ids))

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sums of :meth:`train`, of any number of rows, by one pass through all stages without gradients."""
        rank, plan, input_ids = dist.get_rank(), self.plan, batch["input_ids"]
        state: Tensor | None = input_ids if rank == 0 else None
        for stage in range(plan.stages):
            before, here = (stage - 1) % plan.ranks, stage % plan.ranks
            if stage > 0 and before != here:
                if rank == before:
                    assert state is not None
                    dist.send(state.contiguous(), here)
                elif rank == here:
                    state = torch.empty(*input_ids.shape, self._width, device=self._device)
                    dist.recv(state, before)
            if rank == here:
                state = self._modules[stage](state, **batch)
        return self._from_last(state if rank == plan.last_rank else None, len(input_ids))

    def _mean_loss(self, sums: Tensor, target: Tensor) -> Tensor:
        del target  # the stage has taken the losses already; tokens are those of the whole batch
        return sums[:, 0].sum() / self._tokens

    def _from_last(self, sums: Tensor | None, rows: int) -> Tensor:
        told = torch.empty(rows, 2, device=self._device) if sums is None else sums.float().contiguous()
        dist.broadcast(told, self.plan.last_rank)
        return told


def _build_schedule(
    plan: StagePlan,
    modules: dict[int, nn.Module],
    schedule: ScheduleName,
    microbatches: int,
    shape: tuple[int, int, int],
    device: torch.device,
    loss: Any,
) -> Any:
    rows, length, width = shape
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    hidden, sums = torch.empty(rows, length, width, device="meta"), torch.empty(rows, 2, device="meta")
    stages = [
        PipelineStage(
            module,
            stage,
            plan.stages,
            device,
            input_args=ids if stage == 0 else hidden,
            output_args=sums if stage == plan.stages - 1 else hidden,
        )
        for stage, module in modules.items()
    ]
    if schedule == "interleaved":
        return ScheduleInterleaved1F1B(stages, microbatches, loss_fn=loss, scale_grads=False)  # type: ignore[arg-type]
    kind = ScheduleGPipe if schedule == "gpipe" else Schedule1F1B
    return kind(stages[0], microbatches, loss_fn=loss, scale_grads=False)


class _All:
    """Work that is done when all of several are."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def mend_pipeline_on_gloo() -> bool:
    """Let torch 2.7's schedules wait for every message on gloo; on NCCL nothing is changed.

    A schedule waits for the last of several sends and receives that it starts together. NCCL runs them as one; gloo
    does not, and all schedules but GPipe wait for ever.

    Returns:
        Whether the default process group is one of gloo, so that this counts. Logged the first time.
    """
    from torch.distributed.pipelining import schedules

    module: Any = schedules
    if dist.get_backend() != "gloo":
        return False
    if getattr(module._batch_p2p, "_mended", False):
        return True

    def start(p2p_ops: list[dist.P2POp], desc: str | None = None) -> Any:
        return _All(dist.batch_isend_irecv(p2p_ops)) if p2p_ops else None

    start._mended = True  # type: ignore[attr-defined]
    module._batch_p2p = start
    log.warning("gloo: pipeline schedules wait for each message here, since torch waits for the last of several.")
    return True
