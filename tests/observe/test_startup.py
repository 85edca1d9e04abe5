"""What is said before a run: sizes against the real model and the real shards, and before what takes long to import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cheapertraining.config import load_run_config
from cheapertraining.distributed.estimate import memory_of_run, shape_of_model
from cheapertraining.models import build_causal_lm
from cheapertraining.observe.startup import startup_lines

ROOT = Path(__file__).parents[2]


def test_lines_tell_tokens_model_memory_and_passes(tiny_run: Path) -> None:
    config = load_run_config(tiny_run)
    tokens, model, memory, sources, probes = startup_lines(config)
    assert tokens == "  tokens   3,072 in 8 batches of 12 x 32"
    built = build_causal_lm(config.model, 512)
    assert model == f"  model    {sum(parameter.numel() for parameter in built.parameters()):,} parameters"
    assert memory.startswith("  memory   about ")
    assert sources.count("passes") == 3
    assert probes == "  probes   code"


def test_memory_is_told_by_part_on_the_fullest_rank(tiny_run: Path) -> None:
    keys = ["model.hidden_size=512", "model.intermediate_size=1024", "model.num_layers=4", "device=gpu"]
    keys += ["compose.distributed=fsdp2", "train_loader.global_batch_size=64"]
    config = load_run_config(tiny_run, keys)
    expected = memory_of_run(config, shape_of_model(config.model, 512), 2, on_gpu=True)
    (memory,) = [line for line in startup_lines(config, 2) if "memory" in line]
    total, parts = memory.split(" a rank: ")
    assert total == f"  memory   about {expected.total / 2**20:.0f} MiB"
    told = {name: float(number) for name, number in (part.rsplit(" ", 1) for part in parts.split(", "))}
    assert told["optimizer"] == pytest.approx(expected.optimizer / 2**20, abs=0.5)
    assert sum(told.values()) == pytest.approx(expected.total / 2**20, abs=3)


def test_shards_that_are_not_there_are_left_to_the_loader(tiny_run: Path, tmp_path: Path) -> None:
    config = load_run_config(tiny_run, [f"data.local={tmp_path}/nowhere"])
    assert [line.split()[0] for line in startup_lines(config)] == ["tokens", "sources", "probes"]


def test_the_first_lines_come_before_torch_and_composer(tiny_run: Path) -> None:
    """Both take seconds to import; here they cannot be imported at all."""
    script = """
import sys
for heavy in ("torch", "composer", "transformers", "streaming"):
    sys.modules[heavy] = None
sys.argv = ["train.py", sys.argv[1]]
import train
try:
    train.main(sys.argv[1:])
except ImportError as error:
    print("then:", error.name)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tiny_run)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    first, second, then = ran.stdout.splitlines()
    assert first == f"{tiny_run}: 3 sources, 8ba. Starting …"
    assert second == "  tokens   3,072 in 8 batches of 12 x 32"
    assert then == "then: torch"
