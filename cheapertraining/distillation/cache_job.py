"""The settings of a run that writes a teacher's targets, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cheapertraining.distillation.drawing import Drawing
from cheapertraining.distillation.packing import Kind
from cheapertraining.distillation.teacher import DTYPES, Quantization, TeacherWrapper
from cheapertraining.errors import UserError, nearest

__all__ = ["CacheJob"]


@dataclass(frozen=True)
class CacheJob:
    """What to write.

    Attributes:
        teacher: a Hugging Face folder, or a checkpoint of a run.
        shards: shard folders, or folders that hold such.
        out: the cache; ``<out>/<source>/<split>`` for each of them.
        kind: ``sampled`` or ``top_k``.
        size: draws a position (default 50), or ``k`` (default 12).
        temperature: of the distribution that is stored; training must use the same.
        drawing: ``systematic`` or ``multinomial``.
        seed: of the draws.
        batch_size: rows in a pass of the teacher.
        dtype: of the teacher: float32, bfloat16 or float16.
        quantization: of the teacher: 8bit or 4bit, on CUDA.
        processes: that share the work; on CUDA each takes a device in turn.
        device: cpu or cuda; default the GPU where there is one.
        resume: go on with what was begun, leave alone what is finished.
        overwrite: begin anew where something is already.

    Raises:
        UserError: a setting that is unknown or does not go with another.
    """

    teacher: Path
    shards: Sequence[Path]
    out: Path
    kind: Kind = "sampled"
    size: int | None = None
    temperature: float = 1.0
    drawing: Drawing = "systematic"
    seed: int = 0
    batch_size: int = 8
    dtype: str = "float32"
    quantization: Quantization | None = None
    processes: int = 1
    device: str | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--kind", self.kind, ("sampled", "top_k")),
            ("--drawing", self.drawing, ("systematic", "multinomial")),
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--quantization", self.quantization or "8bit", ("8bit", "4bit")),
        ):
            if value not in known:
                raise UserError(
                    f"{option}: expected one of {', '.join(known)}, found '{value}'.{nearest(value, known)}"
                )
        for option, number in (("--batch-size", self.batch_size), ("--processes", self.processes)):
            if number < 1:
                raise UserError(f"{option}: expected at least 1, found {number}.")
        if not self.temperature > 0:
            raise UserError(f"--temperature: expected a number above 0, found {self.temperature}.")
        if self.resume and self.overwrite:
            raise UserError("--resume, --overwrite: expected one of them at most, found both.")

    @property
    def parts_folder(self) -> Path:
        """Where unfinished work lies."""
        return self.out / ".parts"

    def process_device(self, process: int) -> torch.device:
        """The device of a process.

        Raises:
            UserError: CUDA was asked for and is not there.
        """
        kind = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device: {kind} was asked for, but torch finds no CUDA device. Use --device cpu.")
        return torch.device("cuda", process % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)

    def load(self, process: int = 0) -> TeacherWrapper:
        """The teacher, on the device of a process."""
        device = self.process_device(process)
        return TeacherWrapper.load(self.teacher, dtype=self.dtype, quantization=self.quantization, device=device)
