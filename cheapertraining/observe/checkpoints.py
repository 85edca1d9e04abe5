"""Checkpoints that survive a full disk and a kill in the middle of writing.

Composer writes a checkpoint in place and replaces the link to the latest one by removing it first; a process that
dies in between leaves half a file, or no link. Here a checkpoint is written under another name, flushed to disk
and then renamed, and so is the link: whatever happens, the link names a whole checkpoint.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from torch import nn

from cheapertraining.data.mixing import MixedDataset
from cheapertraining.errors import UserError
from cheapertraining.mixing.algorithm import OnlineMixing

__all__ = ["LATEST", "AtomicCheckpointSaver", "check_resumable", "latest_checkpoint"]

LATEST = "latest-rank0.pt"
_NAMES = "ep*-ba*"


class AtomicCheckpointSaver(CheckpointSaver):
    """Composer's saver for a local folder, with whole-or-nothing checkpoints and retention across restarts.

    Args:
        folder: where the checkpoints and the link ``latest-rank0.pt`` go.
        save_interval: Composer time string; a checkpoint is also saved at the end of training.
        keep: newest checkpoints to keep, those of earlier processes included; -1 keeps all.

    Raises:
        UserError: (while training, on every rank) a checkpoint could not be written. The ones before it and the link
            are left as they were.
    """

    def __init__(self, folder: Path, save_interval: str, keep: int) -> None:
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

    def init(self, state: State, logger: Logger) -> None:
        """Make the folder; remove what a killed process left half-written."""
        super().init(state, logger)
        if dist.get_global_rank() == 0:
            for leftover in Path(self.folder).glob(".unfinished-*"):
                leftover.unlink(missing_ok=True)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        failure: str | None = None
        if state.fsdp_sharded_state_dict_enabled:
            # A folder of shards with a metadata file that is written last; it counts once the link names it.
            name = self.filename.format(state, keep_placeholders=True)
            saved = save_checkpoint(state, name, weights_only=self.weights_only, ignore_keys=self.ignore_keys)
            if dist.get_global_rank() == 0 and saved is not None:
                self._publish(Path(saved).parent)
        else:
            failure = self._save_whole(state, Path(self.filename.format(state)))
        told = [failure]  # all ranks end together, or the others would wait for rank 0 at the next collective
        dist.broadcast_object_list(told)
        if told[0] is not None:
            raise UserError(told[0])

    def _save_whole(self, state: State, final: Path) -> str | None:
        """Write one file, whole or not at all; the reason where it did not work."""
        unfinished = final.with_name(f".unfinished-{final.name}")
        passed_barrier = False
        try:
            save_checkpoint(state, str(unfinished), weights_only=self.weights_only, ignore_keys=self.ignore_keys)
            passed_barrier = True
            if dist.get_global_rank() == 0:
                _flush(unfinished)
                os.replace(unfinished, final)
                _flush(final.parent)
                self._publish(final)
        except (OSError, RuntimeError) as error:
            if not _is_write_failure(error):
                raise
            unfinished.unlink(missing_ok=True)
            if not passed_barrier:
                dist.barrier()  # the one that ends Composer's save_checkpoint on the other ranks
            return self._explain(final, error)
        return None

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


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that the link in ``folder`` names; None where there is none yet."""
    link = folder / LATEST
    return link.resolve() if link.exists() else None


def check_resumable(
    checkpoint: Path, model: nn.Module, mixture: MixedDataset, algorithms: Sequence[Algorithm]
) -> list[dict[str, Any]] | None:
    """Refuse a checkpoint that is not this run's, before anything is loaded from it.

    Composer itself would load the parameters that fit, and say nothing.

    Args:
        checkpoint: a file; a folder of shards is not looked into.
        model: whose ``state_dict`` the checkpoint must match in names and shapes.
        mixture: must accept the saved state of its like.
        algorithms: those of the run; with online mixing if and only if the checkpoint has it.

    Returns:
        The states of the random generators by rank, which Composer restores at the start of an epoch only.

    Raises:
        UserError: the file cannot be read, or is of another model or other sources; the message says which.
    """
    if checkpoint.is_dir():
        return None
    try:
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
        state, random_states = content["state"], content["rng"]
        saved, saved_mixture = state["model"], state["dataset_state"]["train"]
        saved_algorithms = {name for name, _ in state["algorithms"]}
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(
            f"{checkpoint}: not a readable checkpoint ({_root_cause(error)}). Let {LATEST} beside it point to an "
            "older one, or start a new run (another run_name)."
        ) from error
    settings = checkpoint.parent.parent / "config.yaml"
    remedy = f"Resume with the settings in {settings}, or start a new run (another run_name)."
    own = model.state_dict()
    for name in [*own, *saved]:
        found, wanted = (list(tensors[name].shape) if name in tensors else None for tensors in (saved, own))
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
    return cast("list[dict[str, Any]]", random_states)


def _flush(path: Path) -> None:
    """fsync a file or a folder, so that it is on disk before anything refers to it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
