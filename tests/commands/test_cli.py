"""The command `cheapertraining`: what it says, what it runs, how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cheapertraining.commands import cli
from cheapertraining.observe import doctor
from cheapertraining.observe.credentials import credentials

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef" * 2


def test_help_names_every_command_and_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("doctor", "train", "convert", "inspect", "report", "completion"):
        assert re.search(rf"^ +{name}\b", text, re.MULTILINE)
    assert "cheapertraining train yamls/mixed_pretrain.yaml" in text
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reprot"], "Did you mean 'report'?"),
        (["convert", "vidoe"], "expected text or chat, found 'vidoe'"),
        (["train", "-n", "two", "x.yaml"], "expected a number of processes, found 'two'"),
        (["completion"], "expected bash, zsh or tcsh"),
        (["train", "no_such"], "no_such: no such yaml"),
        (["report", "no/such/run"], "expected the folder of a run"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "tool"), [("convert text", "convert_text"), ("inspect", "inspect_shards"), ("report", "report")]
)
def test_tools_are_found_and_keep_their_own_help(command: str, tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: cheapertraining {command}")


def test_completion_completes_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    ask = f"source {script}; COMP_WORDS=(cheapertraining re); COMP_CWORD=1; _shtab_cheapertraining; "
    ask += 'echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["report"], done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "cheapertraining.commands.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()  # long before anything is printed
        assert started.stderr.read() == b""
        assert started.wait() in (0, 1)  # argparse leaves the error of a closed pipe out


def test_the_first_line_of_a_run_comes_before_anything_heavy_is_imported() -> None:
    code = """
import sys
from cheapertraining.commands import train
import cheapertraining.observe.startup as startup
def stop(config, processes):
    heavy = {"torch", "composer", "transformers", "wandb", "plotly"} & set(sys.modules)
    print("loaded:", sorted(heavy))
    sys.exit(0)
startup.startup_lines = stop
import cheapertraining.config as config
config.check_prepared = lambda data: None
train.main(["mixed_pretrain"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    first, second = done.stdout.splitlines()
    assert first == "mixed_pretrain: 8 sources, 300ba. Starting …"
    assert second == "loaded: []"


def test_doctor_looks_at_everything_and_prints_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert cli.main(["doctor", "--folder", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert SECRET not in text
    assert "\x1b" not in text
    assert "key for Weights & Biases: present" in text
    for what in ("python", "packages", "cpu", "gpu", "disk", "open files", "host name"):
        assert re.search(rf"^(ok   |note ) {what}: ", text, re.MULTILINE), what


def test_doctor_tells_faults_with_their_cure(tmp_path: Path) -> None:
    broken = {"HOME": str(tmp_path), "WANDB_MODE": "onlin", "OMP_NUM_THREADS": "many", "RANK": "0"}
    faults = {found.what: found for found in doctor.examine(tmp_path, broken) if found.level == "fault"}
    assert set(faults) == {"WANDB_MODE", "OMP_NUM_THREADS", "RANK"}
    assert all(found.cure for found in faults.values())


def test_keys_are_found_where_their_owners_look(tmp_path: Path) -> None:
    assert not any(credentials({"HOME": str(tmp_path)}).values())
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n", encoding="utf-8")
    found = credentials({"HOME": str(tmp_path)})
    assert found == {"Weights & Biases": True, "S3": True, "Google Cloud Storage": False, "Hugging Face": False}
