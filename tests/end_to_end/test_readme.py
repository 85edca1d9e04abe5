"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import start

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample" / "data.yaml"


def block(name: str) -> str:
    """The code block behind ``<!-- run:name -->`` in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- run:{name} -->\n```\w+\n(.*?)```", readme, re.DOTALL)
    assert found, f"README.md has no block run:{name}"
    return found.group(1)


def run(script: Path, *arguments: str, folder: Path) -> str:
    process = start(script, *arguments, folder=folder, WANDB_MODE="disabled")
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


def run_line(line: str, folder: Path) -> str:
    """``python tools/x.py …`` as it is run from another folder than the checkout."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    return run(ROOT / script, *arguments, folder=folder)


def test_own_data_in_ten_minutes(tmp_path: Path) -> None:
    library = Path(os.__file__).parent
    for folder, pattern in (("manuals", "[a-c]*.py"), ("notes", "[d-g]*.py")):
        (tmp_path / "my" / folder).mkdir(parents=True)
        for file in sorted(library.glob(f"**/{pattern}"))[:80]:
            text = file.read_text(encoding="utf-8", errors="replace")[:2000] + str(file)
            (tmp_path / "my" / folder / f"{file.parent.name}-{file.stem}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "own.py").write_text(block("own-tokenizer"), encoding="utf-8")
    run(tmp_path / "own.py", folder=tmp_path)
    for line in block("own-data").strip().splitlines():
        assert "80 records read: 80 documents written" in run_line(line, tmp_path)
    (tmp_path / "mine.yaml").write_text(block("own-yaml"), encoding="utf-8")
    assert "notes" in run_line(block("own-report"), tmp_path)
    launcher, script, yaml, *overrides = shlex.split(block("own-train"))
    assert (launcher, script) == ("composer", "train.py")
    small = ["max_duration=3ba", "train_loader.global_batch_size=4", "model.hidden_size=16", "model.num_layers=1"]
    small += ["model.intermediate_size=32", "eval_loader.subset_num_batches=1", "eval_loader.batch_size=2"]
    output = run(ROOT / script, str(ROOT / yaml), *overrides, *small, folder=tmp_path)
    assert "manual" in output
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()


@pytest.mark.skipif(not SAMPLE.is_file(), reason="needs the sample: make sample")
def test_own_loop() -> None:
    command = [sys.executable, "-c", block("own-loop")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
