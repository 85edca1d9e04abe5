"""Loaders, packing and configs under the names and in the shapes that other packages' loops call, on real shards."""

from __future__ import annotations

import argparse
import shlex
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cheapertraining.errors import UserError
from tests.contract.calls import create

HUB = {
    "sources": [
        {"name": "dclm", "path": "mlfoundations/dclm-baseline-1.0-parquet", "weight": 0.25, "text_column": "text"},
        {"name": "code", "path": "nick007x/github-code-2025", "weight": 0.75, "text_column": "content"},
    ]
}


def test_create_pretraining_dataloader(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loader, mixed_dataset, probes = create(tiny_sample, tokenizer)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert loader.dataset is mixed_dataset  # stage 2 finds it so
    assert not hasattr(loader.dataset, "dataset")
    assert mixed_dataset.get_current_weights() == pytest.approx({"code": 1 / 3, "docs": 1 / 3, "topics": 1 / 3})
    assert callable(mixed_dataset.update_weights_from_influence)
    assert list(probes) == ["code"]
    for batch in (next(iter(loader)), next(iter(probes["code"]))):
        assert {"input_ids", "position_ids", "labels"} <= batch.keys()
        for name in ("input_ids", "position_ids", "labels"):
            assert (batch[name].dtype, batch[name].shape[1]) == (torch.int64, 32)
    first = [batch["input_ids"] for batch in islice(create(tiny_sample, tokenizer)[0], 3)]
    again = [batch["input_ids"] for batch in islice(create(tiny_sample, tokenizer, num_workers=2)[0], 3)]
    other = [batch["input_ids"] for batch in islice(create(tiny_sample, tokenizer, seed=1)[0], 3)]
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_loader_can_be_iterated_again_and_goes_on(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loader, _, _ = create(tiny_sample, tokenizer)
    apart = [next(iter(loader))["input_ids"] for _ in range(3)]
    together = [batch["input_ids"] for batch in islice(create(tiny_sample, tokenizer)[0], 3)]
    assert all(map(torch.equal, apart, together))


def test_no_probes_and_no_mixture_are_none(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert create(tiny_sample, tokenizer, with_probes=False)[2] is None
    single = {"local": str(tiny_sample), "seq_len": 32, "sources": {"code": {}}}
    loader, mixed_dataset, probes = create(tiny_sample, tokenizer, config_name=single)
    assert (mixed_dataset, probes) == (None, None)
    assert len(next(iter(loader))["input_ids"]) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_reach_a_hugging_face_model_as_packed_documents(
    tiny_sample: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path, workers: int
) -> None:
    """Called as stage 2 does, with `batch.get("attention_mask")`: a document's logits are those of it alone."""
    from cheapertraining.data import TokenizerWrapper, write_split

    texts = [f"x = {number}" for number in range(100)]
    about = {"source": "short", "split": "train", "license": "CC0-1.0", "origin": "made here"}
    write_split(tmp_path / "short" / "train", texts, TokenizerWrapper(tokenizer), seq_len=32, **about)
    config = {"local": str(tmp_path), "seq_len": 32, "sources": {"short": {}}}
    loader, _, _ = create(tiny_sample, tokenizer, config_name=config, num_workers=workers)
    assert "attention_mask" in loader.mixture.draw("short", 6, key=0)  # there are padded rows
    compared = 0
    for batch in islice(loader, 2):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
        )["logits"]
        for row, positions in enumerate(batch["position_ids"]):
            for start, end in pairwise([*(positions == 0).nonzero().flatten().tolist(), 32]):
                alone = model(input_ids=batch["input_ids"][row : row + 1, start:end])["logits"]
                torch.testing.assert_close(logits[row, start:end], alone[0], atol=1e-5, rtol=1e-4)
                compared += start > 0
    assert compared > 24


def test_batch_size_is_of_one_rank(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ranks = [create(tiny_sample, tokenizer, rank=rank, world_size=2)[0] for rank in range(2)]
    rows = [next(iter(loader))["sample_id"] for loader in ranks]
    together = next(iter(create(tiny_sample, tokenizer, batch_size=12)[0]))["sample_id"]
    assert torch.equal(torch.cat(rows), together)


def test_create_dataloader_as_the_wrappers_call_it(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from cheapertraining.data import create_dataloader, load_data_config

    plain = load_data_config(str(tiny_sample / "data.yaml"))
    for config in (plain, OmegaConf.create(plain), OmegaConf.create({"data": plain})):
        loader, mixed_dataset = create_dataloader(
            config=config,
            tokenizer=tokenizer,
            batch_size=4,
            max_length=32,
            num_workers=2,
            seed=42,
            rank=0,
            world_size=1,
            prefetch_factor=4,
            pin_memory=False,
            packed=True,
        )
        assert mixed_dataset is loader.mixture
        assert (loader.num_workers, loader.batch_size) == (2, 4)


@pytest.mark.parametrize(
    "config",
    [
        HUB,
        OmegaConf.create(HUB),
        {
            "dataset": {"path": "mlfoundations/dclm-baseline-1.0-parquet", "name": None, "split": "train"},
            "preprocessing": {"text_column": "text"},
        },
    ],
)
def test_data_sets_of_a_hub_are_refused_with_what_to_run(config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    from cheapertraining.data import create_dataloader

    with pytest.raises(UserError) as caught:
        create_dataloader(config=config, tokenizer=tokenizer, batch_size=4, max_length=2048, num_workers=4, seed=42)
    said = str(caught.value)
    assert "\n" not in said
    assert "python tools/convert_text.py --dataset mlfoundations/dclm-baseline-1.0-parquet" in said
    assert f"--tokenizer {tokenizer.name_or_path} --seq-len 2048" in said
    assert "sources: {dclm" in said


def test_the_command_that_is_said_is_one_that_the_tool_takes(tiny_sample: Path) -> None:
    from cheapertraining.data import DatasetMixture
    from tools.convert_text import add_options, add_text_options

    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", nargs="*")
    add_options(parser)
    add_text_options(parser)
    source = DatasetMixture("code", 1.0, "nick007x/github-code-2025", "all", "validation", "content")
    command = shlex.split(source.command("tokenizers/mine", 2048))
    parsed = parser.parse_args(command[2:])
    assert (parsed.dataset, parsed.dataset_config, parsed.dataset_split) == (source.path, "all", "validation")
    assert (parsed.text_column, parsed.seq_len, str(parsed.out)) == ("content", 2048, "data/mine/code")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 2048}, "max_length: the shards of this data config have rows of 32 tokens, found 2048"),
        ({"packed": False}, "packed: expected true"),
        ({"config_name": "mixed_pretain"}, "Did you mean 'mixed_pretrain'"),
        ({"num_workers": 8}, "lag"),
    ],
)
def test_what_cannot_be_done_is_said(
    tiny_sample: Path, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create(tiny_sample, tokenizer, **settings)


def test_configs_by_name() -> None:
    from cheapertraining.data import get_dataset_weights_from_config, list_available_configs, load_data_config

    names = list_available_configs()
    assert names == sorted(names)
    assert {"mixed_pretrain", "fineweb", "downstream"} <= set(names)
    config = load_data_config("mixed_pretrain")
    assert isinstance(config, dict)
    assert set(get_dataset_weights_from_config(config)) == set(config["sources"])
    assert get_dataset_weights_from_config(HUB) == {"dclm": 0.25, "code": 0.75}
    assert get_dataset_weights_from_config(OmegaConf.create(HUB)) == {"dclm": 0.25, "code": 0.75}
    assert sum(get_dataset_weights_from_config("mixed_pretrain").values()) == pytest.approx(1.0)
    with pytest.raises(UserError, match="above 0"):
        get_dataset_weights_from_config({"sources": [{"name": "a", "path": "a", "weight": 0}]})


def test_create_probe_dataloaders(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from cheapertraining.data import create_probe_dataloaders

    single = {"path": str(tiny_sample / "code"), "subset": None, "split": "train", "size": 5, "text_column": "text"}
    loaders = create_probe_dataloaders(probe_config=single, tokenizer=tokenizer, max_length=32)
    assert list(loaders) == ["default"]
    assert [len(batch["input_ids"]) for batch in loaders["default"]] == [4, 1]
    domains = {name: {"path": str(tiny_sample / name / "probe")} for name in ("code", "docs")}
    several = create_probe_dataloaders(
        probe_config=OmegaConf.create({"domains": domains}), tokenizer=tokenizer, max_length=32, batch_size=3, seed=42
    )
    assert list(several) == ["code", "docs"]
    rows = {name: next(iter(loader))["input_ids"] for name, loader in several.items()}
    assert not torch.equal(rows["code"], rows["docs"])
    assert "attention_mask" not in next(iter(several["docs"]))


def test_probes_that_are_not_there_are_refused(tiny_sample: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from cheapertraining.data import create_probe_dataloaders

    with pytest.raises(UserError, match=r"--dataset HuggingFaceFW/fineweb-edu .* --split-by-hash probe:1"):
        create_probe_dataloaders({"path": "HuggingFaceFW/fineweb-edu", "size": 10}, tokenizer, 2048)
    with pytest.raises(UserError, match="found neither"):
        create_probe_dataloaders({}, tokenizer, 32)
    with pytest.raises(UserError, match="seq_len"):
        create_probe_dataloaders({"path": str(tiny_sample / "code")}, tokenizer, 64)


class EndOfText:
    """All that a packed data set asks of a tokenizer before it is iterated."""

    eos_token_id = 2


@pytest.mark.parametrize(
    ("separator", "tokens", "positions"),
    [
        (2, [10, 11, 12, 2, 20, 21, 2, 30, 31, 32, 33, 2, 40, 41], [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1]),
        (99, [10, 11, 99, 20, 2, 22, 99, 30], [0, 1, 2, 0, 1, 2, 3, 0]),
        (2, [10, 11, 2, 2, 20], [0, 1, 2, 0, 0]),
        (0, [7, 0, 8], [0, 1, 0]),
        (2, [10], [0]),
        (2, [], []),
    ],
)
def test_position_ids_begin_anew_behind_a_separator(separator: int, tokens: list[int], positions: list[int]) -> None:
    from cheapertraining.data import PackedDataset, compute_position_ids

    dataset = PackedDataset(dataset=[], tokenizer=EndOfText(), max_length=16, separator_token_id=separator)
    row = torch.tensor(tokens, dtype=torch.long)
    for found in (dataset._compute_position_ids(row), compute_position_ids(row, separator)):
        assert torch.equal(found, torch.tensor(positions, dtype=torch.long))
    assert dataset._compute_position_ids(row.int()).dtype == torch.int32
    assert PackedDataset(dataset=[], tokenizer=EndOfText(), max_length=8).separator_token_id == 2


def test_texts_packed_on_the_fly(tokenizer: PreTrainedTokenizerFast) -> None:
    from cheapertraining.data import PackedDataset, TokenPacker, batch_tokenize

    texts = [f"def number_{i}():\n    return {i}\n" * (1 + i % 3) for i in range(20)]
    encoded = batch_tokenize(texts, tokenizer)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    rows = list(PackedDataset(dataset=[{"text": text} for text in texts], tokenizer=tokenizer, max_length=64))
    assert all(row["input_ids"].shape == (64,) for row in rows)
    trained = sum(int((row["labels"] != -100).sum()) for row in rows)
    assert trained == sum(map(len, encoded))  # each token but a document's first, and its end of text
    packer = TokenPacker(tokenizer, max_length=64, tokenize_batch_size=20)
    pushed = [row for text in texts for row in packer.add_text(text)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(pushed, rows, strict=True))
    assert list(packer.flush()) == []
    with pytest.raises(UserError, match="separator_token_id"):
        next(iter(PackedDataset(dataset=texts, tokenizer=tokenizer, max_length=64, separator_token_id=7)))
    with pytest.raises(UserError, match="add_special_tokens"):
        batch_tokenize(texts, tokenizer, add_special_tokens=True)
