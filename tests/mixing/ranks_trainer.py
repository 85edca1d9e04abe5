"""A short mixing run on this rank of several, as a script for the launcher: SAMPLE_FOLDER OUTPUT_FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from composer.utils import dist

from cheapertraining.influence import SourceEstimator
from cheapertraining.mixing import Constraints, InfluenceStrategy, MixtureController, OnlineMixing
from tests.observe.tiny_trainer import tiny_loader, tiny_trainer


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
    (folder / name).write_text(json.dumps(mixing.state_dict()))


if __name__ == "__main__":
    main()
