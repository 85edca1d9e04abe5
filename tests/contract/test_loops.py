"""What other packages of a workspace import and call, as they do it: influence and training parts in plain loops.

What comes back is held against what their code does with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cheapertraining.errors import UserError
from tests.contract.calls import create

ROOT = Path(__file__).resolve().parents[2]


# ---- imports ---------------------------------------------------------------------------------------------------------
IMPORTS = """
from cheapertraining.data import (
    create_pretraining_dataloader,
    load_data_config,
    list_available_configs,
    create_dataloader,
    create_probe_dataloaders,
    get_dataset_weights_from_config,
    MixedDataset,
    PackedDataset,
    DatasetMixture,
    TokenPacker,
    batch_tokenize,
    compute_position_ids,
    get_loader,
    TokenizerWrapper,
    PretrainDataset,
    SFTDataset,
)
from cheapertraining.influence import (
    InfluenceTracker,
    create_influence_tracker,
    MixtureWeightCalculator,
    create_mixture_calculator,
    InfluenceConfig,
    InfluenceAwareOptimizer,
)
from cheapertraining import MixtureWeightCalculator, InfluenceAwareOptimizer, InfluenceConfig, MixedDataset
from cheapertraining import DataInfCalculator, DiscriminativeGradientExtractor
from cheapertraining.training import PlateauEarlyStopping, ZClip
from cheapertraining import DatasetMixture, PackedDataset, get_loader, create_mixture_calculator
import cheapertraining.mixing
import sys
print(*(name for name in ("composer", "transformers", "streaming") if name in sys.modules))
"""


def test_all_their_imports_work_and_bring_no_trainer() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_names_are_the_same_wherever_they_are_imported_from() -> None:
    import cheapertraining
    import cheapertraining.influence
    import cheapertraining.mixing

    for name in ("InfluenceAwareOptimizer", "InfluenceConfig", "MixtureWeightCalculator", "create_mixture_calculator"):
        assert getattr(cheapertraining, name) is getattr(cheapertraining.influence, name)
    assert all(hasattr(cheapertraining, name) for name in cheapertraining.__all__)
    assert all(hasattr(cheapertraining.influence, name) for name in cheapertraining.influence.__all__)
    for module in (cheapertraining, cheapertraining.influence):
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name  # noqa: B018  # asking is the point


# ---- influence -------------------------------------------------------------------------------------------------------
def test_a_loop_as_theirs_moves_the_mixture(
    tiny_sample: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    """Wired as in stage 2 and in fairy2: the first probe alone, `LambdaLR` behind the wrapper, weights for the log."""
    from cheapertraining import InfluenceAwareOptimizer, InfluenceConfig, MixtureWeightCalculator

    loader, mixed_dataset, probe_dataloaders = create(tiny_sample, tokenizer)
    settings = OmegaConf.create(
        {"enabled": True, "update_interval": 4, "learning_rate": 0.2, "config": {"lambda_val": 0.1}}
    )
    inf_config = InfluenceConfig(lambda_reg=settings.config.get("lambda_val", 1e-4))
    mixture_calc = MixtureWeightCalculator(
        model=model, probe_dataloader=next(iter(probe_dataloaders.values())), influence_config=inf_config
    )
    optimizer = InfluenceAwareOptimizer(
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, betas=(0.9, 0.95)),
        mixture_calculator=mixture_calc,
        mixed_dataset=mixed_dataset,
        update_interval=settings.get("update_interval", 1000),
        learning_rate=settings.get("learning_rate", 0.2),
        rank=0,
    )
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    data = iter(loader)
    for _ in range(60):
        batch = next(data)
        logits = model(batch["input_ids"])["logits"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert optimizer.__class__.__name__ == "InfluenceAwareOptimizer"
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert (optimizer._last_update_step, optimizer.update_interval) == (60, 4)
    logged = {f"influence/weight_{name}": w for name, w in optimizer.mixed_dataset.get_current_weights().items()}
    assert logged["influence/weight_code"] > 1 / 3 + 1e-3
    assert sum(logged.values()) == pytest.approx(1.0)


def test_create_influence_tracker(
    tiny_sample: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    from cheapertraining.influence import create_influence_tracker

    loader, mixed_dataset, probes = create(tiny_sample, tokenizer)
    section = {"enabled": True, "update_interval": 2, "learning_rate": 1.0, "warmup_steps": 4, "threshold": 0.0}
    config = OmegaConf.create({"influence": section})
    tracker = create_influence_tracker(config, model, mixed_dataset, probes)
    tracker.on_train_begin()
    for step, _ in enumerate(islice(loader, 6), start=1):
        tracker.on_step_end(step, torch.tensor(1.0))
    tracker.on_epoch_end(0)
    tracker.on_train_end()
    assert [entry["step"] for entry in tracker.get_weight_history()] == [4, 6]
    moved = {**tracker.get_weight_history()[-1]}
    assert moved.pop("step") == 6
    assert tracker.get_current_weights() == moved == mixed_dataset.get_current_weights()
    assert max(moved.values()) > 0.34
    again = create_influence_tracker(config, model, mixed_dataset, probes)
    again.load_state_dict(tracker.state_dict())
    assert again.state_dict() == tracker.state_dict()


def test_tracker_is_off_unless_it_is_enabled(model: LlamaForCausalLM) -> None:
    from cheapertraining.influence import create_influence_tracker

    for config in ({}, {"influence": {"enabled": False}}, {"influence": {"enabled": True}}):
        tracker = create_influence_tracker(config, model, None, None)
        tracker.on_step_end(10_000)
        assert (tracker.is_enabled, tracker.get_current_weights(), tracker.get_weight_history()) == (False, {}, [])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"method": "distillation"}, "metric: expected one of raw, adam, .* found 'distillation'"),
        ({"samples_per_dataset": 1000}, "Use 'source_samples'"),
        ({"jvp_layers": 4}, "no setting is named 'jvp_layers'"),
        ({"metric": "adam"}, "needs the optimizer, which the tracker does not see"),
        ({"update_interval": 0}, "influence.update_interval: expected at least 1"),
    ],
)
def test_tracker_refuses_what_it_does_not_do(
    tiny_sample: Path,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    section: dict[str, Any],
    message: str,
) -> None:
    from cheapertraining.influence import create_influence_tracker

    _, mixed_dataset, probes = create(tiny_sample, tokenizer)
    with pytest.raises(UserError, match=message):
        create_influence_tracker({"influence": {"enabled": True, **section}}, model, mixed_dataset, probes)


def test_stage_3_is_told_what_is_wrong(model: LlamaForCausalLM) -> None:
    """It passes keys that mean nothing here, and a calculator where the model belongs; each is said in a line."""
    from cheapertraining import DiscriminativeGradientExtractor, InfluenceConfig, MixtureWeightCalculator

    with pytest.raises(UserError, match=r"no setting is named 'lambda_val' .* Use 'lambda_reg'"):
        InfluenceConfig(lambda_val=0.1, gamma_val=0.1, temperature=1.0)
    extractor = DiscriminativeGradientExtractor(model, InfluenceConfig())
    with pytest.raises(UserError, match=r"expected a torch\.nn\.Module, found DiscriminativeGradientExtractor"):
        MixtureWeightCalculator(extractor)


def test_gradients_of_samples_are_those_of_autograd(model: LlamaForCausalLM, tiny_sample: Path) -> None:
    from cheapertraining import DiscriminativeGradientExtractor, get_loader
    from cheapertraining.influence.model_access import sample_losses

    extractor = DiscriminativeGradientExtractor(model)
    batch = get_loader(tiny_sample / "data.yaml").mixture.draw("docs", 3, key=0)
    found = extractor.compute_per_sample_gradients(batch)
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert found.shape == (3, extractor.gradient_dim) == (3, sum(weight.numel() for weight in weights))
    assert all(parameter.grad is None for parameter in model.parameters())
    for row in range(3):
        sums, _ = sample_losses(model.eval(), {name: part[row : row + 1] for name, part in batch.items()})
        expected = torch.autograd.grad(sums.sum(), weights)
        torch.testing.assert_close(found[row], torch.cat([part.flatten() for part in expected]), atol=1e-6, rtol=1e-4)


# ---- training --------------------------------------------------------------------------------------------------------
def test_early_stopping_and_clipping_as_stage_2_uses_them(model: LlamaForCausalLM, tmp_path: Path) -> None:
    from cheapertraining.training import PlateauEarlyStopping, ZClip

    stopper = PlateauEarlyStopping(patience=2, min_delta=0.01, mode="min", min_evals=3, enabled=True, rank=0)
    zclip = ZClip(z_threshold=3.0, ema_decay=0.99)
    ids = torch.arange(32)[None]
    for step in range(30):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        stats = zclip.clip(model)
        assert isinstance(stats.raw_norm, float)
        assert stats.clipped_norm <= stats.raw_norm
        assert not stats.was_clipped
        if stopper.check(1.0, step):
            break
    assert step == 2
    assert (stopper.enabled, stopper.patience, stopper.min_delta) == (True, 2, 0.01)
    again = PlateauEarlyStopping(patience=2, min_delta=0.01, mode="min", min_evals=3, enabled=True, rank=0)
    again.load_state_dict(stopper.state_dict())
    assert (again.best, again.wait) == (1.0, 2)
    stopper.save_json(tmp_path)
    assert (tmp_path / "early_stopping.json").is_file()
    assert zclip.ema_mean is None  # they log moments only where there are some
