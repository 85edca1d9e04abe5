"""A run in cells, as in a notebook: Composer's Trainer with the package's parts in hand, no yaml.

    python examples/composer_notebook.py [--batches 40]        the sample (first: make sample)

Editors that know `# %%` run it cell by cell. The parts are those that `train.py` builds from a yaml.
"""

# %% What to train on, and for how long
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator

from cheapertraining.config import ModelConfig
from cheapertraining.data import get_loader, read_meta
from cheapertraining.influence import SourceEstimator
from cheapertraining.mixing import Constraints, InfluenceStrategy, MixtureController, OnlineMixing
from cheapertraining.models import build_causal_lm
from cheapertraining.observe import ConsoleLines, JsonlLogger, MixtureCourse, MixtureSummary, RunHealth
from cheapertraining.observe.report import write_report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="mixed_pretrain", help="data config (default: %(default)s, the sample)")
parser.add_argument("--batches", type=int, default=40)
parser.add_argument("--folder", type=Path, default=Path("runs/notebook"))
args = parser.parse_args()

# %% Data: the loader has the mixture, the probes and the held-out splits beside it
BATCH, INTERVAL = 16, 10
loader = get_loader(args.data, batch_size=BATCH, lag=2, seed=17)
mixture = loader.mixture
print(mixture.source_names, mixture.get_current_weights())

# %% A small Llama
sizes = ModelConfig(hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4, num_kv_heads=2)
vocab_size = read_meta(mixture.store.folders[0].local).vocab_size
model = build_causal_lm(sizes, vocab_size, seed=17)

# %% What moves the mixture: measure, wish, constrain
probes = dict.fromkeys(loader.probes, 1.0)
controller = MixtureController(
    mixture,
    InfluenceStrategy(learning_rate=1.0),
    Constraints(floor=0.01, kl_step=0.5),
    interval=INTERVAL,
    warmup=INTERVAL,
    horizon_tokens=args.batches * BATCH * mixture.seq_len,
)
estimator = SourceEstimator(mixture, loader.probes, probes, probe_samples=8, source_samples=4)
mixing = OnlineMixing(controller, estimator, ledger_path=args.folder / "mixture.jsonl")

# %% Train
evaluators = [
    Evaluator(label=f"heldout/{name}", dataloader=split, metric_names=["TokenCrossEntropy"], subset_num_batches=1)
    for name, split in loader.heldout.items()
]
trainer = Trainer(
    model=model,
    train_dataloader=DataSpec(
        loader,
        get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
        get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel(),
    ),
    eval_dataloader=evaluators,
    eval_interval=f"{INTERVAL}ba",
    optimizers=torch.optim.AdamW(model.parameters(), lr=5e-3),
    algorithms=[mixing],
    callbacks=[ConsoleLines(mixture), RunHealth(), MixtureCourse(mixture), MixtureSummary(mixture, args.folder)],
    loggers=[JsonlLogger(args.folder)],
    max_duration=f"{args.batches}ba",
    device_train_microbatch_size=BATCH,
    progress_bar=False,
    run_name=args.folder.name,
)
trainer.eval()
trainer.fit()
trainer.close()

# %% Look
print("decisions:", [(decision.batch, decision.from_batch) for decision in controller.history])
print(write_report(args.folder))
