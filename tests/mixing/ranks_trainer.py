"""A short mixing run on this rank of several, as a script: SAMPLE_FOLDER OUTPUT_FOLDER."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.utils import dist

from cheapertraining.influence import ProbeBank, SourceEstimator
from cheapertraining.influence.scorers.gram import GradientEstimator
from cheapertraining.mixing import (
    GRAM,
    PROBE_LOSSES,
    REFERENCE,
    Constraints,
    InfluenceStrategy,
    MixtureController,
    OnlineMixing,
    Signals,
    SourceInfo,
)
from cheapertraining.mixing.signals import Array
from cheapertraining.models import build_causal_lm
from tests.observe.tiny_trainer import MODEL, tiny_loader, tiny_trainer


class Told:
    """Wishes for nothing, and keeps what it was told."""

    name = "told"
    needs = frozenset({GRAM, PROBE_LOSSES, REFERENCE})

    def reset(self, sources: Sequence[SourceInfo], prior: Array, horizon_tokens: int) -> None:
        self.signals: dict[str, Any] = {}

    def propose(self, signals: Signals) -> None:
        assert signals.gradients is not None
        assert signals.probe_losses is not None
        assert signals.excess_losses is not None
        found = {
            "products": signals.gradients.products,
            "variances": signals.gradients.variances,
            "probe_losses": signals.probe_losses.losses,
            "excess_losses": signals.excess_losses,
            "losses": signals.losses,
        }
        self.signals = {name: values.tolist() for name, values in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None is kept."""


def told_signals(sample: Path, folder: Path) -> dict[str, Any]:
    """The signals of the decision after three batches, through Composer."""
    loader, strategy = tiny_loader(sample), Told()
    controller = MixtureController(loader.mixture, strategy, Constraints(floor=0.05), 3, 3, 10**6)
    mixing = OnlineMixing(
        controller,
        gradients=GradientEstimator(loader.mixture, 3),
        probes=ProbeBank(loader.probes, samples=5),
        reference=build_causal_lm(MODEL, 512, seed=3),
    )
    trainer = tiny_trainer(loader, folder, 3, algorithms=[mixing], save_folder=None)
    trainer.state.device_train_microbatch_size = 6
    trainer.fit()
    return strategy.signals


def main() -> None:
    sample, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if dist.get_world_size() > 1:
        dist.initialize_dist("cpu")
    loader = tiny_loader(sample)
    controller = MixtureController(
        loader.mixture, InfluenceStrategy(threshold=0.0), Constraints(floor=0.05, kl_step=0.5), 3, 3, 10**6
    )
    estimator = SourceEstimator(loader.mixture, loader.probes, probe_samples=5, source_samples=3)
    mixing = OnlineMixing(controller, estimator, ledger_path=folder / "ledger.jsonl")
    trainer = tiny_trainer(loader, folder, 7, algorithms=[mixing], save_folder=None)
    trainer.state.device_train_microbatch_size = 6
    trainer.fit()
    name = f"{dist.get_global_rank()}of{dist.get_world_size()}.json"
    state = mixing.state_dict()
    trainer.close()  # type: ignore[no-untyped-call]
    (folder / name).write_text(json.dumps(state | {"told": told_signals(sample, folder / "told")}))


if __name__ == "__main__":
    main()
