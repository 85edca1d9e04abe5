"""The report before training: what it says a plan will draw is what the plan draws."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cheapertraining.config import load_data_config
from cheapertraining.data import Exhausted, MixturePlan, get_loader, read_meta
from cheapertraining.data.budget import MixtureBudget, mixture_budget
from cheapertraining.data.shard_files import read_index
from cheapertraining.errors import UserError
from tools.mix_report import human, main

SOURCES = ("code", "docs", "topics")


def drawn_batch_by_batch(
    sample: Path, config: Mapping[str, Any], weights: Mapping[str, float], size: int, tokens: int
) -> tuple[list[np.ndarray], str | None]:
    """Rows of each source after each batch, from a plan that really plans every batch, and why it ended."""
    metas = [read_meta(sample / name / "train") for name in SOURCES]
    plan = MixturePlan(
        {name: [entry.samples for entry in read_index(sample / name / "train")] for name in SOURCES},
        weights,
        global_batch_size=size,
        seed=0,
        on_exhaustion=config.get("on_exhaustion", "cycle"),
        max_epochs={name: source.get("max_epochs") for name, source in config["sources"].items()},
    )
    after = [np.zeros(len(SOURCES), np.int64)]
    per_row = np.array([meta.tokens / meta.samples for meta in metas])
    while float(after[-1] @ per_row) < tokens:
        try:
            source = plan.plan(len(after) - 1).source
        except Exhausted as end:
            return after, str(end)
        after.append(after[-1] + np.bincount(source, minlength=len(SOURCES)))
    return after, None


def config_of(sample: Path, sources: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"local": str(sample), "seq_len": 32, "sources": dict(sources or {name: {} for name in SOURCES}), **more}


def budget_of(config: Mapping[str, Any], tokens: int, **options: Any) -> MixtureBudget:
    return mixture_budget(load_data_config(config), tokens, **options)


UNEVEN = {"code": {"weight": 1.0}, "docs": {"weight": 5.0, "max_epochs": 2.5}, "topics": {"weight": 0.3}}


@pytest.mark.parametrize(
    ("sources", "policy"),
    [
        (UNEVEN, "cycle"),
        (UNEVEN, "renormalize"),
        (UNEVEN, "stop"),
        ({"code": {}, "docs": {"max_epochs": 1.25}, "topics": {"max_epochs": 0.5}}, "cycle"),
        ({name: {"max_epochs": 1.5} for name in SOURCES}, "cycle"),
    ],
)
@pytest.mark.parametrize(("size", "tokens"), [(7, 150_000), (64, 150_000), (16, 12_345)])
def test_what_is_reported_is_what_the_plan_draws(
    tiny_sample: Path, sources: Mapping[str, Any], policy: str, size: int, tokens: int
) -> None:
    config = config_of(tiny_sample, sources, on_exhaustion=policy)
    weights = {name: source.get("weight", 1.0) for name, source in sources.items()}
    after, ended = drawn_batch_by_batch(tiny_sample, config, weights, size, tokens)
    found = budget_of(config, tokens, global_batch_size=size)
    metas = [read_meta(tiny_sample / name / "train") for name in SOURCES]
    per_row = np.array([meta.tokens / meta.samples for meta in metas])

    def tokens_when(k: int, rows: float) -> int | None:
        reached = [counts for counts in after if counts[k] >= rows]
        return round(float(reached[0] @ per_row)) if reached else None

    assert found.batches == len(after) - 1
    assert [source.drawn_rows for source in found.sources.values()] == after[-1].tolist()
    assert found.ends_early == ended
    assert found.drawn_tokens == round(float(after[-1] @ per_row))
    for k, (name, source) in enumerate(found.sources.items()):
        size_of = metas[k].samples
        cap = sources[name].get("max_epochs") or (None if policy == "cycle" else 1.0)
        assert source.epochs == after[-1][k] / size_of
        assert source.first_pass_ends == tokens_when(k, size_of)
        assert source.runs_out == (None if cap is None else tokens_when(k, int(cap * size_of)))


def test_what_the_loader_draws(tiny_sample: Path) -> None:
    """The same through get_loader: rows counted from real batches."""
    config = config_of(tiny_sample, UNEVEN, on_exhaustion="renormalize")
    found = budget_of(config, 10**9, global_batch_size=16)
    loader = get_loader(config, batch_size=16)
    counts = sum(np.bincount(batch["source"].numpy(), minlength=3) for batch in loader)
    assert [source.drawn_rows for source in found.sources.values()] == counts.tolist()
    assert found.ends_early == loader.mixture.exhausted


def test_weights_in_place_of_the_config_s(tiny_sample: Path) -> None:
    found = budget_of(config_of(tiny_sample), 100_000, weights={"code": 3, "docs": 1}, global_batch_size=32)
    rows = {name: source.drawn_rows for name, source in found.sources.items()}
    assert rows["topics"] == 0
    assert rows["code"] / sum(rows.values()) == pytest.approx(0.75, abs=0.01)
    with pytest.raises(UserError, match=r"no source is named 'cod' .* Did you mean 'code'"):
        budget_of(config_of(tiny_sample), 100_000, weights={"cod": 1})


def test_a_million_batches(tiny_sample: Path) -> None:
    """Followed in steps, a plan has drawn what it has drawn when counted in one go."""
    config = config_of(tiny_sample, {"code": {}, "docs": {"weight": 0.31}, "topics": {"weight": 2.0}})
    found = budget_of(config, 2_000_000_000, global_batch_size=64)
    assert found.batches > 900_000
    sizes = {name: [read_meta(tiny_sample / name / "train").samples] for name in SOURCES}
    plan = MixturePlan(sizes, {"code": 1.0, "docs": 0.31, "topics": 2.0}, global_batch_size=64, seed=0)
    assert [source.drawn_rows for source in found.sources.values()] == plan.counts_before(found.batches).tolist()


def test_splits_and_warnings(tiny_sample: Path, tmp_path: Path) -> None:
    sample = Path(shutil.copytree(tiny_sample, tmp_path / "sample"))
    shutil.rmtree(sample / "topics" / "heldout")
    content = json.loads((sample / "docs" / "train" / "meta.json").read_text(encoding="utf-8"))
    (sample / "docs" / "train" / "meta.json").write_text(json.dumps(content | {"tokenizer_fingerprint": "x"}))
    sources = {"code": {"max_epochs": 1.0}, "docs": {}, "topics": {}}
    config = config_of(sample, sources, probes={"aim": {"source": "code"}, "other": {"local": str(tmp_path / "no")}})
    per_pass = read_meta(sample / "docs" / "train").tokens
    found = budget_of(config, 20 * per_pass, global_batch_size=16)
    warnings = "\n".join(found.warnings)
    probe = read_meta(sample / "code" / "probe")
    assert found.probes == {"aim": found.probes["aim"]}
    assert (found.probes["aim"].rows, found.probes["aim"].tokens) == (probe.samples, probe.tokens)
    heldout = found.sources["code"].heldout
    assert heldout is not None
    assert heldout.rows == read_meta(sample / "code" / "heldout").samples
    assert found.sources["topics"].heldout is None
    assert re.search(r"more than 4 epochs of (topics|docs)", warnings)
    assert "arXiv 2305.16264" in warnings
    assert "probe 'aim': " in warnings if probe.samples < 64 else "probe 'aim'" not in warnings
    assert "probe 'other': no shards of 'other/probe'" in warnings
    assert "no held-out split of topics" in warnings
    assert re.search(r"used up: code \(after [\d,]+ tokens\)", warnings)
    assert "different tokenizers, which a run refuses: code, topics; docs" in warnings


def test_nothing_to_warn_of(tiny_sample: Path) -> None:
    assert budget_of(config_of(tiny_sample), 5_000, global_batch_size=8).warnings == []


def test_small_probe_and_end_of_data(tiny_sample: Path) -> None:
    probe = read_meta(tiny_sample / "docs" / "probe").samples
    assert probe < 64
    config = config_of(tiny_sample, probes={"aim": {"source": "docs"}}, on_exhaustion="stop")
    warnings = budget_of(config, 10**9, global_batch_size=8).warnings
    assert any(line.startswith(f"probe 'aim': {probe} rows") for line in warnings)
    assert any(re.match(r"ends after [\d,]+ of 1,000,000,000 tokens: on_exhaustion 'stop'", line) for line in warnings)


def test_remote_shards_stay_where_they_are(tiny_sample: Path, tmp_path: Path) -> None:
    """Only the index and the meta come here, and the report is that of local shards."""
    there = config_of(tiny_sample, probes={"aim": {"source": "code"}})
    here = there | {"local": str(tmp_path / "cache"), "remote": str(tiny_sample)}
    assert budget_of(here, 50_000) == budget_of(there, 50_000)
    files = {Path(file).name for _, _, names in os.walk(tmp_path / "cache") for file in names}
    assert files == {"meta.json", "index.json"}


def test_command(tiny_sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tiny_sample / "data.yaml")
    assert main([data, "--tokens", "20_000", "--global-batch-size", "8", "data.sources.code.max_epochs=0.5"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert re.match(r"20(\.\d)?k of 20k tokens in \d+ batches of 8 rows of 32; on_exhaustion: cycle", lines[0])
    assert [line.split()[0] for line in lines[2:5]] == list(SOURCES)
    assert "/0.5" in lines[2]
    assert "probe code: " in printed
    options = [data, "--tokens", "2e4", "--global-batch-size", "8", "--weights", "code=1,docs=3", "--json"]
    assert main(options) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["sources"]["docs"]["weight"] == 0.75
    expected = budget_of(config_of(tiny_sample), 20_000, weights={"code": 1, "docs": 3}, global_batch_size=8)
    assert content["batches"] == expected.batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "many"], "--tokens: expected a number such as"),
        (["--tokens", "0"], "tokens: expected a positive number, found 0"),
        (["--tokens", "1M", "--weights", "code"], "--weights: expected NAME=WEIGHT"),
        (["--tokens", "1M", "data.seq_len=64"], "expects seq_len 64, the shards have 32"),
        (["--tokens", "1M", "data.local=nowhere"], "no shards of 'code/train'"),
    ],
)
def test_bad_input(tiny_sample: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_sample / "data.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mix_report: ")
    assert message in error


def test_numbers() -> None:
    numbers: Sequence[int] = (0, 7, 999, 1000, 12_345, 999_499, 1_740_000, 20_000_000_000, 10**12)
    assert [human(n) for n in numbers] == ["0", "7", "999", "1k", "12.3k", "999k", "1.74M", "20B", "1T"]
    assert human(None) == "-"
