"""Checkpoints that survive a full disk and a kill in the middle of writing.

Composer writes a checkpoint in place and replaces the link to the latest one by removing it first; a process that
dies in between leaves half a file, or no link. Here a checkpoint is written under another name, flushed to disk
and then renamed, and so is the link: whatever happens, the link names a whole checkpoint. It is one file, or a folder
to which every rank writes its part (:mod:`cheapertraining.distributed.checkpoints`).
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from composer.utils.checkpoint import save_checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from cheapertraining.data.mixing import MixedDataset
from cheapertraining.distributed.checkpoints import (
    ShardedWriter,
    checkpoint_kind,
    flush,
    load_sharded,
    read_rest,
    saved_shapes,
)
from cheapertraining.errors import UserError
from cheapertraining.mixing.algorithm import OnlineMixing

__all__ = [
    "LATEST",
    "AtomicCheckpointSaver",
    "LoadSharded",
    "check_resumable",
    "latest_checkpoint",
    "state_but_tensors",
]

LATEST = "latest-rank0.pt"
_NAMES = "ep*-ba*"


class AtomicCheckpointSaver(CheckpointSaver):
    """Composer's saver for a local folder, with whole-or-nothing checkpoints and retention across restarts.

    Args:
        folder: where the checkpoints and the link ``latest-rank0.pt`` go.
        save_interval: Composer time string; a checkpoint is also saved at the end of training.
        keep: newest checkpoints to keep, those of earlier processes included; -1 keeps all.
        sharded: write folders in place of files, a part from each rank.
        background: write them while training goes on; only of folders.

    Raises:
        UserError: (while training, on every rank) a checkpoint could not be written. The ones before it and the link
            are left as they were.
    """

    def __init__(
        self, folder: Path, save_interval: str, keep: int, *, sharded: bool = False, background: bool = False
    ) -> None:
        super().__init__(
            folder=str(folder),
            filename="ep{epoch}-ba{batch}-rank{rank}.pt",
            remote_file_name=None,
            latest_filename="latest-rank{rank}.pt",
            latest_remote_file_name=None,
            save_interval=save_interval,
            # A run that resumed before a checkpoint which was written but not yet linked writes it anew.
            overwrite=True,
            num_checkpoints_to_keep=keep,
        )
        self._writer = ShardedWriter(background) if sharded else None

    def init(self, state: State, logger: Logger) -> None:
        """Make the folder; remove what a killed process left half-written."""
        super().init(state, logger)
        if dist.get_global_rank() == 0:
            for leftover in Path(self.folder).glob(".unfinished-*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for what is written in the background."""
        super().fit_end(state, logger)
        self._settle()

    def close(self, state: State, logger: Logger) -> None:
        """End the thread that writes; the run may have failed, so no other rank is waited for."""
        super().close(state, logger)
        if self._writer is not None:
            self._writer.close()

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        if self._writer is not None:
            self._settle()
            name = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
            self._agree(self._save_shards(state, Path(self.folder) / name))
        else:
            self._agree(self._save_whole(state, Path(self.filename.format(state))))

    def _settle(self) -> None:
        """Wait for the save in the background, on all ranks.

        Raises:
            UserError: it failed.
        """
        if self._writer is None:
            return
        failure: str | None = None
        try:
            self._writer.wait()
        except (OSError, RuntimeError, CheckpointException) as error:
            failure = self._explain_or_raise(Path(self.folder) / "the last checkpoint", error)
        self._agree(failure)

    def _agree(self, failure: str | None) -> None:
        """End all ranks together where one has failed, or the others would wait for it at the next collective."""
        told = [each for each in dist.all_gather_object(failure) if each is not None]
        if told:
            raise UserError(told[0])

    def _save_shards(self, state: State, final: Path) -> str | None:
        """Write this rank's part of a folder, or start to; the reason where it did not work."""
        assert self._writer is not None
        rest = {"state": state_but_tensors(state), "rng": reproducibility.get_rng_state()}
        try:
            self._writer.save(final, state.model, state.optimizers[0], rest, self._publish)
        except (OSError, RuntimeError, CheckpointException) as error:
            return self._explain_or_raise(final, error)
        return None

    def _explain_or_raise(self, final: Path, error: BaseException) -> str:
        if isinstance(error, CheckpointException):  # of all ranks
            error = next(iter(error.failures.values()))[0]
        if not _is_write_failure(error):
            raise error
        return self._explain(final, error)

    def _save_whole(self, state: State, final: Path) -> str | None:
        """Write one file, whole or not at all; the reason where it did not work."""
        unfinished = final.with_name(f".unfinished-{final.name}")
        passed_barrier = False
        try:
            self._write(state, unfinished)
            passed_barrier = True
            if dist.get_global_rank() == 0:
                flush(unfinished)
                os.replace(unfinished, final)
                flush(final.parent)
                self._publish(final)
        except (OSError, RuntimeError) as error:
            if not _is_write_failure(error):
                raise
            unfinished.unlink(missing_ok=True)
            if not passed_barrier:
                dist.barrier()  # the one that ends Composer's save_checkpoint on the other ranks
            return self._explain(final, error)
        return None

    def _write(self, state: State, path: Path) -> None:
        """Write one file on rank 0; a collective call that ends with a barrier."""
        save_checkpoint(state, str(path), weights_only=self.weights_only, ignore_keys=self.ignore_keys)

    def _publish(self, saved: Path) -> None:
        """Let the link name ``saved``, then remove what is beyond retention."""
        link = saved.with_name(LATEST)
        new = saved.with_name(f".unfinished-{LATEST}")
        new.unlink(missing_ok=True)
        new.symlink_to(saved.name)
        os.replace(new, link)
        self.saved_checkpoints.append(str(saved))
        if self.num_checkpoints_to_keep < 0:
            return
        # By time of writing, not by batch: a run that was set back overwrites its later checkpoints one by one.
        oldest_first = sorted(saved.parent.glob(_NAMES), key=lambda path: path.stat().st_mtime_ns)
        for path in oldest_first[: -self.num_checkpoints_to_keep]:
            if path != saved:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _explain(self, final: Path, error: BaseException) -> str:
        free = shutil.disk_usage(final.parent).free / 2**20
        last = latest_checkpoint(final.parent)
        kept = f"The last good checkpoint is {last}; it was not touched." if last else "No checkpoint was saved before."
        return (
            f"{final}: the checkpoint could not be written ({_root_cause(error)}; {free:.0f} MiB free). {kept} "
            "Make room, then start again with autoresume=true and the same run_name."
        )


def state_but_tensors(state: State) -> dict[str, Any]:
    """What Composer saves, without the model and its optimizer."""
    everything = state.serialized_attributes
    try:
        state.serialized_attributes = [name for name in everything if name not in ("model", "optimizers")]
        return state.state_dict()
    finally:
        state.serialized_attributes = everything


class LoadSharded(Callback):
    """Loads a folder of shards where Composer would load a file, into whatever layout the model has.

    Args:
        folder: the checkpoint; :func:`check_resumable` has accepted it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before_load(self, state: State, logger: Logger) -> None:
        """Put the saved state into ``state``."""
        load_sharded(self._folder, state.model, state.optimizers[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"{type(self).__name__} is not in the state_dict")
            state.load_state_dict(read_rest(self._folder)["state"], logger)
        state.load_path = str(self._folder)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that the link in ``folder`` names; None where there is none yet."""
    link = folder / LATEST
    return link.resolve() if link.exists() else None


def check_resumable(
    checkpoint: Path, model: nn.Module, mixture: MixedDataset, algorithms: Sequence[Algorithm]
) -> list[dict[str, Any]]:
    """Refuse a checkpoint that is not this run's, before anything is loaded from it.

    Composer itself would load the parameters that fit, and say nothing.

    Args:
        checkpoint: a file, or a folder of shards.
        model: whose ``state_dict`` the checkpoint must match in names and shapes.
        mixture: must accept the saved state of its like.
        algorithms: those of the run; with online mixing if and only if the checkpoint has it.

    Returns:
        The states of the random generators by rank, which Composer restores at the start of an epoch only.

    Raises:
        UserError: the file cannot be read, or is of another model or other sources; the message says which.
    """
    saved, state, random_states = _saved(checkpoint)
    if "dataset_state" not in state:
        raise UserError(
            f"{checkpoint}: holds weights alone, from which no run can go on. Begin one with them: convert it to a "
            "Hugging Face folder (tools/convert_checkpoint.py) and set model.name_or_path."
        )
    saved_mixture = state["dataset_state"]["train"]
    saved_algorithms = {name for name, _ in state["algorithms"]}
    settings = checkpoint.parent.parent / "config.yaml"
    remedy = f"Resume with the settings in {settings}, or start a new run (another run_name)."
    own = model.state_dict()
    for name in [*own, *saved]:
        found, wanted = saved.get(name), list(own[name].shape) if name in own else None
        if found != wanted:
            raise UserError(
                f"{checkpoint}: a checkpoint of another model. Parameter '{name}' is {found or 'absent'} in it and "
                f"{wanted or 'absent'} in this run. {remedy}"
            )
    saved_mixing = "OnlineMixing" in saved_algorithms
    if saved_mixing != any(isinstance(algorithm, OnlineMixing) for algorithm in algorithms):
        there, here = ("on", "off") if saved_mixing else ("off", "on")
        raise UserError(
            f"{checkpoint}: algorithms.online_mixing was {there} when it was saved and is {here} now. {remedy}"
        )
    try:
        mixture.load_state_dict(saved_mixture)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return random_states


def _saved(checkpoint: Path) -> tuple[dict[str, list[int]], dict[str, Any], list[dict[str, Any]]]:
    """Shapes of the model's tensors, the state of the run, the random generators by rank."""
    try:
        if checkpoint_kind(checkpoint) == "sharded":
            rest = read_rest(checkpoint)
            return saved_shapes(checkpoint), rest["state"], rest["rng"]
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
        state = content["state"]
        return {name: list(tensor.shape) for name, tensor in state["model"].items()}, state, content["rng"]
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(
            f"{checkpoint}: not a readable checkpoint ({_root_cause(error)}). Let {LATEST} beside it point to an "
            "older one, or start a new run (another run_name)."
        ) from error


def _is_write_failure(error: BaseException) -> bool:
    """Whether the file system refused; torch reports that as a RuntimeError of its zip writer."""
    root = _root_cause(error)
    if isinstance(root, OSError):
        return root.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return "inline_container" in str(root) or "PytorchStreamWriter" in str(root)


def _root_cause(error: BaseException) -> BaseException:
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
