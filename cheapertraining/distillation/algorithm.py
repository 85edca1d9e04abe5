"""Distillation inside a Composer trainer.

    Trainer(..., algorithms=[Distillation(TeacherWrapper.load("models/teacher"), loader.mixture.source_names)])

For each microbatch the teacher is asked, or its targets are taken from the batch, and the model's loss becomes that of
:mod:`cheapertraining.distillation.losses`, computed chunk by chunk from hidden states. Losses are means over the tokens
that count, so that a trainer which weights microbatches and ranks by these tokens (ours does) has the gradient of the
global batch however it is split.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from composer.core import Algorithm, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from cheapertraining.distillation.agreement import AgreementSums
from cheapertraining.distillation.cached import CachedTeacher
from cheapertraining.distillation.chunked import chunked_distillation_loss
from cheapertraining.distillation.divergences import FORWARD_KL, Divergence
from cheapertraining.distillation.layers import LayerLosses
from cheapertraining.distillation.losses import shifted_mask
from cheapertraining.distillation.on_policy import sample_answers
from cheapertraining.distillation.own_teacher import AdapterOffTeacher, AverageTeacher
from cheapertraining.distillation.schedules import Ramp
from cheapertraining.distillation.targets import HiddenTargets, Targets
from cheapertraining.distillation.teacher import TeacherWrapper, check_head, head_of
from cheapertraining.distributed.agreement import failing_together
from cheapertraining.errors import UserError, nearest
from cheapertraining.influence.model_access import unwrap
from cheapertraining.models.causal_lm import CausalLM, HeadInputs
from cheapertraining.models.stages import PipelinedLM
from cheapertraining.timing import TimeShare

__all__ = ["Distillation", "OnPolicy", "Placement"]

log = logging.getLogger(__name__)

Placement = Literal["auto", "replicated", "sharded", "offloaded"]
LiveTeacher = TeacherWrapper | AdapterOffTeacher | AverageTeacher
Teacher = TeacherWrapper | CachedTeacher | Callable[[CausalLM], AdapterOffTeacher | AverageTeacher]


@dataclass(frozen=True)
class OnPolicy:
    """Let the student write the answers of some batches itself.

    Attributes:
        share: of the batches.
        temperature: of the sampling.
        eos_id: token that ends an answer; None: answers are as long as the data's.
        seed: of the choice of batches and of the sampling.
    """

    share: float
    temperature: float = 1.0
    eos_id: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Heard:
    """What the teacher said about the microbatch at hand."""

    targets: Targets
    inputs: HeadInputs | None
    states: list[Tensor]


class Distillation(Algorithm):
    """Trains the model towards a teacher.

    Metrics, every ``log_interval`` batches, of the batch just trained on, over all ranks, under ``distillation/``:
    ``total``, ``cross_entropy``, ``divergence`` (at the temperature, without weights), ``alpha``, ``temperature``, and
    as far as the targets tell ``agreement`` (top-1), ``kl``, ``teacher_entropy``, ``student_entropy``, ``acceptance``
    (of the student's drafts in speculative decoding), each also ``…/<source>``; ``hidden`` and ``relations``;
    ``weight/<source>`` where there are weights; and ``overhead``, the share of step time that the teacher has taken.

    Args:
        teacher: a model, a cache, or what makes a teacher of the student: :class:`AdapterOffTeacher`, or
            ``partial(AverageTeacher, decay=0.999)``. None: the rank of a pipeline's last stage has the model.
        source_names: what the batches' ``source`` int64 ``[B]`` counts in.
        alpha: share of the divergence in the loss, in [0, 1], or its course over the run.
        temperature: of both distributions, or its course; of a cache always the one it was made at.
        divergence: forward KL alone for sampled targets.
        ramp: how much of a ramp's way is behind at a state, in [0, 1]; default the elapsed share of the run.
        source_weights: factors of the divergence by source, 1 where none is given.
        layers: losses on hidden states and relations; for live teachers.
        on_policy: for live teachers; alpha is 1 in such batches, for what the student wrote is nothing to imitate.
        placement: of a model: whole on each rank (of a pipeline: that of the last stage), sharded as the student, or in
            main memory; ``auto``: as the student.
        log_interval: batches between two logs.
        chunk_tokens: see :func:`~cheapertraining.distillation.chunked.chunked_distillation_loss`.

    Raises:
        UserError: what does not go together; at the start of training, a teacher that does not fit the student.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        source_names: Sequence[str],
        *,
        alpha: float | Ramp = 0.9,
        temperature: float | Ramp = 1.0,
        divergence: Divergence = FORWARD_KL,
        ramp: Callable[[State], float] | None = None,
        source_weights: Mapping[str, float] | None = None,
        layers: LayerLosses | None = None,
        on_policy: OnPolicy | None = None,
        placement: Placement = "auto",
        log_interval: int = 10,
        chunk_tokens: int | None = None,
    ) -> None:
        self.sources = tuple(source_names)
        self.alpha = alpha if isinstance(alpha, Ramp) else Ramp(alpha, alpha)
        self.temperature = temperature if isinstance(temperature, Ramp) else Ramp(temperature, temperature)
        self.divergence = divergence
        self.on_policy = on_policy
        self.placement = placement
        self.log_interval = log_interval
        self.chunk_tokens = chunk_tokens
        self.layers = layers
        self._ramp = ramp or _elapsed
        self._given = [teacher]  # in a list: no module of the trainer's may own it
        self._cached = teacher if isinstance(teacher, CachedTeacher) else None
        self._live: list[LiveTeacher] = []
        self._student: list[CausalLM] = []
        self._restored: Mapping[str, Any] = {}
        self._heard: _Heard | None = None
        self._staged = False
        self._extra: dict[str, Tensor] = {}
        self._answering = False
        self._sums: AgreementSums | None = None
        self._time = TimeShare()
        self._device = torch.device("cpu")
        self._weights = self._source_weights(source_weights or {})
        self._check()

    def __repr__(self) -> str:
        # Composer saves it; without an address it is the same on every rank and in every run.
        return f"{type(self).__name__}({'cached' if self._cached else 'live'})"

    def match(self, event: Event, state: State) -> bool:
        del state
        return event in (
            Event.FIT_START,
            Event.BATCH_START,
            Event.BEFORE_TRAIN_BATCH,
            Event.BEFORE_FORWARD,
            Event.AFTER_LOSS,
            Event.BATCH_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._begin(state)
        elif event == Event.BATCH_START:
            self._time.begin_step()
            with self._time.part(self._device):
                self._answer(state)
        elif event == Event.BEFORE_TRAIN_BATCH:
            # A batch is tried again with smaller microbatches when memory ran out.
            self._sums = AgreementSums(self.sources, self._weights.device)
        elif event == Event.BEFORE_FORWARD:
            with self._time.part(self._device):
                self._listen(state)
        elif event == Event.AFTER_LOSS:
            self._student[0].objective = None
            self._heard = None
            for teacher in self._live:
                teacher.reshard()
        else:
            self._end_batch(state, logger)

    @property
    def layers_needed(self) -> bool:
        """Whether the states of all layers are needed."""
        return self.layers is not None and self.layers.hidden is not None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self._student:  # before training
            return {**state, **self._restored}
        average = self._average()
        state["average"] = {} if average is None else average.state_dict()
        state["layers"] = {} if self.layers is None else self.layers.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Go on with the averaged teacher and the learnt map of :meth:`state_dict`, when training starts."""
        del strict
        self._restored = {key: state[key] for key in ("average", "layers") if key in state}
        self._student.clear()

    # ---- what is asked of the teacher ----------------------------------------------------------------------
    def _begin(self, state: State) -> None:
        """The student is only now what it is trained as (sharded, perhaps)."""
        student = unwrap(state.model)
        if self._student and self._student[0] is student:
            return  # fit goes on
        if not isinstance(student, CausalLM):
            raise UserError(f"distillation: expected a CausalLM of ours as the model, found {type(student).__name__}.")
        self._staged = isinstance(student, PipelinedLM)
        if not self._staged:
            check_head(student, "distillation: the student")
        self._student[:] = [student]
        self._device = state.device.tensor_to_device(torch.zeros(())).device
        self._weights = self._weights.to(self._device)
        with failing_together():
            self._meet_teacher(student, state, self._device)
        if self.layers is not None:
            self.layers.begin(student, self._live[0].model)
            self.layers.load_state_dict(self._restored.get("layers", {}))
        average = self._average()
        if average is not None and self._restored.get("average"):
            average.load_state_dict(self._restored["average"])
        self._restored = {}

    def _meet_teacher(self, student: CausalLM, state: State, device: torch.device) -> None:
        """Refuse a teacher that does not fit the student; put it where it is asked."""
        vocabulary = int(student.model.config.vocab_size)
        teacher = self._given[0]
        if student.vocabulary_group is not None and (self.layers is not None or self.on_policy is not None):
            raise UserError(
                "distillation: hidden, relations and on_policy need whole layers and logits, which tensor parallelism "
                "cuts. Use compose.distributed=fsdp2, or leave them out."
            )
        if isinstance(student, PipelinedLM):
            made = not isinstance(teacher, TeacherWrapper | CachedTeacher | None)
            if made or self.layers is not None or self.on_policy is not None:
                raise UserError(
                    "distillation: hidden, relations, on_policy and teachers made of the student need the whole "
                    "student, which a pipeline spreads. Use compose.distributed=fsdp2, or leave them out."
                )
            if not student.has_last_stage and not isinstance(teacher, CachedTeacher):
                return
        if isinstance(teacher, CachedTeacher):
            if teacher.vocabulary != vocabulary:
                raise UserError(
                    f"distillation.cache: expected targets over the student's vocabulary of {vocabulary}, found "
                    f"{teacher.vocabulary}. Use a teacher of the same tokenizer (model.vocab_size makes room)."
                )
        elif isinstance(teacher, TeacherWrapper):
            teacher.check_vocabulary(vocabulary)
            if not self._live:
                self._place(teacher, student, state, device)
                self._live.append(teacher)
        elif teacher is None:
            raise UserError("distillation.teacher: expected one, found none on a rank that asks it. Give one.")
        else:
            self._live[:] = [teacher(student)]

    def _place(self, teacher: TeacherWrapper, student: CausalLM, state: State, device: torch.device) -> None:
        cut = student.vocabulary_group is not None
        mesh = student.mesh if cut else getattr(next(student.parameters()), "device_mesh", None)
        where = self.placement if self.placement != "auto" else "replicated" if mesh is None else "sharded"
        if where == "sharded":
            if mesh is None:
                raise UserError(
                    "distillation.teacher.placement: expected a student that FSDP2 shards, found one that is whole on "
                    "each rank. Use compose.distributed=fsdp2, or placement=replicated."
                )
            teacher.to(device)
            try:
                teacher.shard(mesh)
            except UserError as error:
                if self.placement != "auto":
                    raise
                log.warning("distillation: %s With placement=auto each rank has it whole.", error)
        elif where == "offloaded":
            teacher.offload(device)
        else:
            teacher.to(device)

    def _answer(self, state: State) -> None:
        """Replace the answers of the batch by the student's own, if it is this batch's turn: on all ranks or none."""
        self._answering = False
        if self.on_policy is None:
            return
        settings, batch = self.on_policy, int(state.timestamp.batch)
        turn = torch.Generator().manual_seed(settings.seed * 1_000_003 + batch)
        self._answering = bool(torch.rand((), generator=turn) < settings.share)
        if not self._answering:
            return
        device = state.batch["input_ids"].device
        rank, world = dist.get_global_rank(), dist.get_world_size()
        drawn = torch.Generator(device).manual_seed((settings.seed * 1_000_003 + batch) * world + rank)
        with get_precision_context(state.precision, state.precision_config):
            state.batch = sample_answers(
                self._student[0],
                state.batch,
                temperature=settings.temperature,
                generator=drawn,
                eos_id=settings.eos_id,
            )

    def _listen(self, state: State) -> None:
        """Hear the teacher about the microbatch that comes, and let the model's loss be ours."""
        if not self._staged:  # the batch is not divided yet
            with get_precision_context(state.precision, state.precision_config):
                self._heard = self._hear(state.batch)
        done = self._ramp(state)
        self._now = (1.0 if self._answering else self.alpha.at(done), self._temperature_at(done))
        self._logged = (int(state.timestamp.batch) + 1) % self.log_interval == 0
        self._student[0].objective = _Objective(self)

    def _hear(self, batch: Mapping[str, Any]) -> _Heard:
        if self._cached is not None:
            return _Heard(self._cached(batch), None, [])
        inputs = self._live[0].head_inputs(batch, self.layers_needed)
        states = [] if self.layers is None else self.layers.heard()
        head, group = head_of(inputs), self._student[0].vocabulary_group
        if group is not None and self._live[0].model.vocabulary_group is None:  # whole on each rank
            head = head.part(torch.distributed.get_rank(group), group.size())
        return _Heard(HiddenTargets(inputs.hidden, head), inputs, states)

    def loss_of(self, inputs: HeadInputs, batch: Mapping[str, Any], outputs: MutableMapping[str, Any]) -> Tensor:
        """The loss of the microbatch at hand; what :class:`~cheapertraining.models.causal_lm.Objective` asks for."""
        if (heard := self._heard) is None:  # a micro-batch of a pipeline
            with self._time.part(self._device):
                heard = self._hear(batch)
        alpha, temperature = self._now
        source, mask = batch["source"], shifted_mask(batch["labels"])
        loss = chunked_distillation_loss(
            inputs.hidden,
            head_of(inputs),
            heard.targets,
            batch["labels"],
            divergence=self.divergence,
            temperature=temperature,
            alpha=alpha,
            token_weights=self._weights[source] if self._weighted else None,
            chunk_tokens=self.chunk_tokens,
            statistics=self._logged,
            group=self._student[0].vocabulary_group,
        )
        assert loss.cross_entropies is not None
        outputs["token_losses"] = loss.cross_entropies
        # On its own answers the student's cross-entropy says nothing about the source.
        reported = self._student[0].reports and not self._answering
        outputs["sample_loss_sum"] = loss.cross_entropies.sum(dim=1) * reported
        outputs["sample_tokens"] = mask.sum(dim=1) * reported
        if self._logged and self._sums is not None:
            self._sums.add(loss, source, mask)
        total = loss.total
        if self.layers is not None and heard.inputs is not None:
            found = self.layers.losses(inputs, heard.inputs, heard.states, batch, mask)
            for name, value in found.items():
                self._extra[name] = value.detach()
                total = total + value
        return total

    # ---- after the step ------------------------------------------------------------------------------------
    def _end_batch(self, state: State, logger: Logger) -> None:
        if (average := self._average()) is not None:
            with self._time.part(self._device):
                average.update()
        self._time.end_step()
        if self.layers is not None:
            scaler = state.scaler
            scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
            self.layers.step(float(state.optimizers[0].param_groups[0]["lr"]), scale)
        if self._sums is None or int(state.timestamp.batch) % self.log_interval:
            return
        found = self._sums.means()
        if self.divergence.name == "forward_kl" and "agreement" in found:  # sampled targets give no KL
            found |= {f"kl{name.removeprefix('divergence')}": x for name, x in found.items() if "divergence" in name}
        found |= {"alpha": self._now[0], "temperature": self._now[1]}
        found |= {name: float(value) for name, value in self._extra.items()}
        found["overhead"] = self._overhead()
        if self._weighted:
            found |= {f"weight/{name}": float(x) for name, x in zip(self.sources, self._weights.tolist(), strict=True)}
        logger.log_metrics({f"distillation/{name}": value for name, value in found.items()})

    def _overhead(self) -> float:
        """The teacher's share of the time, on the rank where it is largest; a collective call."""
        share = torch.tensor(self._time.read(), device=self._device)
        dist.all_reduce(share, reduce_operation="MAX")
        return float(share)

    # ---- settings ------------------------------------------------------------------------------------------
    def _average(self) -> AverageTeacher | None:
        teacher = self._live[0] if self._live else None
        return teacher if isinstance(teacher, AverageTeacher) else None

    def _temperature_at(self, done: float) -> float:
        return self._cached.temperature if self._cached is not None else self.temperature.at(done)

    def _source_weights(self, given: Mapping[str, float]) -> Tensor:
        for name in given:
            if name not in self.sources:
                known = f"{nearest(name, self.sources)} Sources: {', '.join(self.sources)}."
                raise UserError(f"distillation.source_weights.{name}: no such source.{known}")
        self._weighted = any(weight != 1 for weight in given.values())
        return torch.tensor([float(given.get(name, 1.0)) for name in self.sources])

    def _check(self) -> None:
        if self._cached is None:
            return
        for given, key in ((self.layers, "hidden, relations"), (self.on_policy, "on_policy")):
            if given is not None:
                raise UserError(f"distillation.{key}: expected a live teacher, found a cache, which cannot give this.")
        if {self.temperature.first, self.temperature.last} != {self._cached.temperature}:
            raise UserError(
                f"distillation.temperature: expected that of the cache, {self._cached.temperature:g}, found "
                f"{self.temperature.first:g} to {self.temperature.last:g}. Set it so, or write another cache."
            )


class _Objective:
    """The algorithm, as the model sees it."""

    def __init__(self, algorithm: Distillation) -> None:
        self._algorithm = algorithm

    @property
    def layers(self) -> bool:
        return self._algorithm.layers_needed

    def __call__(self, inputs: HeadInputs, batch: Mapping[str, Any], outputs: MutableMapping[str, Any]) -> Tensor:
        return self._algorithm.loss_of(inputs, batch, outputs)


def _elapsed(state: State) -> float:
    elapsed = state.get_elapsed_duration()
    return 0.0 if elapsed is None else float(elapsed.value)
