"""What is said before a run: sizes against the real model and the real shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from cheapertraining.config import ModelConfig, load_run_config
from cheapertraining.models import build_causal_lm
from cheapertraining.observe.startup import model_parameters, startup_lines


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    config = ModelConfig(hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2)
    config.tie_embeddings = tied
    model = build_causal_lm(config, 300)
    assert model_parameters(config, 300) == sum(parameter.numel() for parameter in model.parameters())


def test_lines_tell_model_tokens_and_passes(tiny_run: Path) -> None:
    model, tokens, sources, probes = startup_lines(load_run_config(tiny_run))
    assert "parameters; weights, gradients and AdamW" in model
    assert tokens == "  tokens   3,072 in 8 batches of 12 x 32"
    assert sources.count("passes") == 3
    assert probes == "  probes   code"


def test_shards_that_are_not_there_are_left_to_the_loader(tiny_run: Path, tmp_path: Path) -> None:
    config = load_run_config(tiny_run, [f"data.local={tmp_path}/nowhere"])
    assert [line.split()[0] for line in startup_lines(config)] == ["tokens", "sources", "probes"]
