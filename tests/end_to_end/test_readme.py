"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample" / "data.yaml"


def block(name: str) -> str:
    """The code block behind ``<!-- run:name -->`` in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- run:{name} -->\n```\w+\n(.*?)```", readme, re.DOTALL)
    assert found, f"README.md has no block run:{name}"
    return found.group(1)


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_command(line: str) -> list[str]:
    """``python tools/x.py …`` as it is run from another folder than the checkout."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    return [sys.executable, str(ROOT / script), *arguments]


def test_own_data_in_ten_minutes(tmp_path: Path) -> None:
    library = Path(os.__file__).parent
    for folder, pattern in (("manuals", "[a-c]*.py"), ("notes", "[d-g]*.py")):
        (tmp_path / "my" / folder).mkdir(parents=True)
        for file in sorted(library.glob(f"**/{pattern}"))[:80]:
            text = file.read_text(encoding="utf-8", errors="replace")[:2000] + str(file)
            (tmp_path / "my" / folder / f"{file.parent.name}-{file.stem}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "own.py").write_text(block("own-tokenizer"), encoding="utf-8")
    run([sys.executable, "own.py"], tmp_path)
    for line in block("own-data").strip().splitlines():
        assert "80 records read: 80 documents written" in run(python_command(line), tmp_path)
    (tmp_path / "mine.yaml").write_text(block("own-yaml"), encoding="utf-8")
    assert "notes" in run(python_command(block("own-report")), tmp_path)
    launcher, script, yaml, *overrides = shlex.split(block("own-train"))
    assert (launcher, script) == ("composer", "train.py")
    small = ["max_duration=3ba", "train_loader.global_batch_size=4", "model.hidden_size=16", "model.num_layers=1"]
    small += ["model.intermediate_size=32", "eval_loader.subset_num_batches=1", "eval_loader.batch_size=2"]
    output = run([sys.executable, str(ROOT / script), str(ROOT / yaml), *overrides, *small], tmp_path)
    assert "manual" in output
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()


@pytest.mark.skipif(not SAMPLE.is_file(), reason="needs the sample: make sample")
def test_own_loop() -> None:
    run([sys.executable, "-c", block("own-loop")], ROOT)
