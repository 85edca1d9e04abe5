"""Whole runs of the trainer on a tiny model and real shards: what they leave behind, how they resume, how they fail."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.config import load_run_config
from cheapertraining.errors import UserError
from cheapertraining.training import train
from tests import processes

TRAIN = Path(__file__).parents[2] / "train.py"
MIXING = "algorithms.online_mixing={interval: 3ba, warmup: 2ba, influence: {learning_rate: 100, threshold: 0}}"
KEEP_ALL = ("save_interval=2ba", "save_num_checkpoints_to_keep=-1")


def run(run_yaml: Path, *overrides: str) -> Any:
    return train(load_run_config(run_yaml, overrides))


def folder_of(run_yaml: Path, name: str = "tiny") -> Path:
    return run_yaml.parent / "runs" / name


def checkpoints(run_yaml: Path, name: str = "tiny") -> list[str]:
    files = (folder_of(run_yaml, name) / "checkpoints").iterdir()
    return sorted((file.name for file in files), key=lambda text: (len(text), text))


def latest(run_yaml: Path, name: str = "tiny") -> str:
    return os.readlink(folder_of(run_yaml, name) / "checkpoints" / "latest-rank0.pt")


def metrics(run_yaml: Path, name: str = "tiny") -> dict[int, dict[str, Any]]:
    lines = (folder_of(run_yaml, name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def losses(run_yaml: Path, name: str = "tiny") -> dict[int, float]:
    return {step: line["loss/train/total"] for step, line in metrics(run_yaml, name).items() if step}


def weights(run_yaml: Path, name: str = "tiny") -> dict[str, torch.Tensor]:
    path = folder_of(run_yaml, name) / "checkpoints" / "latest-rank0.pt"
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["state"]["model"]
    return model


def assert_same_weights(run_yaml: Path, one: str, other: str) -> None:
    first, second = weights(run_yaml, one), weights(run_yaml, other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def set_back(run_yaml: Path, name: str, batch: int) -> None:
    """Make a finished run look as if it had been killed right after the checkpoint at ``batch``."""
    folder = folder_of(run_yaml, name) / "checkpoints"
    for file in folder.glob("ep*"):
        if int(file.name.split("-ba")[1].split("-")[0]) > batch:
            file.unlink()
    (folder / "latest-rank0.pt").unlink()
    (folder / "latest-rank0.pt").symlink_to(f"ep0-ba{batch}-rank0.pt")


# ---- what a run leaves behind ------------------------------------------------------------------------------
def test_run_from_start_to_end(tiny_run: Path) -> None:
    trainer = run(tiny_run)
    assert trainer.state.timestamp.batch == 8
    assert checkpoints(tiny_run) == ["latest-rank0.pt", "ep0-ba4-rank0.pt", "ep0-ba8-rank0.pt"]
    assert latest(tiny_run) == "ep0-ba8-rank0.pt"
    seen = metrics(tiny_run)
    assert list(seen) == list(range(9))
    evaluated = [step for step, line in seen.items() if "metrics/heldout/docs/TokenCrossEntropy" in line]
    assert evaluated == [0, 4, 8]  # before the first step, at the interval, at the end
    for name in ("heldout/code", "heldout/docs", "heldout/topics", "probe/code"):
        key = f"metrics/{name}/TokenCrossEntropy"
        assert seen[8][key] < seen[0][key] - 0.1  # it learns
    assert load_run_config(folder_of(tiny_run) / "config.yaml") == load_run_config(tiny_run)
    assert trainer.state.optimizers[0].param_groups[0]["lr"] < 1e-2  # the schedule came to its end


def test_wandb_runs_offline_and_monitors_log(tiny_run: Path) -> None:
    run(
        tiny_run, "max_duration=2ba", "loggers.wandb={project: tiny}",
        "callbacks={speed_monitor: {window_size: 1}, lr_monitor: {}, memory_monitor: {}}",
    )  # fmt: skip
    assert list((folder_of(tiny_run) / "wandb").glob("offline-run-*/*.wandb"))
    names = set().union(*metrics(tiny_run).values())
    assert "lr-AdamW/group0" in names
    assert any(name.startswith("throughput/") for name in names)


def test_run_name_is_made_up_and_free(tiny_run: Path) -> None:
    for _ in range(2):
        run(tiny_run, "run_name=null", "max_duration=1ba", "eval_loader.first=false")
    assert len(list(folder_of(tiny_run).parent.iterdir())) == 2


def test_microbatches_do_not_change_the_gradient(tiny_run: Path) -> None:
    """Rows differ in how many tokens count; weighting microbatches by rows would change the losses from step 2 on."""
    run(tiny_run, "run_name=whole")
    run(tiny_run, "run_name=parts", "train_loader.device_microbatch_size=5")
    whole, parts = losses(tiny_run, "whole"), losses(tiny_run, "parts")
    assert [parts[step] for step in parts] == pytest.approx([whole[step] for step in whole], abs=2e-6)


@pytest.mark.parametrize("duration", ["2304tok", "72sp"])
def test_duration_in_other_units(tiny_run: Path, duration: str) -> None:
    state = run(tiny_run, f"max_duration={duration}", "scheduler.warmup=0.2dur").state
    assert 6 <= state.timestamp.batch <= 7  # 12 rows of 32 tokens, the odd one of them padding


def test_run_ends_when_the_data_does(tiny_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = (
        "max_duration=500ba", "data.on_exhaustion=stop", "data.sources.code.weight=0",
        "data.sources.topics.weight=0", "eval_loader.interval=100ba", "save_interval=100ba", "autoresume=true",
    )  # fmt: skip
    docs = Path(load_run_config(tiny_run).data.local) / "docs" / "train" / "meta.json"
    batches = json.loads(docs.read_text())["samples"] // 12
    for _ in range(2):  # resuming finds that there is nothing more
        trainer = run(tiny_run, *settings)
        assert trainer.state.timestamp.batch == batches
        assert f"The data ended after {batches} batches" in capfd.readouterr().out
        assert latest(tiny_run) == f"ep0-ba{batches}-rank0.pt"
        assert max(metrics(tiny_run)) == batches


def test_online_mixing_changes_the_mixture(tiny_run: Path) -> None:
    run(tiny_run, "max_duration=12ba", MIXING)
    weights_of_code = {step: line.get("mixture/weight/code") for step, line in metrics(tiny_run).items()}
    assert weights_of_code[2] is not None
    assert weights_of_code[12] != pytest.approx(1 / 3, abs=1e-3)
    decisions = (folder_of(tiny_run) / "mixture.jsonl").read_text().splitlines()
    assert [json.loads(line)["batch"] for line in decisions] == [2, 5, 8, 11]


@pytest.mark.parametrize("strategy", ["static", "proportional", "unimax", "schedule"])
def test_strategies_without_measurements(tiny_run: Path, strategy: str) -> None:
    points = "[{batch: 0, weights: {code: 1, docs: 1, topics: 1}}, {batch: 8, weights: {code: 1, docs: 0, topics: 0}}]"
    run(
        tiny_run, f"algorithms.online_mixing={{strategy: {strategy}, interval: 2ba}}",
        f"algorithms.online_mixing.schedule.points={points}",
    )  # fmt: skip
    assert latest(tiny_run) == "ep0-ba8-rank0.pt"


# ---- resuming ----------------------------------------------------------------------------------------------
def test_resumed_run_equals_the_undisturbed_one(tiny_run: Path) -> None:
    run(tiny_run, "run_name=undisturbed", *KEEP_ALL)
    run(tiny_run, "run_name=resumed", *KEEP_ALL)
    set_back(tiny_run, "resumed", batch=2)
    run(tiny_run, "run_name=resumed", "autoresume=true", *KEEP_ALL)
    assert losses(tiny_run, "resumed") == losses(tiny_run, "undisturbed")
    assert_same_weights(tiny_run, "resumed", "undisturbed")
    assert checkpoints(tiny_run, "resumed") == checkpoints(tiny_run, "undisturbed")


@pytest.mark.parametrize("batch", [2, 6])
def test_resumed_run_with_mixing_equals_the_undisturbed_one(tiny_run: Path, batch: int) -> None:
    run(tiny_run, "run_name=undisturbed", MIXING, *KEEP_ALL)
    run(tiny_run, "run_name=resumed", MIXING, *KEEP_ALL)
    set_back(tiny_run, "resumed", batch)
    run(tiny_run, "run_name=resumed", "autoresume=true", MIXING, *KEEP_ALL)
    for key in ("loss/train/total", "mixture/weight/code", "mixture/score/code/docs"):
        courses = [
            {step: line.get(key) for step, line in metrics(tiny_run, name).items()}
            for name in ("resumed", "undisturbed")
        ]
        assert courses[0] == courses[1]
    assert_same_weights(tiny_run, "resumed", "undisturbed")
    notes = [(folder_of(tiny_run, name) / "mixture.jsonl").read_text() for name in ("resumed", "undisturbed")]
    assert notes[0] == notes[1]


def test_random_state_goes_on_after_a_resume(tiny_run: Path, tmp_path: Path, tiny_sample: Path) -> None:
    """A model with dropout draws random numbers at every step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, attention_dropout=0.3,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "dropout")
    settings = (f"model.name_or_path={tmp_path}/dropout", *KEEP_ALL)
    run(tiny_run, "run_name=undisturbed", *settings)
    run(tiny_run, "run_name=resumed", *settings)
    set_back(tiny_run, "resumed", batch=4)
    run(tiny_run, "run_name=resumed", "autoresume=true", *settings)
    assert losses(tiny_run, "resumed") == losses(tiny_run, "undisturbed")


def test_finished_run_has_nothing_to_do(tiny_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tiny_run)
    before = weights(tiny_run)
    run(tiny_run, "autoresume=true")
    assert "Run tiny is finished (8 batches)" in capfd.readouterr().out
    assert all(torch.equal(before[name], value) for name, value in weights(tiny_run).items())


def test_retention_counts_checkpoints_of_earlier_starts(tiny_run: Path) -> None:
    run(tiny_run, "save_interval=2ba")
    assert checkpoints(tiny_run) == ["latest-rank0.pt", "ep0-ba6-rank0.pt", "ep0-ba8-rank0.pt"]
    run(tiny_run, "save_interval=2ba", "autoresume=true", "max_duration=10ba")
    assert checkpoints(tiny_run) == ["latest-rank0.pt", "ep0-ba8-rank0.pt", "ep0-ba10-rank0.pt"]


def test_existing_run_is_not_touched_unless_told(tiny_run: Path) -> None:
    run(tiny_run)
    before = {file.name: file.read_bytes() for file in (folder_of(tiny_run) / "checkpoints").iterdir()}
    with pytest.raises(UserError, match=r"already has checkpoints \(latest: ep0-ba8-rank0.pt\). Use autoresume=true"):
        run(tiny_run)
    assert before == {file.name: file.read_bytes() for file in (folder_of(tiny_run) / "checkpoints").iterdir()}
    run(tiny_run, "save_overwrite=true", "seed=4")
    assert (folder_of(tiny_run) / "checkpoints" / "latest-rank0.pt").read_bytes() != before["latest-rank0.pt"]


OF_ANOTHER_RUN = {
    "model.hidden_size=32": r"a checkpoint of another model. Parameter '.*' is \[512, 16\] in it and \[512, 32\]",
    "model.num_layers=2": r"Parameter '.*layers.1.*' is absent in it and \[16, 16\] in this run. Resume with",
    "algorithms.online_mixing={strategy: static}": "online_mixing was off when it was saved and is on now",
    "seed=4": "seed was 3 when the checkpoint was saved and is 4 now",
    "train_loader.global_batch_size=6": "global_batch_size was 12 when the checkpoint was saved and is 6 now",
}


def test_checkpoint_of_another_run_is_refused(tiny_run: Path) -> None:
    run(tiny_run, "max_duration=2ba")
    data = load_run_config(tiny_run).data
    part = tiny_run.parent / "two.yaml"
    part.write_text(f"data: {{local: {data.local}, seq_len: 32, sources: {{code: {{}}, topics: {{}}}}}}\n")
    other_sources = {f"compose.data={part}": "has the sources code, docs, topics; the run has code, topics"}
    saved_config = (folder_of(tiny_run) / "config.yaml").read_text()
    for override, expected in (OF_ANOTHER_RUN | other_sources).items():
        with pytest.raises(UserError, match=expected) as caught:
            run(tiny_run, "autoresume=true", "max_duration=4ba", override)
        assert str(caught.value).startswith(str(folder_of(tiny_run) / "checkpoints" / "ep0-ba2-rank0.pt"))
        assert "\n" not in str(caught.value)
        assert (folder_of(tiny_run) / "config.yaml").read_text() == saved_config


def test_damaged_checkpoint_is_named(tiny_run: Path) -> None:
    run(tiny_run, "max_duration=2ba")
    path = folder_of(tiny_run) / "checkpoints" / "ep0-ba2-rank0.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"ep0-ba2-rank0.pt: not a readable checkpoint"):
        run(tiny_run, "max_duration=4ba", "autoresume=true")


# ---- writing fails, or the process dies ----------------------------------------------------------------------
@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write beyond ``size`` bytes of a file, as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_write_keeps_the_last_good_checkpoint(tiny_run: Path) -> None:
    run(tiny_run, "run_name=undisturbed", *KEEP_ALL)
    run(tiny_run, *KEEP_ALL)
    set_back(tiny_run, "tiny", batch=4)
    with largest_file(60_000), pytest.raises(UserError, match=r"ep0-ba6-rank0.pt: .* could not be written") as caught:
        run(tiny_run, "autoresume=true", *KEEP_ALL)
    kept = folder_of(tiny_run) / "checkpoints" / "ep0-ba4-rank0.pt"
    assert f"The last good checkpoint is {kept}; it was not touched." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoints(tiny_run) == ["latest-rank0.pt", "ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"]  # nothing half-written
    assert latest(tiny_run) == "ep0-ba4-rank0.pt"
    run(tiny_run, "autoresume=true", *KEEP_ALL)
    assert_same_weights(tiny_run, "tiny", "undisturbed")


def test_half_written_checkpoint_is_never_resumed_from(tiny_run: Path) -> None:
    run(tiny_run, "run_name=undisturbed", *KEEP_ALL)
    run(tiny_run, *KEEP_ALL)
    set_back(tiny_run, "tiny", batch=4)
    folder = folder_of(tiny_run) / "checkpoints"
    # Killed while it wrote batch 6; an earlier time it was killed between a checkpoint's rename and that of the link.
    (folder / ".unfinished-ep0-ba6-rank0.pt").write_bytes((folder / "ep0-ba4-rank0.pt").read_bytes()[:70_000])
    shutil.copy(folder / "ep0-ba4-rank0.pt", folder / "ep0-ba8-rank0.pt")
    (folder / ".unfinished-latest-rank0.pt").symlink_to("ep0-ba8-rank0.pt")
    run(tiny_run, "autoresume=true", *KEEP_ALL)
    assert not list(folder.glob(".unfinished*"))
    assert_same_weights(tiny_run, "tiny", "undisturbed")


def start(run_yaml: Path, *overrides: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(TRAIN), str(run_yaml), *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, text=True, stdout=pipe, stderr=pipe, cwd=run_yaml.parent, env=os.environ | environment
    )


def wait_for(path: Path, process: subprocess.Popen[str] | processes.Started) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_and_resume_ends_as_the_undisturbed_run(tiny_run: Path) -> None:
    settings = ("save_interval=1ba", "max_duration=40ba")
    run(tiny_run, "run_name=undisturbed", *settings)
    for batch in (3, 11):
        process = processes.start(TRAIN, str(tiny_run), "autoresume=true", *settings, folder=tiny_run.parent)
        wait_for(folder_of(tiny_run) / "checkpoints" / f"ep0-ba{batch}-rank0.pt", process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert int(latest(tiny_run).split("-ba")[1].split("-")[0]) >= batch - 1
    run(tiny_run, "autoresume=true", *settings)
    assert losses(tiny_run) == losses(tiny_run, "undisturbed")
    assert_same_weights(tiny_run, "tiny", "undisturbed")
    assert len(checkpoints(tiny_run)) == 3


@pytest.mark.slow
def test_two_processes_train_as_one_and_end_on_a_signal(tiny_run: Path) -> None:
    settings = ("max_duration=60ba", "save_interval=100ba", "eval_loader.interval=100ba")
    run(tiny_run, "run_name=one", *settings)
    composer = ("-m", "composer.cli.launcher", "-n", "2")
    process = start(tiny_run, "autoresume=true", *settings, launcher=composer)
    wait_for(folder_of(tiny_run) / "metrics.jsonl", process)
    process.terminate()  # the launcher; its processes save a checkpoint and leave
    process.communicate(timeout=120)
    folder = folder_of(tiny_run) / "checkpoints"
    until = time.monotonic() + 60
    while not (folder / "latest-rank0.pt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    rest = processes.start(TRAIN, str(tiny_run), "autoresume=true", *settings, folder=tiny_run.parent, ranks=2)
    output, errors = rest.communicate(timeout=200)
    assert rest.returncode == 0, output + errors
    one, two = losses(tiny_run, "one"), losses(tiny_run)
    assert two.keys() == one.keys()
    # Two halves add up to the whole but for rounding, which grows to a difference one can see after some 30 steps.
    assert [two[step] for step in range(1, 20)] == pytest.approx([one[step] for step in range(1, 20)], abs=3e-6)


# ---- the front door ----------------------------------------------------------------------------------------
def front_door(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str, str, float]:
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, str(TRAIN), *arguments],
        capture_output=True, text=True, cwd=cwd, env=os.environ | environment, check=False,
    )  # fmt: skip
    return process.returncode, process.stdout, process.stderr, time.monotonic() - started


def test_missing_sample_is_one_line_that_says_what_to_run(tmp_path: Path) -> None:
    code, output, errors, seconds = front_door("mixed_pretrain", cwd=tmp_path)
    assert (code, output) == (2, "")
    assert errors == (
        "data/sample/wiki/train: no shards here, nor of 7 more sources (no index.json). Run: make sample\n"
    )
    assert seconds < 5  # without importing torch


def test_mistakes_are_lines_without_traceback(tiny_run: Path) -> None:
    code, output, errors, _ = front_door(str(tiny_run), "optimzer.lr=1", "max_duration=1ep", cwd=tiny_run.parent)
    assert (code, output) == (2, "")
    assert len(errors.splitlines()) == 2
    assert "Traceback" not in errors


def test_batch_size_that_cannot_be_divided(tiny_run: Path) -> None:
    for rank, lines in (("0", 1), ("1", 0)):  # only the first process speaks
        code, _, errors, _ = front_door(str(tiny_run), cwd=tiny_run.parent, WORLD_SIZE="5", RANK=rank)
        assert (code, len(errors.splitlines())) == (2, lines)
        assert "found 12. Use 10 or 15, or another number of processes" in errors or rank == "1"


def test_help_is_quick(tmp_path: Path) -> None:
    code, output, _, seconds = front_door("--help", cwd=tmp_path)
    assert code == 0
    assert output.startswith("usage: composer")
    assert seconds < 2
