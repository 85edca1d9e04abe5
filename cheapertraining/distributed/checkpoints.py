"""Checkpoints that all ranks write, each its own part, and that load under any layout and number of ranks.

A checkpoint is a folder: what torch.distributed.checkpoint (DCP) writes, ``*.distcp`` and ``.metadata``, with the
model's and the optimizer's tensors by name, and ``state.pt`` with everything else. It is written under another name and
renamed when all of it is on disk, so that a folder with a checkpoint's name is a whole checkpoint.
"""

from __future__ import annotations

import datetime
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer
from torch.torch_version import TorchVersion

from cheapertraining.errors import UserError

__all__ = ["ShardedWriter", "checkpoint_kind", "flush", "load_sharded", "read_rest", "saved_shapes"]

REST = "state.pt"
UNFINISHED = ".unfinished-"

# What `state.pt` may hold beyond tensors and plain Python: arrays (NumPy's random generator), Composer's durations.
_SAFE: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.uint32, np.int64, np.float64)),
    np.zeros(0).__reduce__()[0],  # what makes an array when it is unpickled; its module depends on NumPy's version
    datetime.timedelta,
    TorchVersion,
]


def checkpoint_kind(path: Path) -> Literal["full", "sharded"]:
    """Whether ``path`` is a checkpoint in one file or in a folder of shards; looked at before anything is loaded.

    Raises:
        UserError: neither; or shards are missing or cut short.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise UserError(
                    f"{path}: expected a checkpoint that torch.save wrote (a zip file), found another file."
                )
        return "full"
    if not path.is_dir():
        raise UserError(f"{path}: expected a checkpoint file, or a folder of shards, found nothing.")
    if path.name.startswith(UNFINISHED):
        raise UserError(f"{path}: a checkpoint that was not written to its end. Use one without '{UNFINISHED}'.")
    if (path / "config.json").is_file():
        raise UserError(f"{path}: a Hugging Face model folder, no checkpoint of a run. Use model.name_or_path={path}.")
    for name in (".metadata", REST):
        if not (path / name).is_file():
            raise UserError(f"{path}: expected a folder of shards, found no {name} in it. Use another checkpoint.")
    for place in (_metadata(path).storage_data or {}).values():
        file = path / place.relative_path
        if not file.is_file() or file.stat().st_size < place.offset + place.length:
            found = f"{file.stat().st_size} bytes of it" if file.is_file() else "none"
            raise UserError(
                f"{file}: a shard of this checkpoint; expected at least {place.offset + place.length} bytes, found "
                f"{found}. Copy all files of the folder, or use another checkpoint."
            )
    return "sharded"


def saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Whole shapes of the model's tensors in a folder of shards, by name."""
    found = _metadata(folder).state_dict_metadata
    return {
        name.removeprefix("model."): list(entry.size)
        for name, entry in found.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


def read_rest(folder: Path) -> dict[str, Any]:
    """Everything in a folder of shards but the model's and the optimizer's tensors.

    Raises:
        UserError: the file cannot be read, or holds something that no checkpoint of ours does.
    """
    try:
        with torch.serialization.safe_globals(_SAFE):
            found: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(
            f"{folder / REST}: not readable ({str(error).splitlines()[0]}). Use another checkpoint."
        ) from error
    return found


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Load a folder of shards into a model and its optimizer, in place, however either is spread; on all ranks.

    Args:
        folder: of :class:`ShardedWriter`, from any layout and number of ranks.
        model: of the same names and whole shapes, wrapped or not.
        optimizer: over the model's parameters; None loads the model alone.

    Raises:
        UserError: the folder was saved with another kind of optimizer.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        saved = _metadata(folder).state_dict_metadata
        wanted = [f"optimizer.state.{name}.{key}" for name, own in state["optimizer"]["state"].items() for key in own]
        if absent := [name for name in wanted if name not in saved]:
            raise UserError(f"{folder}: saved with another optimizer; {absent[0]} is not in it. Use that optimizer.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


class ShardedWriter:
    """Writes checkpoints, one at a time, at once or in the background; make one on all ranks together.

    Args:
        background: copy what is to be saved into host memory and return; a thread writes it. The training loop goes on
            meanwhile, over a process group of its own.
    """

    def __init__(self, background: bool = False) -> None:
        self._background = background
        several = dist.is_initialized() and dist.get_world_size() > 1
        # Of its own and on the CPU: the thread must not get between the collectives of training.
        self._group = dist.new_group(backend="gloo") if several and background else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def save(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer | None,
        rest: dict[str, Any],
        publish: Callable[[Path], None],
    ) -> None:
        """Write ``folder``; a collective call. The save before has to be over, see :meth:`wait`.

        Args:
            folder: to write; replaced where it exists.
            model, optimizer: however they are spread.
            rest: all else, rank 0's; what ``torch.load(weights_only=True)`` can read.
            publish: called on rank 0, perhaps in another thread, when the folder is whole and on disk.

        Raises:
            OSError, RuntimeError: it could not be written (with ``background``, :meth:`wait` raises). What is left over
                has ``.unfinished-`` before its name.
        """
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
        if optimizer is not None:
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        unfinished = folder.with_name(UNFINISHED + folder.name)
        failure = [_begin(unfinished, rest) if _is_first() else None]
        if dist.is_initialized():
            dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        writer = FileSystemWriter(unfinished, sync_files=True)
        if self._thread is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                save(state, storage_writer=writer)
            _finish(unfinished, folder, publish)
            return
        written = async_save(state, storage_writer=writer, process_group=self._group)

        def finish() -> None:
            written.result()
            _finish(unfinished, folder, publish)

        self._pending = self._thread.submit(finish)

    def wait(self) -> None:
        """Return when nothing is being written any more on this rank.

        Raises:
            OSError, RuntimeError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after what it is writing."""
        if self._thread is not None:
            self._thread.shutdown()


def flush(path: Path) -> None:
    """fsync a file or a folder, so that it is on disk before anything refers to it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _begin(unfinished: Path, rest: dict[str, Any]) -> Exception | None:
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        torch.save(rest, unfinished / REST)
        flush(unfinished / REST)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        return error
    return None


def _finish(unfinished: Path, folder: Path, publish: Callable[[Path], None]) -> None:
    """On rank 0, whose part of DCP ends when all ranks' shards are written: give the folder its name."""
    if not _is_first():
        return
    flush(unfinished)
    if folder.is_dir():
        shutil.rmtree(folder)  # of a run that was set back: nothing refers to it
    os.replace(unfinished, folder)
    flush(folder.parent)
    publish(folder)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(f"{folder / '.metadata'}: not readable ({error}). Use another checkpoint.") from error
