"""Folders of shards in one process: whole or not at all, snapshots, and what is refused before anything is loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cheapertraining.distributed.checkpoints import (
    ShardedWriter,
    checkpoint_kind,
    load_sharded,
    read_rest,
    saved_shapes,
)
from cheapertraining.errors import UserError


def make(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, background: bool = False, rest: dict[str, Any] | None = None) -> list[Path]:
    """The folders that were published."""
    published: list[Path] = []
    writer = ShardedWriter(background)
    writer.save(folder, *make(), {"state": {}, "rng": []} if rest is None else rest, published.append)
    writer.wait()
    writer.close()
    return published


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "ep0-ba1"
    save(folder)
    return folder


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_comes_back(background: bool, tmp_path: Path) -> None:
    rest = {"state": {"seen": 3, "names": ("a", "b")}, "rng": [{"torch": torch.get_rng_state()}]}
    assert save(tmp_path / "ep0-ba1", background, rest) == [tmp_path / "ep0-ba1"]
    expected, expected_optimizer = make()
    model, optimizer = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer.param_groups[0]["lr"] = 7.0
    load_sharded(tmp_path / "ep0-ba1", model, optimizer)
    for parameter, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, wanted)
        for key, moment in expected_optimizer.state[wanted].items():
            assert torch.equal(optimizer.state[parameter][key], moment)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert read_rest(tmp_path / "ep0-ba1")["state"] == rest["state"]
    assert saved_shapes(tmp_path / "ep0-ba1")["0.weight"] == [4, 3]
    assert not list(tmp_path.glob(".unfinished-*"))


def test_training_goes_on_while_its_state_of_before_is_written(tmp_path: Path) -> None:
    model, optimizer = make()
    expected = model[0].weight.detach().clone()
    writer = ShardedWriter(background=True)
    writer.save(tmp_path / "ep0-ba1", model, optimizer, {"state": {}, "rng": []}, lambda folder: None)
    with torch.no_grad():
        model[0].weight.fill_(9.0)
    writer.wait()
    load_sharded(tmp_path / "ep0-ba1", model, optimizer)
    assert torch.equal(model[0].weight, expected)
    writer.close()


def test_a_folder_is_replaced_as_a_whole(saved: Path) -> None:
    (saved / "stray").write_text("of the checkpoint before")
    assert save(saved) == [saved]
    assert not (saved / "stray").exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_publishes_nothing(background: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: every write to a shard fails."""

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".distcp"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardedWriter(background)
    published: list[Path] = []

    def attempt() -> None:
        writer.save(saved.with_name("ep0-ba2"), *make(), {"state": {}, "rng": []}, published.append)
        writer.wait()

    with pytest.raises(BaseException, match="No space left"):  # DCP's own kind of exception, of all ranks
        attempt()
    writer.close()
    assert published == []
    assert not saved.with_name("ep0-ba2").exists()
    assert checkpoint_kind(saved) == "sharded"


def test_formats_are_told_apart(saved: Path, tmp_path: Path) -> None:
    torch.save({"state": {}}, tmp_path / "one.pt")
    assert checkpoint_kind(saved) == "sharded"
    assert checkpoint_kind(tmp_path / "one.pt") == "full"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "found nothing"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp: a shard.*found none"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"short"), r"__0_0\.distcp: a shard.*found 5 bytes"),
        (lambda folder: (folder / ".metadata").unlink(), "found no .metadata"),
        (lambda folder: (folder / ".metadata").write_bytes(b"?"), r"\.metadata: not readable"),
        (lambda folder: (folder / "state.pt").unlink(), "found no state.pt"),
        (lambda folder: (folder / "config.json").write_text("{}"), "Hugging Face.*model.name_or_path="),
    ],
)
def test_a_spoilt_folder_is_refused_by_name(spoil: Any, message: str, saved: Path) -> None:
    spoil(saved)
    with pytest.raises(UserError, match=message):
        checkpoint_kind(saved)


def test_what_a_killed_save_left_is_refused(saved: Path) -> None:
    left = saved.rename(saved.with_name(".unfinished-ep0-ba1"))
    with pytest.raises(UserError, match="not written to its end"):
        checkpoint_kind(left)


def test_after_kills_in_the_middle_of_saves_the_last_whole_checkpoint_loads(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_saves.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "saves"), "10"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills = re.match(r"10 kills, (\d+) in the middle of a save", done.stdout)
    assert kills is not None
    assert int(kills[1]) > 0


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match=r"model\.safetensors: expected a checkpoint that torch\.save wrote"):
        checkpoint_kind(tmp_path / "model.safetensors")


def test_the_state_of_another_kind_of_optimizer_is_refused(saved: Path) -> None:
    model, _ = make()
    model.zero_grad()
    adagrad = torch.optim.Adagrad(model.parameters())
    with pytest.raises(UserError, match=r"saved with another optimizer; optimizer\.state\..*\.sum is not in it"):
        load_sharded(saved, model, adagrad)


def test_code_in_the_state_is_not_run(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return __import__("os").system, ("true",)

    torch.save({"state": Evil(), "rng": []}, saved / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt: not readable"):
        read_rest(saved)
