"""Checkpoints of a run in pipeline stages: one file as one process writes it, and back from any layout's."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from cheapertraining.distributed.checkpoints import checkpoint_kind, read_rest
from cheapertraining.distributed.pipeline_state import gather_stages, load_stages
from cheapertraining.models.stages import PipelinedLM
from cheapertraining.observe.checkpoints import AtomicCheckpointSaver, state_but_tensors

__all__ = ["LoadStages", "StagesCheckpointSaver"]


class StagesCheckpointSaver(AtomicCheckpointSaver):
    """Gathers the stages on rank 0, which writes the file."""

    def _write(self, state: State, path: Path) -> None:
        assert isinstance(state.model, PipelinedLM)
        model, optimizer = gather_stages(state.model, state.optimizers[0], state.model.duplicates)
        rest = state_but_tensors(state)
        names = {type(each).__qualname__: optimizer for each in state.optimizers}
        content = {"state": rest | {"model": model, "optimizers": names}, "rng": reproducibility.get_rng_state()}
        if dist.get_global_rank() == 0:
            torch.save(content, path)
        dist.barrier()


class LoadStages(Callback):
    """Loads a checkpoint of any layout where Composer would load a file.

    Args:
        checkpoint: that :func:`~cheapertraining.observe.checkpoints.check_resumable` has accepted.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    def before_load(self, state: State, logger: Logger) -> None:
        """Put the saved state into ``state``."""
        assert isinstance(state.model, PipelinedLM)
        sharded = checkpoint_kind(self._checkpoint) == "sharded"
        aliases = dict.fromkeys(state.model.duplicates, "model.model.embed_tokens.weight")
        load_stages(self._checkpoint, state.model, state.optimizers[0], aliases, sharded)
        if sharded:
            rest = read_rest(self._checkpoint)["state"]
        else:
            rest = torch.load(self._checkpoint, map_location="cpu", weights_only=False, mmap=True)["state"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"{type(self).__name__} is not in the state_dict")
            state.load_state_dict(
                {name: value for name, value in rest.items() if name not in ("model", "optimizers")}, logger
            )
        state.load_path = str(self._checkpoint)
