"""Checkpoints from one format into another: equal logits in transformers, everything kept, runs go on, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cheapertraining.data import TokenizerWrapper
from cheapertraining.errors import UserError
from cheapertraining.models.conversion import convert, format_of
from cheapertraining.models.saved import load_checkpointed
from tools.bench._layouts import config_of, losses_of, resume_from, run_once, tiny_yaml
from tools.convert_checkpoint import main

STEPS = 2


@pytest.fixture(scope="module")
def path(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The yaml of a run that is over: ``original``, of four batches, saved after two."""
    path = tiny_yaml(tmp_path_factory.mktemp("conversion") / "run.yaml", tiny_sample / "data.yaml")
    run_once(config_of(path, "single", "run_name=original", "max_duration=4ba", f"save_interval={STEPS}ba"))
    return path


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Path:
    return path.parent / "runs" / "original" / "checkpoints" / f"ep0-ba{STEPS}-rank0.pt"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, path: Path) -> Path:
    folder = path.parent / "exported"
    assert main([str(checkpoint), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def shards(checkpoint: Path, path: Path) -> Path:
    folder = path.parent / f"ep0-ba{STEPS}"
    assert main([str(checkpoint), str(folder), "--to", "dcp"]) == 0
    return folder


def content(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, weights_only=False)
    return found


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """The same values in the same structure, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}.{number}")
    elif type(one).__module__ == "numpy":
        assert (one == other).all(), place
    else:
        assert one == other, place


def test_transformers_gives_the_same_logits(exported: Path, checkpoint: Path, tiny_sample: Path) -> None:
    ours, _ = load_checkpointed(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        expected = ours({"input_ids": ids, "position_ids": torch.arange(24)[None]})["logits"]
        assert torch.equal(theirs(input_ids=ids).logits, expected)
    assert theirs.config.use_cache
    words = "def main(arguments):"
    ours_ids = TokenizerWrapper(tiny_sample / "tokenizer").encode(words)
    assert AutoTokenizer.from_pretrained(exported)(words, add_special_tokens=False).input_ids == ours_ids


def test_a_run_begins_with_the_exported_weights(exported: Path, path: Path, checkpoint: Path) -> None:
    given = (f"model.name_or_path={exported}", f"tokenizer.path={exported}", "max_duration=1ba")
    run_once(config_of(path, "single", "run_name=onwards", *given))
    ours, _ = load_checkpointed(checkpoint)
    theirs, _ = load_checkpointed(path.parent / "runs" / "onwards" / "checkpoints" / "ep0-ba1-rank0.pt")
    moved = [float((a - b).abs().max()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert 0 < max(moved) < 0.01  # one step of AdamW at 0.003 from there


def test_there_and_back_nothing_is_lost(shards: Path, checkpoint: Path, path: Path) -> None:
    back = path.parent / "back.pt"
    assert main([str(shards), str(back), "--to", "composer"]) == 0
    assert_same(content(back), content(checkpoint))


def test_a_run_goes_on_from_converted_shards(shards: Path, path: Path) -> None:
    resume_from(path, "from-shards", shards)
    again = ("autoresume=true", "run_name=from-shards", "max_duration=4ba")
    run_once(config_of(path, "single", *again))
    runs = path.parent / "runs"
    assert losses_of(runs / "from-shards") == losses_of(runs / "original")[STEPS:]


@pytest.mark.parametrize("to", ["composer", "dcp"])
def test_weights_come_back_from_hugging_face(to: str, exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    assert main([str(exported), str(target), "--to", to]) == 0
    if to == "dcp":
        convert(target, tmp_path / "weights.pt", "composer")
        target = tmp_path / "weights.pt"
    assert_same(content(target)["state"]["model"], content(checkpoint)["state"]["model"])


def test_weights_alone_are_no_run_to_go_on_with(exported: Path, path: Path) -> None:
    weights = path.parent / "ep0-ba1-rank0.pt"
    convert(exported, weights, "composer")
    resume_from(path, "weights", weights)
    with pytest.raises(UserError, match="holds weights alone"):
        run_once(config_of(path, "single", "autoresume=true", "run_name=weights", "max_duration=2ba"))


def test_what_is_not_whole_is_refused(shards: Path, exported: Path, tmp_path: Path) -> None:
    short = shutil.copytree(shards, tmp_path / "short")
    next(short.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"distcp: a shard of this checkpoint; expected at least \d+ bytes, found none"):
        convert(short, tmp_path / "out", "hf")
    half = shutil.copytree(shards, tmp_path / ".unfinished-ep0-ba2")
    with pytest.raises(UserError, match="not written to its end"):
        format_of(half)
    torn = shutil.copytree(exported, tmp_path / "torn")
    (torn / "model.safetensors").unlink()
    with pytest.raises(UserError, match="a part of this model"):
        format_of(torn)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (torn / "model.safetensors.index.json").write_text(json.dumps(index))
    (torn / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: a part of this model"):
        format_of(torn)
    (torn / "config.json").unlink()
    with pytest.raises(UserError, match=r"without config\.json"):
        format_of(torn)


def test_another_architecture_is_refused_and_leaves_nothing(checkpoint: Path, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "config.yaml"
    text = (checkpoint.parent.parent / "config.yaml").read_text()
    assert "num_layers: 2" in text
    other.write_text(text.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(UserError, match=r"another architecture .*layers\.2.*: expected .*, found none"):
        convert(checkpoint, tmp_path / "out", "hf", config=other)
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]


def test_outputs_are_new(checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), str(exported)]) == 2
    assert "expected a new name" in capsys.readouterr().err
    with pytest.raises(UserError, match="is in the format 'composer' already"):
        convert(checkpoint, tmp_path / "same.pt", "composer")
