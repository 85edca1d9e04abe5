"""Checkpoints from one format into another: a file of a run, a folder of shards, a Hugging Face model folder.

    convert(source, target, to, config=None, tokenizer=None) -> what was written, in a line

Between a file (``composer``) and a folder of shards (``dcp``, torch.distributed.checkpoint) everything is kept, so that
the run goes on from either. A Hugging Face folder (``hf``) has weights and tokenizer alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoTokenizer

from cheapertraining.config import ModelConfig, RunConfig, load_run_config
from cheapertraining.distributed.checkpoints import REST, UNFINISHED, checkpoint_kind, flush, read_rest
from cheapertraining.errors import UserError
from cheapertraining.models.causal_lm import CausalLM, build_causal_lm

__all__ = ["FORMATS", "Format", "convert", "format_of"]

Format = Literal["composer", "dcp", "hf"]
FORMATS: tuple[Format, ...] = ("composer", "dcp", "hf")
State = dict[str, Any]


def format_of(path: Path) -> Format:
    """Which format ``path`` is in, by what is in it.

    Raises:
        UserError: none of them, or not whole: shards missing or cut short, a folder that was not written to its end.
    """
    if path.name.startswith(UNFINISHED):
        raise UserError(f"{path}: was not written to its end. Use one without '{UNFINISHED}' before its name.")
    if not (path / "config.json").is_file():
        if path.is_dir() and any(path.glob("*.safetensors")):
            raise UserError(f"{path}: a Hugging Face folder without config.json. Copy all of its files.")
        return "composer" if checkpoint_kind(path) == "full" else "dcp"
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"] if not any(path.glob("pytorch_model*.bin")) else []
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path / name}: a part of this model; expected a file, found none. Copy all of its files.")
    return "hf"


def convert(
    source: Path, target: Path, to: Format, *, config: Path | None = None, tokenizer: Path | None = None
) -> str:
    """Write ``source`` as ``target``, whole or not at all.

    Args:
        source: a checkpoint of any format; a file of a run is a pickle: give none that came from elsewhere.
        target: a file for ``composer``, a folder for the others; must not exist.
        to: the format to write.
        config: config.yaml of the run that ``source`` is of, for ``hf``; None is where runs put it, two folders up.
        tokenizer: folder to take into a Hugging Face folder; None is the run's.

    Returns:
        What was done, in a line.

    Raises:
        UserError: what :func:`format_of` refuses; ``target`` exists; the config is of another architecture.
    """
    found = format_of(source)
    if target.exists():
        raise UserError(f"{target}: expected a new name, found something there. Remove it, or use another name.")
    if found == to:
        raise UserError(f"{source}: is in the format '{to}' already. Copy it, or choose one of {', '.join(FORMATS)}.")
    state, rng = _read(source, found)
    unfinished = target.with_name(UNFINISHED + target.name)
    _remove(unfinished)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if to == "hf":
            _write_hf(state["model"], source, unfinished, config, tokenizer)
        elif to == "composer":
            with unfinished.open("wb") as file:  # given a name, torch refuses one without an ending
                torch.save({"state": state, "rng": rng}, file)
        else:
            _write_shards(state, rng, unfinished)
        for part in [*unfinished.iterdir(), unfinished] if unfinished.is_dir() else [unfinished]:
            flush(part)
        os.replace(unfinished, target)
        flush(target.parent)
    except BaseException:
        _remove(unfinished)
        raise
    kept = "everything" if "timestamp" in state and to != "hf" else "weights"
    return f"{target}: {kept} of {source} ({found} -> {to})"


# ---- reading -----------------------------------------------------------------------------------------------
def _read(source: Path, found: Format) -> tuple[State, list[State]]:
    """The state of a run, with ``model`` and perhaps ``optimizers``, and random generators by rank."""
    if found == "hf":
        model = build_causal_lm(ModelConfig(name_or_path=str(source)), 1)
        return {"model": model.state_dict()}, []
    if found == "dcp":
        return _read_shards(source)
    try:
        content = torch.load(source, map_location="cpu", weights_only=False, mmap=True)
        return dict(content["state"]), content.get("rng", [])
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(f"{source}: not a readable checkpoint ({str(error).splitlines()[0]}). Use another.") from error


def _read_shards(folder: Path) -> tuple[State, list[State]]:
    metadata = FileSystemReader(folder).read_metadata()
    flat: State = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.state_dict_metadata.items()
    }
    load(flat, checkpoint_id=folder, no_dist=True)
    nested: State = {}
    for name, value in flat.items():
        *outer, last = metadata.planner_data[name]
        place = nested
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    nested = _listed(nested)
    rest = read_rest(folder)
    state = dict(rest["state"]) | {"model": nested["model"]}
    if "optimizer" in nested:
        # Composer files it under the class; a run's optimizer has moments unless it is a plain one.
        moments = any("exp_avg" in entry for entry in nested["optimizer"].get("state", {}).values())
        state["optimizers"] = {"AdamW" if moments else "SGD": nested["optimizer"]}
    return state, rest["rng"]


def _listed(node: Any) -> Any:
    """DCP has entries of lists under their numbers, as it has those of mappings under their keys."""
    if not isinstance(node, dict):
        return node
    values = {key: _listed(value) for key, value in node.items()}
    numbered = bool(values) and all(isinstance(key, int) for key in values)
    return [values[key] for key in sorted(values)] if numbered else values


# ---- writing -----------------------------------------------------------------------------------------------
def _write_shards(state: State, rng: list[State], folder: Path) -> None:
    tensors: State = {"model": state["model"]}
    if "optimizers" in state:
        tensors["optimizer"] = next(iter(state["optimizers"].values()))
    folder.mkdir()
    rest = {name: value for name, value in state.items() if name not in ("model", "optimizers")}
    torch.save({"state": rest, "rng": rng}, folder / REST)
    save(tensors, storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)


def _write_hf(
    weights: Mapping[str, torch.Tensor], source: Path, folder: Path, config: Path | None, tokenizer: Path | None
) -> None:
    settings = config or source.resolve().parent.parent / "config.yaml"
    if not settings.is_file():
        raise UserError(f"{settings}: expected the config.yaml of the run, found none. Name it with --config.")
    run = load_run_config(settings)
    model = _whole(weights, run, source, settings).model
    model.config.use_cache = True  # switched off for training; who generates wants it
    model.save_pretrained(folder, safe_serialization=True)
    words = str(tokenizer or run.tokenizer.path or run.data.tokenizer or Path(run.data.local) / "tokenizer")
    try:
        AutoTokenizer.from_pretrained(words, local_files_only=True).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{words}: no tokenizer can be read there ({str(error).splitlines()[0]}). Name its folder with --tokenizer."
        ) from error


def _whole(weights: Mapping[str, torch.Tensor], run: RunConfig, source: Path, settings: Path) -> CausalLM:
    """The model that the config describes, with these weights."""
    config, embedding = run.model, weights.get("model.model.embed_tokens.weight")
    if config.vocab_size is None and config.name_or_path is None and embedding is not None:
        config = replace(config, vocab_size=len(embedding))  # the tokenizer's, which may be elsewhere now
    model = build_causal_lm(config, config.vocab_size or 1)
    own = model.state_dict()
    for name in [*own, *weights]:
        wanted, found = (list(each[name].shape) if name in each else "none" for each in (own, weights))
        if wanted != found:
            raise UserError(
                f"{source}: a checkpoint of another architecture than {settings} says. '{name}': expected {wanted}, "
                f"found {found}. Name the config.yaml of its own run with --config."
            )
    model.load_state_dict(dict(weights))
    return model


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
