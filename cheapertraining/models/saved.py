"""Models of runs that were: from a checkpoint and the config.yaml of its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cheapertraining.config import load_run_config
from cheapertraining.errors import UserError
from cheapertraining.models.causal_lm import CausalLM, build_causal_lm

__all__ = ["load_checkpointed"]


def load_checkpointed(path: Path) -> tuple[CausalLM, dict[str, Any]]:
    """The model of a run at a checkpoint, float32 on the CPU, and the state that was saved.

    A checkpoint is a pickle: give none that came from elsewhere.

    Args:
        path: a file ``<run>/checkpoints/….pt``; the run's config.yaml lies two folders up.

    Raises:
        UserError: no config.yaml, an unreadable file, or one of another model than the config says.
    """
    place = path.resolve()
    settings = place.parent.parent / "config.yaml"
    if not settings.is_file():
        raise UserError(f"{path}: expected the run's config.yaml at {settings}, found none. Copy it there.")
    try:
        state: dict[str, Any] = torch.load(place, map_location="cpu", weights_only=False, mmap=True)["state"]
        saved: dict[str, torch.Tensor] = state["model"]
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(f"{path}: not a readable checkpoint of a run ({error or type(error).__name__}).") from error
    config = load_run_config(settings).model
    embedding = saved.get("model.model.embed_tokens.weight")
    if config.vocab_size is None and config.name_or_path is None and embedding is not None:
        config = replace(config, vocab_size=len(embedding))  # the tokenizer's, which may be elsewhere now
    wrapped = build_causal_lm(config, config.vocab_size or 1)
    own = wrapped.state_dict()
    for name in [*own, *saved]:
        found, wanted = (list(tensors[name].shape) if name in tensors else None for tensors in (saved, own))
        if found != wanted:
            raise UserError(
                f"{path}: a checkpoint of another model: '{name}': expected {wanted or 'none'} by {settings}, "
                f"found {found or 'none'}. Put the config.yaml of its run there."
            )
    wrapped.load_state_dict(saved)
    return wrapped, state
