"""Every strategy in a real Composer trainer: it gets the signals it needs, decides, and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger

from cheapertraining.builders import build_online_mixing, build_reference, build_tokenizer
from cheapertraining.config import RunConfig, load_run_config
from cheapertraining.errors import UserError
from cheapertraining.influence.losses import token_losses
from cheapertraining.mixing import Constraints, DoGEStrategy, DoReMiStrategy, MixtureController, OnlineMixing, Strategy
from cheapertraining.models import build_causal_lm
from tests.observe.tiny_trainer import MODEL, tiny_loader, tiny_trainer

STRATEGIES = ("ado", "aioli", "doge", "doremi", "grape", "matching", "odm", "pike", "rnb", "skillit")
BATCHES = 6


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    build_causal_lm(MODEL, 512, seed=3).model.save_pretrained(folder)
    return folder


def config_of(sample: Path, strategy: str, reference: Path) -> RunConfig:
    run = sample / f"{strategy}.yaml"
    run.write_text(f"max_duration: {BATCHES}ba\ncompose: {{data: {sample / 'data.yaml'}}}\n")
    key = "algorithms.online_mixing"
    given = {
        "strategy": strategy,
        "interval": "1ba",
        "warmup": "1ba",
        "constraints.kl_step": "null",
        "doremi.reference": str(reference),
        "influence.probe_samples": 3,
        "influence.source_samples": 2,
        "influence.scorer": "hook",
        "aioli.hold": 1,
        "rnb.temperature": 0.01,
    }
    return load_run_config(run, ["data.seq_len=32", *(f"{key}.{name}={value}" for name, value in given.items())])


def train(sample: Path, runs: Path, batches: int, config: RunConfig, **options: Any) -> tuple[Trainer, OnlineMixing]:
    loader = tiny_loader(sample)
    assert config.algorithms.online_mixing is not None
    mixing = build_online_mixing(config, config.algorithms.online_mixing, loader, runs)
    options = {"save_interval": "4ba"} | options
    trainer = tiny_trainer(loader, runs, batches, algorithms=[mixing], **options)
    trainer.fit()
    trainer.close()  # type: ignore[no-untyped-call]
    return trainer, mixing


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_and_resumes_exactly(strategy: str, tiny_sample: Path, tmp_path: Path, reference: Path) -> None:
    config = config_of(tiny_sample, strategy, reference)
    straight, mixing = train(tiny_sample, tmp_path, BATCHES, config)
    history = mixing.controller.history
    assert [decision.batch for decision in history] == list(range(1, BATCHES + 1))
    assert any(decision.from_batch is not None for decision in history)
    state = mixing.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    checkpoint = str(tmp_path / "tiny/checkpoints/ep0-ba4-rank0.pt")
    resumed, again = train(tiny_sample, tmp_path / "again", BATCHES, config, load_path=checkpoint, save_folder=None)
    assert again.state_dict()["controller"] == state["controller"]
    for one, other in zip(resumed.state.model.parameters(), straight.state.model.parameters(), strict=True):
        assert torch.equal(one, other)


class ByToken(Callback):
    """Reference: excess losses by source, one sample at a time."""

    def __init__(self, reference: torch.nn.Module) -> None:
        self.reference, self.sums = reference.eval(), np.zeros(3)

    def after_loss(self, state: State, logger: Logger) -> None:
        with torch.no_grad():
            logits = self.reference(state.batch)["logits"]
        outputs: Any = state.outputs
        own, _ = token_losses(outputs["logits"].detach(), state.batch["labels"])
        other, _ = token_losses(logits, state.batch["labels"])
        for row, source in enumerate(state.batch["source"].tolist()):
            self.sums[source] += float((own[row] - other[row]).clamp(min=0).sum())


def controlled(loader: Any, strategy: Strategy) -> MixtureController:
    return MixtureController(loader.mixture, strategy, Constraints(), 2, 2, 10**6)


def test_excess_losses_are_those_of_the_tokens(tiny_sample: Path, tmp_path: Path) -> None:
    other, loader = build_causal_lm(MODEL, 512, seed=3), tiny_loader(tiny_sample)
    mixing = OnlineMixing(controlled(loader, DoReMiStrategy()), reference=other)
    callback = ByToken(other)
    trainer = tiny_trainer(loader, tmp_path, 3, [callback], algorithms=[mixing], save_folder=None)
    trainer.state.device_train_microbatch_size = 5
    trainer.fit()
    mixing.state_dict()
    np.testing.assert_allclose(mixing.controller._excess.losses, callback.sums, rtol=1e-5)
    np.testing.assert_array_equal(mixing.controller._excess.tokens, mixing.controller.totals.tokens)
    assert callback.sums.sum() > 0


def test_what_nothing_measures_is_refused(tiny_sample: Path) -> None:
    loader = tiny_loader(tiny_sample)
    with pytest.raises(UserError, match="'doge' needs an estimator of the sources' gradients"):
        OnlineMixing(controlled(loader, DoGEStrategy()))
    with pytest.raises(UserError, match="'doremi' needs a reference model"):
        OnlineMixing(controlled(loader, DoReMiStrategy()))


def test_a_reference_is_a_folder_or_a_checkpoint(tiny_sample: Path, tmp_path: Path, reference: Path) -> None:
    config = config_of(tiny_sample, "doremi", reference)
    config.model = MODEL
    tokenizer = build_tokenizer(config)
    model = build_causal_lm(MODEL, 512, seed=3)
    torch.save({"state": {"model": model.state_dict()}}, tmp_path / "run.pt")
    torch.save({"state": {"model": {}}}, tmp_path / "other.pt")
    for path in (reference, tmp_path / "run.pt"):
        built = build_reference(config, str(path), tokenizer, "fp32")
        for one, other in zip(built.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(UserError, match="found nothing at 'nowhere'"):
        build_reference(config, "nowhere", tokenizer, "fp32")
    with pytest.raises(UserError, match="expected a checkpoint of this run's model"):
        build_reference(config, str(tmp_path / "other.pt"), tokenizer, "fp32")
