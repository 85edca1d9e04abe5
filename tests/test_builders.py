"""Each part is what its config says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composer.core.data_spec import default_split_batch
from composer.devices import DeviceCPU
from torch import nn

from cheapertraining.builders import (
    build_evaluators,
    build_loader,
    build_microbatch_size,
    build_model,
    build_optimizer,
    build_strategy,
    build_tokenizer,
    count_tokens,
    counted,
    lr_multiplier,
    resolve_device,
    resolve_precision,
    wandb_mode,
)
from cheapertraining.config import OptimizerConfig, RunConfig, SchedulerConfig, WandbConfig, load_run_config
from cheapertraining.errors import UserError
from cheapertraining.mixing import (
    ADOStrategy,
    AioliStrategy,
    DoGEStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    InfluenceStrategy,
    ODMStrategy,
    PiKEStrategy,
    ProportionalStrategy,
    RnBStrategy,
    ScheduleStrategy,
    SkillItStrategy,
    StaticStrategy,
    UniMaxStrategy,
)


@pytest.fixture
def config(tiny_run: Path) -> RunConfig:
    return load_run_config(tiny_run)


# ---- learning rate -----------------------------------------------------------------------------------------
def multipliers(config: SchedulerConfig, warmup: float, decay: float) -> list[float]:
    return [round(lr_multiplier(config, step / 10, warmup, decay), 4) for step in range(11)]


def test_warmup_stable_decay() -> None:
    wsd = SchedulerConfig(name="wsd", alpha_f=0.1)
    assert multipliers(wsd, 0.2, 0.4) == [0, 0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]
    assert multipliers(wsd, 0.0, 0.0) == [1.0] * 11
    assert multipliers(wsd, 0.0, 1.0)[5] == 0.55


def test_cosine_and_constant() -> None:
    cosine = multipliers(SchedulerConfig(name="cosine", alpha_f=0.0), 0.2, 0.3)
    assert cosine[:3] == [0, 0.5, 1]
    assert cosine[6] == 0.5  # half of the way from the end of warm-up to the end
    assert cosine[10] == 0
    assert multipliers(SchedulerConfig(name="constant", alpha_f=0.0), 0.1, 0.3) == [0] + [1.0] * 10


# ---- optimizer ---------------------------------------------------------------------------------------------
def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3), model)
    decayed, kept = optimizer.param_groups
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert [tuple(parameter.shape) for parameter in kept["params"]] == [(2,), (2,), (2,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert all((g["lr"], g["betas"], g["eps"]) == (0.5, (0.8, 0.9), 1e-6) for g in optimizer.param_groups)


# ---- tokens ------------------------------------------------------------------------------------------------
def test_count_tokens() -> None:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.tensor([[-100, 1, 1, 1], [-100] * 4])}
    assert count_tokens(batch) == {"total": 8, "loss_generating": 3}
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert count_tokens(batch) == {"total": 5, "loss_generating": 3}


def test_microbatches_bring_their_counts_so_that_no_device_is_asked() -> None:
    labels = torch.tensor([[-100, 1, 1, 1], [-100] * 4, [-100, 1, -100, -100]])
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.int64), "labels": labels}
    parts = counted(default_split_batch)(batch, 2)
    # Numbers on this device cannot be read at all.
    moved = [DeviceCPU().batch_to_device(part) for part in parts]
    moved = [{k: v.to("meta") if torch.is_tensor(v) else v for k, v in part.items()} for part in moved]
    assert [count_tokens(part) for part in moved] == [
        {"total": 8, "loss_generating": 3},
        {"total": 4, "loss_generating": 1},
    ]


# ---- device, precision, microbatches -----------------------------------------------------------------------
def test_automatic_choices_without_gpu(config: RunConfig) -> None:
    config.device = "auto"
    assert resolve_device(config) == ("gpu" if torch.cuda.is_available() else "cpu")
    assert resolve_precision(config, "cpu") == "fp32"
    assert resolve_precision(config, "gpu") == "amp_bf16"
    assert build_microbatch_size(config, "cpu", world_size=2) == 6
    assert build_microbatch_size(config, "gpu", world_size=2) == "auto"
    config.train_loader.device_microbatch_size = 4
    assert build_microbatch_size(config, "cpu", world_size=2) == 4


def test_impossible_choices(config: RunConfig) -> None:
    config.precision = "amp_bf16"
    assert resolve_precision(config, "gpu") == "amp_bf16"
    with pytest.raises(UserError, match="precision: amp_bf16 needs a GPU"):
        resolve_precision(config, "cpu")
    if not torch.cuda.is_available():
        config.device = "gpu"
        with pytest.raises(UserError, match="no CUDA device"):
            resolve_device(config)


# ---- W&B ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "environment", "netrc", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "", "online"),
        ("auto", {}, "machine api.wandb.ai login user password k", "online"),
        ("auto", {}, "machine elsewhere.com login user password k", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://w.local:8080"}, "machine w.local login user password k", "online"),
        ("auto", {}, "not a netrc", "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "", "disabled"),
        ("offline", {"WANDB_API_KEY": "k"}, "", "offline"),
        ("disabled", {}, "", "disabled"),
        ("online", {"WANDB_API_KEY": "k"}, "", "online"),
    ],
)
def test_wandb_is_offline_without_a_key(
    mode: str, environment: dict[str, str], netrc: str, expected: str, tmp_path: Path
) -> None:
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode(WandbConfig(mode=mode), {"HOME": str(tmp_path), **environment}) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "environment"), [("online", {}), ("auto", {"WANDB_MODE": "online"})])
def test_wandb_online_without_a_key_is_refused_not_asked_for(
    mode: str, environment: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"loggers.wandb.mode: online needs a key. Set WANDB_API_KEY"):
        wandb_mode(WandbConfig(mode=mode), {"HOME": str(tmp_path), **environment})  # type: ignore[arg-type]


def test_wandb_mode_of_the_environment_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"WANDB_MODE in the environment: expected one of online, .* found ''"):
        wandb_mode(WandbConfig(), {"HOME": str(tmp_path), "WANDB_MODE": ""})


# ---- data, model, mixing -----------------------------------------------------------------------------------
def test_loader_evaluators_and_model(config: RunConfig) -> None:
    tokenizer = build_tokenizer(config)
    loader = build_loader(config, tokenizer)
    batch = next(iter(loader))
    assert batch["input_ids"].shape == (12, 32)
    evaluators = build_evaluators(config, loader)
    assert [e.label for e in evaluators] == ["heldout/code", "heldout/docs", "heldout/topics", "probe/code"]
    assert evaluators[0].dataloader.dataloader.batch_size == config.eval_loader.batch_size
    rows = sum(len(batch["labels"]) for batch in evaluators[0].dataloader.dataloader)
    assert rows == len(loader.heldout["code"].dataset)  # type: ignore[arg-type]
    model = build_model(config, tokenizer, "fp32")
    assert model(batch)["logits"].shape == (12, 32, tokenizer.vocab_size)


def test_no_tokenizer(config: RunConfig, tmp_path: Path) -> None:
    config.data.local = str(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.path: none is set, and the default, .*/tokenizer, is no folder"):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("static", StaticStrategy),
        ("proportional", ProportionalStrategy),
        ("unimax", UniMaxStrategy),
        ("schedule", ScheduleStrategy),
        ("influence", InfluenceStrategy),
        ("ado", ADOStrategy),
        ("aioli", AioliStrategy),
        ("doge", DoGEStrategy),
        ("doremi", DoReMiStrategy),
        ("grape", GRAPEStrategy),
        ("odm", ODMStrategy),
        ("pike", PiKEStrategy),
        ("rnb", RnBStrategy),
        ("skillit", SkillItStrategy),
    ],
)
def test_strategy_by_name(tiny_run: Path, name: str, kind: type) -> None:
    mixing = load_run_config(
        tiny_run,
        [
            f"algorithms.online_mixing.strategy={name}",
            "algorithms.online_mixing.schedule.points=[{tokens: 0, weights: {code: 1}}]",
            "algorithms.online_mixing.doremi.reference=folder",
        ],
    ).algorithms.online_mixing
    assert mixing is not None
    assert type(build_strategy(mixing)) is kind
