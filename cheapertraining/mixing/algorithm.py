"""The controller inside a Composer trainer.

Add `OnlineMixing(controller, estimator)` to the trainer's `algorithms`. After each microbatch's loss it adds
up the loss of each source; at the end of each batch the sums are reduced over the ranks; at the end of each
interval it measures, decides and changes the mixture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.core import Algorithm, Event, Precision, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.losses import IGNORED
from cheapertraining.influence.model_access import losses_of_logits, model_losses
from cheapertraining.influence.probes import ProbeBank
from cheapertraining.influence.scorers import SourceInfluence
from cheapertraining.influence.scorers.accumulation import MicrobatchEstimator
from cheapertraining.influence.scorers.gram import GradientEstimator, SourceGradients
from cheapertraining.influence.scorers.sources import SourceEstimator
from cheapertraining.mixing.agreement import agreed
from cheapertraining.mixing.by_source import sums_by_source
from cheapertraining.mixing.controller import Decision, MixtureController, Totals
from cheapertraining.mixing.measuring import read_probes
from cheapertraining.mixing.records import append_lines, drop_later, metrics_of, note_source_changes
from cheapertraining.mixing.signals import GRAM, PROBE_LOSSES, REFERENCE, ProbeReading
from cheapertraining.timing import TimeShare

__all__ = ["OnlineMixing"]


class OnlineMixing(Algorithm):
    """Changes the mixture while it trains.

    The model's ``loss`` must leave ``sample_loss_sum`` float ``[B]`` and ``sample_tokens`` int64 ``[B]`` in
    its outputs, and batches must carry ``source`` int64 ``[B]``.

    Metrics, every ``log_interval`` batches and at each decision, for each source: ``mixture/weight/<s>``
    (newest), ``mixture/sampled/<s>`` (of the batch just trained on), ``mixture/tokens/<s>``,
    ``mixture/epochs/<s>``, ``loss/train/<s>`` and ``mixture/objective/<s>`` (mean loss, and share of the tokens that
    it was taken over, since the last such log), and ``mixture/overhead``, the share of step time that all of this has
    taken since training (re)started. At each decision also, where influence was measured,
    ``mixture/score/<probe>/<s>``, ``mixture/score_se/<probe>/<s>``, ``mixture/probe_loss/<probe>`` and
    ``mixture/probe_weight/<probe>``; where gradients were, ``mixture/gradient_norm2/<s>`` and
    ``mixture/gradient_variance/<s>``.

    Composer saves the state of rank 0 alone, so everything in it is the same on all ranks.

    Args:
        controller: decides.
        estimator: measures; needed where the controller's strategy needs ``INFLUENCE``. A `MicrobatchEstimator` looks
            at the training passes themselves, which must hold one source each: give the data spec
            ``split_batch=source_microbatches``.
        gradients: likewise for ``GRAM``.
        probes: likewise for ``PROBE_LOSSES``; the same samples, the first window of each probe, at every decision.
        reference: likewise for ``REFERENCE``: a model over the same tokens, frozen here. Each rank holds all of it.
        ledger_path: file that rank 0 appends each decision to, as one JSON object a line. On resuming,
            decisions made after the checkpoint are dropped from it, since they are made again. None: no file.
        log_interval: batches between logs of the mixture.

    Raises:
        UserError: the strategy needs a signal that nothing measures.
    """

    def __init__(
        self,
        controller: MixtureController,
        estimator: SourceEstimator | MicrobatchEstimator | None = None,
        *,
        gradients: GradientEstimator | None = None,
        probes: ProbeBank | None = None,
        reference: nn.Module | None = None,
        ledger_path: str | Path | None = None,
        log_interval: int = 10,
    ) -> None:
        if controller.needs_influence and estimator is None:
            raise UserError(
                f"algorithms.online_mixing.strategy: '{controller.strategy.name}' measures influence on "
                "probes, but there is no probe. Add one under data.probes, or use another strategy."
            )
        needs = {GRAM: gradients, PROBE_LOSSES: probes, REFERENCE: reference}
        for signal, measures in needs.items():
            if signal in controller.strategy.needs and measures is None:
                raise UserError(
                    f"algorithms.online_mixing.strategy: '{controller.strategy.name}' needs {_MEASURES[signal]}, "
                    "found none."
                )
        self.controller = controller
        self.estimator = estimator
        self.gradients = gradients
        self.probes = probes
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.ledger_path = None if ledger_path is None else Path(ledger_path)
        self.log_interval = log_interval
        self._logged = controller.totals
        # float64 [2 or 3, K], losses, tokens and, with a reference model, excess losses by source: of the batch at hand
        # (this rank), and not yet recorded (all ranks).
        self._batch_sums: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None
        self._factors: list[torch.Tensor] = []  # With which a microbatch's loss goes into its backward pass.
        self._time = TimeShare()
        self._device = torch.device("cpu")

    @staticmethod
    def required_on_load() -> bool:
        """The mixture's course is part of a run."""
        return True

    def __repr__(self) -> str:
        # Composer saves it; without an address it is the same on every rank and in every run.
        return f"{type(self).__name__}({self.controller.strategy.name})"

    def match(self, event: Event, state: State) -> bool:
        return event in (
            Event.FIT_START,
            Event.BATCH_START,
            Event.BEFORE_TRAIN_BATCH,
            Event.BEFORE_FORWARD,
            Event.AFTER_LOSS,
            Event.AFTER_BACKWARD,
            Event.BATCH_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._device = state.device.tensor_to_device(torch.zeros(())).device
            if self.reference is not None:
                self.reference.to(next(state.model.parameters()).device)
            self._begin(int(state.timestamp.batch))
        elif event == Event.BATCH_START:
            self._time.begin_step()
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._batch_sums = None  # A batch is tried again with smaller microbatches when memory ran out.
        elif event == Event.AFTER_LOSS:
            with self._time.part(self._device):
                self._add_microbatch(state.batch, state.outputs, self._excess(state))
        elif event == Event.BATCH_END:
            self._end_batch(state, logger)
        if isinstance(self.estimator, MicrobatchEstimator) and event not in (Event.FIT_START, Event.BATCH_END):
            with self._time.part(self._device):
                self._watch(event, state, self.estimator)

    def _watch(self, event: Event, state: State, estimator: MicrobatchEstimator) -> None:
        """Let the estimator see each training pass."""
        if event == Event.BATCH_START:
            estimator.resume(state.model)
            batch, controller = int(state.timestamp.batch), self.controller
            # From an interval before a decision on; where decisions are further apart, with directions made there.
            wanted = controller.next_due(batch) - controller.interval
            if batch >= wanted if not estimator.ready else controller.updates is not None and batch == wanted:
                self._prepare(state, estimator)
        elif event == Event.BEFORE_TRAIN_BATCH:
            estimator.begin_batch()
        elif event == Event.BEFORE_FORWARD:
            self._factors.clear()
            estimator.begin_pass()
        elif event == Event.AFTER_LOSS:
            loss = state.loss if torch.is_tensor(state.loss) else next(iter(state.loss))
            loss.register_hook(self._factors.append)
        elif event == Event.AFTER_BACKWARD:
            # Not those that the outputs report, which of ranks that see the same samples one does.
            tokens = (state.batch["labels"][:, 1:] != IGNORED).sum()
            scale = self._factors.pop().double() / tokens.clamp_min(1)
            estimator.mark(state.batch["source"], tokens, scale)

    def _prepare(self, state: State, estimator: MicrobatchEstimator) -> None:
        with _measuring_context(state):
            estimator.prepare(
                state.model,
                state.optimizers[0],
                update_index=self.controller.measurements,
                microbatch_size=_microbatch_size(state),
            )

    def state_dict(self) -> dict[str, Any]:
        self._flush()
        return {
            **super().state_dict(),
            "controller": self.controller.state_dict(),
            "estimator": None if self.estimator is None else self.estimator.state_dict(),
            "logged": self._logged.by_name(self.controller.source_names),
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Continue as :meth:`state_dict` left off.

        Raises:
            UserError: the state is of other sources.
        """
        self.controller.load_state_dict(state["controller"])
        if self.estimator is not None and state["estimator"] is not None:
            self.estimator.load_state_dict(state["estimator"])
        self._pending = None
        self._logged = Totals.of(state["logged"], self.controller.source_names)

    def _begin(self, batch: int) -> None:
        changes = self.controller.after_source_changes(batch)
        if self.ledger_path is not None and dist.get_global_rank() == 0:
            drop_later(self.ledger_path, batch)
            note_source_changes(self.ledger_path, batch, changes)
        if batch == 0 and (decision := self.controller.start()) is not None:
            self._write(decision)

    def _excess(self, state: State) -> torch.Tensor | None:
        """By sample: sum of ``max(loss - reference model's loss, 0)`` over its tokens, float64 ``[B]``."""
        if self.reference is None:
            return None
        outputs: Any = state.outputs
        with torch.no_grad():
            if "token_losses" in outputs:  # of a model that makes no logits as a whole
                own: torch.Tensor = outputs["token_losses"]
            else:
                own, _ = losses_of_logits(state.model, outputs["logits"].detach(), state.batch["labels"])
            with get_precision_context(state.precision, state.precision_config):
                other, _ = model_losses(self.reference, state.batch)
        # Of ranks that see the same samples one reports them.
        reported: torch.Tensor = outputs["sample_tokens"] > 0
        return (own.double() - other.double()).clamp(min=0).sum(dim=1) * reported

    def _add_microbatch(self, batch: Any, outputs: Any, excess: torch.Tensor | None = None) -> None:
        try:
            sums, tokens, source = outputs["sample_loss_sum"], outputs["sample_tokens"], batch["source"]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                "online_mixing: expected 'sample_loss_sum' and 'sample_tokens' in the model's outputs and "
                f"'source' in the batch, found no {error}. Use models from cheapertraining.models and "
                "loaders from cheapertraining.data."
            ) from error
        rows = [sums, tokens] if excess is None else [sums, tokens, excess]
        added = sums_by_source(rows, source, len(self.controller.source_names))
        self._batch_sums = added if self._batch_sums is None else self._batch_sums + added

    def _end_batch(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        due = self.controller.due(batch)
        logs = due or batch % self.log_interval == 0
        metrics: dict[str, float] = {}
        with self._time.part(self._device):
            if self._batch_sums is not None:
                dist.all_reduce(self._batch_sums)
                self._pending = self._batch_sums if self._pending is None else self._pending + self._batch_sums
                self._batch_sums = None
            if isinstance(self.estimator, MicrobatchEstimator):
                self.estimator.end_batch()
            if due:
                metrics |= self._decide(state, batch)
            if logs:
                metrics |= self._course(batch)
        self._time.end_step()
        if logs:
            logger.log_metrics(metrics | {"mixture/overhead": self._time.read()})

    def _decide(self, state: State, batch: int) -> dict[str, float]:
        self._flush()
        learning_rate = float(state.optimizers[0].param_groups[0]["lr"])
        needs = self.controller.strategy.needs
        with _measuring_context(state):
            measured = self._measure(state) if self.controller.needs_influence else None
            gradients = self._measure_gradients(state) if GRAM in needs else None
            reading = self._read_probes(state) if PROBE_LOSSES in needs else None
        wish = self.controller.propose(batch, measured, learning_rate, gradients=gradients, probe_losses=reading)
        weights = agreed(wish, self.controller.source_names)
        self._write(self.controller.commit(batch, weights, measured, learning_rate, probe_losses=reading))
        return metrics_of(measured, gradients, reading, self.controller.probe_importance)

    def _measure(self, state: State) -> SourceInfluence:
        assert self.estimator is not None
        return self.estimator.measure(
            state.model,
            state.optimizers[0],
            update_index=self.controller.measurements,
            microbatch_size=_microbatch_size(state),
        )

    def _measure_gradients(self, state: State) -> SourceGradients:
        assert self.gradients is not None
        index = self.controller.measurements
        return self.gradients.measure(state.model, update_index=index, microbatch_size=_microbatch_size(state))

    def _read_probes(self, state: State) -> ProbeReading:
        assert self.probes is not None
        return read_probes(self.probes, state.model, _microbatch_size(state))

    def _course(self, batch: int) -> dict[str, float]:
        """Weights, counts and losses by source."""
        self._flush()
        controller, mixture = self.controller, self.controller.mixture
        newest, sampled, counts = (
            mixture.get_current_weights(),
            mixture.weights_at(batch - 1),
            mixture.counts(),
        )
        losses, objective = controller.totals.mean_since(self._logged), controller.totals.share_since(self._logged)
        self._logged = controller.totals
        metrics: dict[str, float] = {}
        for k, name in enumerate(controller.source_names):
            metrics[f"mixture/weight/{name}"] = newest[name]
            metrics[f"mixture/sampled/{name}"] = sampled[name]
            metrics[f"mixture/tokens/{name}"] = float(counts.tokens[k])
            metrics[f"mixture/epochs/{name}"] = float(counts.epochs[k])
            metrics[f"mixture/objective/{name}"] = float(objective[k])
            if losses[k] == losses[k]:  # NaN: the source did not come.
                metrics[f"loss/train/{name}"] = float(losses[k])
        return metrics

    def _flush(self) -> None:
        """Hand what is pending to the controller. Till then it stays on the device: no step waits for it."""
        if self._pending is not None:
            self.controller.record(*self._pending.cpu().numpy())
            self._pending = None

    def _write(self, decision: Decision) -> None:
        if self.ledger_path is None or dist.get_global_rank() != 0:
            return
        entry = decision.to_dict()
        del entry["realized"]  # Known at the next decision only, which carries it.
        history = self.controller.history
        entry["realized_since_last"] = history[-2].realized if len(history) > 1 else None
        append_lines(self.ledger_path, [entry])


_MEASURES = {
    GRAM: "an estimator of the sources' gradients",
    PROBE_LOSSES: "probes (data.probes)",
    REFERENCE: "a reference model (algorithms.online_mixing.doremi.reference)",
}


def _microbatch_size(state: State) -> int | None:
    size = state.device_train_microbatch_size
    return size if isinstance(size, int) else None


def _measuring_context(state: State) -> contextlib.AbstractContextManager[None]:
    """Gradients on the side may be as coarse as training's; the perturbed passes switch autocast off themselves.

    In float16 a gradient without loss scaling underflows.
    """
    if state.precision == Precision.AMP_BF16:
        return get_precision_context(state.precision, state.precision_config)
    return contextlib.nullcontext()
