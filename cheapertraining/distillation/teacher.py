"""Live teachers: another model, frozen, which is given the student's own batches.

    teacher = TeacherWrapper.load("models/teacher", dtype="bfloat16")
    targets = teacher(batch)               # HiddenTargets: last hidden states and the head that makes logits of them

A teacher keeps packed documents apart and takes positions exactly as the student does (both are
:class:`~cheapertraining.models.causal_lm.CausalLM`), and its whole logits never exist.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from cheapertraining.config import ModelConfig
from cheapertraining.distillation.targets import HiddenTargets, OutputHead
from cheapertraining.distributed.parallelism import MESH_NAMES
from cheapertraining.distributed.tensor_parallel import apply_tensor_parallel
from cheapertraining.errors import UserError
from cheapertraining.influence.store import model_fingerprint
from cheapertraining.models.causal_lm import CausalLM, HeadInputs, attention_for, build_causal_lm, head_mismatch
from cheapertraining.models.saved import load_checkpointed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DTYPES", "Quantization", "TeacherWrapper", "check_head", "head_of"]

Quantization = Literal["8bit", "4bit"]
_, SHARD, TENSOR = MESH_NAMES
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TeacherWrapper(nn.Module):
    """A frozen causal language model. Hold it where no module does, such as in a list, or it becomes part of the
    student's state.

    Args:
        model: the teacher; a transformers model is wrapped.
        dtype: of its weights and of its own computations, whatever the student's autocast says; None: as it is, and
            computed as the student's are.
        device: where it lives; None: where it is.
        name: for messages: its folder or checkpoint.

    Raises:
        UserError: it lets packed documents see each other, or its logits are not those of a plain output head.
    """

    def __init__(
        self,
        model: CausalLM | PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        name: str = "teacher",
    ) -> None:
        super().__init__()
        self.model = model if isinstance(model, CausalLM) else CausalLM(model)
        self.name = name
        self.dtype = dtype
        check_head(self.model, f"teacher {name}")
        self.model.requires_grad_(False)
        self.model.to(device=device, dtype=dtype)
        self._sharded = False
        self.train(False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        quantization: Quantization | None = None,
        device: torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> TeacherWrapper:
        """A teacher from a Hugging Face folder or from a checkpoint of a run.

        Args:
            path: a folder with config.json, or a file ``<run>/checkpoints/….pt`` (a pickle: of your own runs only).
            dtype: one of :data:`DTYPES`; None: float32.
            quantization: weights of 8 or 4 bits, by bitsandbytes; on CUDA alone.
            device: where it is to live.
            trust_remote_code: as transformers.

        Raises:
            UserError: nothing of the kind at ``path``, or what this machine cannot do.
        """
        place = Path(path)
        wanted = DTYPES[dtype or "float32"]
        if quantization is not None:
            model: Any = _load_quantized(place, quantization, wanted, device, trust_remote_code)
            return cls(model, name=str(path))
        if place.is_file():
            return cls(load_checkpointed(place)[0], dtype=wanted, device=device, name=str(path))
        if not (place / "config.json").is_file():
            raise UserError(
                f"teacher: expected a folder with config.json, or a checkpoint (….pt) of a run, found nothing of the "
                f"kind at '{path}'. Train one first (see docs/distillation.md), or name another."
            )
        config = ModelConfig(name_or_path=str(path), trust_remote_code=trust_remote_code)
        precision = "fp32" if wanted == torch.float32 else "amp_bf16"
        return cls(build_causal_lm(config, 0, precision=precision), dtype=wanted, device=device, name=str(path))

    def train(self, mode: bool = True) -> TeacherWrapper:
        """Stay in evaluation mode: a teacher does not drop out when the student is put into training."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def head_inputs(self, batch: Mapping[str, Any], layers: bool = False) -> HeadInputs:
        """Hidden states of a batch on the teacher's device, see :meth:`CausalLM.head_inputs`."""
        with _own_precision(self.dtype, batch["input_ids"].device):
            return self.model.head_inputs(batch, layers)

    def forward(self, batch: Mapping[str, Any]) -> HiddenTargets:
        """What it says about a batch, without gradient."""
        inputs = self.head_inputs(batch)
        return HiddenTargets(inputs.hidden, head_of(inputs))

    @property
    def vocabulary(self) -> int:
        """Tokens it gives logits for."""
        return int(self.model.model.config.vocab_size)

    def fingerprint(self) -> str:
        """SHA-256 over its weights."""
        return model_fingerprint(self.model.model)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Refuse a student that gives logits for another number of tokens.

        Raises:
            UserError: it does.
        """
        if self.vocabulary != vocabulary:
            raise UserError(
                f"teacher {self.name}: expected the student's vocabulary of {vocabulary}, found {self.vocabulary}. Use "
                "a teacher of the same tokenizer (model.vocab_size makes room for its padding)."
            )

    def check_context(self, seq_len: int) -> None:
        """Refuse rows that are longer than the teacher takes.

        Raises:
            UserError: they are.
        """
        limit = self.model.max_positions
        if limit is not None and limit < seq_len:
            raise UserError(
                f"teacher {self.name}: expected rows of up to {seq_len} tokens, as data.seq_len, found a context of "
                f"{limit}. Use shorter rows or another teacher."
            )

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread its weights over the ranks as the student's are (FSDP2), a group a decoder block. Call :meth:`reshard`
        after each use.

        Args:
            mesh: of the student's parameters; with a tensor parallel dimension all that the student has.

        Raises:
            UserError: tensor parallelism does not suit the teacher.
        """
        if TENSOR in (mesh.mesh_dim_names or ()):
            try:
                apply_tensor_parallel(self.model.model, mesh[TENSOR])
            except UserError as error:
                raise UserError(f"teacher {self.name}: {error} Or use teacher.placement=replicated.") from error
            self.model.vocabulary_group = mesh[TENSOR].get_group()
            mesh = mesh[SHARD]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model.model, mesh=mesh)
        self._sharded = True

    def reshard(self) -> None:
        """Let go of what is whole for the pass that was: embedding, last norm and head stay so otherwise."""
        if self._sharded:
            cast(Any, self.model.model).reshard()

    def offload(self, device: torch.device) -> None:
        """Keep its weights in main memory; each part goes to ``device`` for as long as it computes."""
        self.model.to("cpu")
        layers = self.model.blocks
        inside = {id(module) for layer in layers for module in layer.modules()}
        rest = [module for module in self.model.modules() if id(module) not in inside and _own_tensors(module)]
        for part in layers:
            _fetch_for_forward(part, device)
        for module in rest:  # embedding, norm and head, which the loss needs after the pass
            for tensor in _own_tensors(module):
                tensor.data = tensor.data.to(device)


def head_of(inputs: HeadInputs) -> OutputHead:
    """The head that a model's inputs to it come with."""
    return OutputHead(inputs.weight, inputs.bias, inputs.logit_scale, inputs.soft_cap)


def check_head(model: CausalLM, what: str) -> None:
    """Refuse a model whose logits are not those of an output head on its last hidden states.

    Raises:
        UserError: they differ by more than rounding.
    """
    if next(model.parameters()).device.type == "meta":
        return
    try:
        error = head_mismatch(model)
    except (IndexError, KeyError, RuntimeError, AttributeError) as failure:
        raise UserError(f"{what}: its hidden states cannot be had ({failure}). Use another architecture.") from failure
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not error < (0.05 if half else 1e-3):
        raise UserError(
            f"{what}: expected logits that are a linear head's of the last hidden states, found ones that differ by "
            f"{error:.1e} of their size ({type(model.model).__name__}). Use another architecture."
        )


def _load_quantized(
    path: Path, bits: Quantization, dtype: torch.dtype, device: torch.device | None, trust_remote_code: bool
) -> PreTrainedModel:
    """A Hugging Face folder with weights of few bits."""
    key = f"teacher.quantization={bits}"
    if not torch.cuda.is_available():
        raise UserError(f"{key}: expected a CUDA device, found none. Set it to null.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}: expected the package bitsandbytes, found none. Install it, or set it to null.")
    if not path.is_dir():
        raise UserError(f"{key}: expected a Hugging Face folder, found '{path}'. Only those can be quantized.")
    options = {"load_in_8bit": True} if bits == "8bit" else {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=BitsAndBytesConfig(**options),
        torch_dtype=dtype,
        device_map={"": device or torch.device("cuda", torch.cuda.current_device())},
        attn_implementation=attention_for("auto", "amp_bf16"),
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    return cast(PreTrainedModel, model)


@contextmanager
def _own_precision(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Autocast as the student has it for models of float32, none for those that have a precision of their own."""
    if dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _fetch_for_forward(module: nn.Module, device: torch.device) -> None:
    """Copy the tensors of a module to ``device`` before its forward, and forget the copies after it."""
    tensors = [*module.parameters(), *module.buffers()]
    masters = [tensor.data.pin_memory() if device.type == "cuda" else tensor.data for tensor in tensors]

    def fetch(*_: Any) -> None:
        for tensor, master in zip(tensors, masters, strict=True):
            tensor.data = master.to(device, non_blocking=True, copy=True)

    def forget(*_: Any) -> None:
        for tensor, master in zip(tensors, masters, strict=True):
            tensor.data = master

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(forget)
