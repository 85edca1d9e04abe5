"""Every strategy in a plain loop: it gets its signals, decides, and resumes exactly; what it misses is said."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cheapertraining.data import get_loader
from cheapertraining.errors import UserError
from cheapertraining.influence import InfluenceAwareOptimizer
from cheapertraining.mixing import (
    ADOStrategy,
    AioliStrategy,
    DoGEStrategy,
    DoGETargetStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    MatchingStrategy,
    MixtureWeightCalculator,
    ODMStrategy,
    PiKEStrategy,
    ProportionalStrategy,
    RnBStrategy,
    ScheduleStrategy,
    SkillItStrategy,
    Strategy,
    create_influence_tracker,
)
from tests.influence.plain_run import EVEN, tiny_model

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ado": ADOStrategy,
    "aioli": lambda: AioliStrategy(hold=1),
    "doge": DoGEStrategy,
    "doge towards probes": lambda: DoGETargetStrategy(mu=1e-3),
    "doremi": DoReMiStrategy,
    "grape": lambda: GRAPEStrategy(mu_weights=1e-3),
    "odm": ODMStrategy,
    "pike": lambda: PiKEStrategy(tilt=0.5),
    "matching": MatchingStrategy,
    "rnb": lambda: RnBStrategy(temperature=1e-2),
    "schedule": lambda: ScheduleStrategy([{"batch": 0, "weights": {"code": 1, "docs": 1}}]),
    "skillit": SkillItStrategy,
}


class Loop:
    """A plain loop with an optimizer that updates every second step."""

    def __init__(self, sample: Path, strategy: Strategy) -> None:
        torch.manual_seed(0)
        self.loader = get_loader(sample / "data.yaml", batch_size=6, lag=2, seed=5)
        self.model = tiny_model()
        settings = {"source_samples": 2, "probe_samples": 4, "scorer": "hook", "kl_step": None}
        self.calculator = MixtureWeightCalculator(
            self.model,
            probe_dataloaders=self.loader.probes,
            influence_config=settings,
            strategy=strategy,
            reference=tiny_model() if strategy.name == "doremi" else None,
        )
        inner = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.optimizer = InfluenceAwareOptimizer(inner, self.calculator, self.loader.mixture, 2, 1.0)
        self.losses = dict.fromkeys(EVEN, 0.0)

    def train(self, steps: int) -> None:
        self.model.eval()  # Without dropout, whose random numbers a resumed loop would have to restore.
        for batch in islice(self.loader, steps):
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
            found = self.model(**inputs, use_cache=False)
            self.calculator.record(batch, found.logits)
            for row, source in enumerate(batch["source"].tolist()):
                loss = torch.nn.functional.cross_entropy(
                    found.logits[row, :-1], batch["labels"][row, 1:], ignore_index=-100, reduction="sum"
                )
                self.losses[self.loader.mixture.source_names[source]] += float(loss)
            found.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("name", STRATEGIES)
def test_decides_and_resumes_exactly(name: str, tiny_sample: Path) -> None:
    loop = Loop(tiny_sample, STRATEGIES[name]())
    loop.train(5)
    weights = copy.deepcopy(loop.model.state_dict())
    state = json.loads(json.dumps(loop.calculator.state_dict(), allow_nan=False))
    state_dict = copy.deepcopy(loop.optimizer.state_dict())
    loop.train(7)
    controller = loop.calculator.controller
    assert any(decision.from_batch is not None for decision in controller.history)
    assert state["controller"]["strategy"]["name"] == controller.strategy.name
    loop.calculator.state_dict()  # Takes in what was recorded last.
    for source, (loss, _) in controller.totals.by_name(controller.source_names).items():
        assert loss == pytest.approx(loop.losses[source], rel=1e-5)
    again = Loop(tiny_sample, STRATEGIES[name]())
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(state_dict)
    again.train(7)
    again.calculator.state_dict()
    assert again.calculator.controller.state_dict() == controller.state_dict()
    for one, other in zip(again.model.parameters(), loop.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_strategy_that_looks_at_nothing_holds_from_the_first_batch(tiny_sample: Path) -> None:
    loader = get_loader(tiny_sample / "data.yaml", batch_size=6, lag=2)
    calculator = MixtureWeightCalculator(tiny_model(), strategy=ProportionalStrategy())  # No probe is needed.
    calculator.attach(loader.mixture)
    total = math.fsum(loader.mixture.available_tokens.values())
    assert loader.mixture.weights_at(0)["code"] == pytest.approx(
        loader.mixture.available_tokens["code"] / total, abs=1e-6
    )


def test_what_is_missing_is_said(tiny_sample: Path) -> None:
    loader, model = get_loader(tiny_sample / "data.yaml", batch_size=6, lag=2), tiny_model()
    calculator = MixtureWeightCalculator(model, strategy=ODMStrategy())
    calculator.attach(loader.mixture)
    before = loader.mixture.get_current_weights()
    with pytest.raises(UserError, match=r"'odm' looks at training losses, .*record\(batch, logits\)"):
        calculator.update()
    assert loader.mixture.get_current_weights() == before
    with pytest.raises(UserError, match="expected 'source' in the batch, found labels"):
        calculator.record({"labels": torch.zeros(1, 2, dtype=torch.int64)}, torch.zeros(1, 2, 512))
    with pytest.raises(UserError, match="expected the model that the strategy compares with"):
        MixtureWeightCalculator(model, strategy=DoReMiStrategy())
    with pytest.raises(UserError, match="found neither"):
        MixtureWeightCalculator(model, strategy=AioliStrategy())


def test_the_tracker_takes_a_strategy(tiny_sample: Path) -> None:
    loader, model = get_loader(tiny_sample / "data.yaml", batch_size=6, lag=2), tiny_model()
    config: dict[str, Any] = {"influence": {"enabled": True, "update_interval": 1, "warmup_steps": 0, "scorer": "hook"}}
    tracker = create_influence_tracker(config, model, loader.mixture, strategy=RnBStrategy(temperature=1e-2))
    next(iter(loader))
    tracker.on_step_end(1)
    assert len(tracker.get_weight_history()) == 1
    assert tracker.get_current_weights() != pytest.approx(EVEN, abs=1e-3)
