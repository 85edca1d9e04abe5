"""What does training on each sample do to the loss on a probe? Shards and a model in, a parquet file of scores out.

    python tools/score_influence.py --model runs/NAME/checkpoints/latest-rank0.pt --shards shards/wiki/train \\
        --probe code=shards/code/probe --estimator ekfac --out scores.parquet --processes 4

    python tools/score_influence.py … --resume --select top_fraction=0.2 --probe-column code --select-out shards/best

Positive scores help. A row has source, sample_id, tokens, loss and a column for each probe. A run that was stopped in
any way goes on with the same command and --resume; the file is the same, byte for byte, for any number of processes.
The model is a Hugging Face folder, or a checkpoint of one of your own runs with the run's config.yaml two folders up;
checkpoints are pickles, so give none that came from elsewhere. With several models scores are averaged (TracIn).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cheapertraining.errors import UserError
from cheapertraining.influence.offline import ESTIMATORS, LoadedModel, ScoringJob, score_shards
from tools.convert_text import exit_code

if TYPE_CHECKING:
    import torch
    from torch import nn


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add = parser.add_argument
    add("--model", nargs="+", type=Path, required=True, metavar="PATH", help="model folders or checkpoints (….pt)")
    add("--shards", nargs="+", type=Path, required=True, metavar="FOLDER", help="shard folders, or folders of such")
    add("--probe", action="append", default=[], metavar="NAME=FOLDER", help="a probe's shard folder; may be repeated")
    add("--probes-from", metavar="YAML", help="take the probes of a data yaml")
    add("--out", type=Path, required=True, metavar="FILE.parquet", help="the scores")
    add("--estimator", default="dot", metavar="|".join(ESTIMATORS), help="default: %(default)s")
    add("--scorer", default="hook", metavar="hook|forward", help="exact; or by forward passes (default: %(default)s)")
    add("--layers", nargs="+", default=["all"], metavar="PATTERN", help="all, embedding_and_output, last_K, or globs")
    add("--by", default="sample", metavar="sample|document|source", help="what gets a score (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="rows in a pass (default: %(default)s)")
    add("--processes", type=int, default=1, help="that share the work (default: %(default)s)")
    add("--fit-samples", type=int, default=256, help="rows that curvature is fitted on (default: %(default)s)")
    add("--rank", type=int, default=8, help="of logra's projection, per side (default: %(default)s)")
    add("--seed", type=int, default=0, help="of logra's projection (default: %(default)s)")
    add("--damping", type=float, default=0.1, help="of logra, a share of the mean eigenvalue (default: %(default)s)")
    add("--store", type=Path, metavar="FOLDER", help="keep logra's gradients there, for other probes")
    add("--store-dtype", default="float32", metavar="float32|float16", help="of the store (default: %(default)s)")
    add("--device", metavar="cpu|cuda", help="default: the GPU where there is one")
    add("--resume", action="store_true", help="go on with what was begun, or leave alone what is finished")
    add("--overwrite", action="store_true", help="begin anew where something is already")
    add("--select", metavar="top_fraction=X|threshold=X", help="write the best samples as new shards")
    add("--probe-column", metavar="NAME", help="the scores to select by (default: the only probe)")
    add("--select-out", type=Path, metavar="FOLDER", help="of the new shards: FOLDER/<source>/<split>")


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """A model in float32 from a Hugging Face folder or a checkpoint of a run.

    Raises:
        UserError: neither, unreadable, or a checkpoint of another model than its config.yaml says.
    """
    from cheapertraining.config import ModelConfig
    from cheapertraining.models import build_causal_lm
    from cheapertraining.models.saved import load_checkpointed

    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model: expected a folder with config.json, or a checkpoint (….pt), found {path}.")
        wrapped, state = build_causal_lm(ModelConfig(name_or_path=str(path)), 0), None
    elif path.is_file():
        wrapped, state = load_checkpointed(path)
    else:
        raise UserError(f"--model: expected a model folder or a checkpoint, found nothing at {path}.")
    model = wrapped.to(device)
    optimizer = None if state is None else _optimizer(model, state)
    # Parameters are called as in the model's own files, unless it needs the wrapper to keep documents apart.
    inner: nn.Module = model.model if model.isolation == "positions" else model
    vocabulary = int(model.model.get_input_embeddings().weight.shape[0])
    return LoadedModel(inner.eval(), vocabulary, model.max_positions, optimizer)


def _optimizer(model: nn.Module, state: dict[str, Any]) -> torch.optim.Optimizer | None:
    """The run's optimizer with its state, whose keys are names of parameters; None where it keeps no moments."""
    import torch

    saved = next(iter(state.get("optimizers", {}).values()), None)
    if saved is None or not any("exp_avg_sq" in each for each in saved["state"].values()):
        return None
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in group["params"]], "betas": group["betas"], "eps": group["eps"]}
        for group in saved["param_groups"]
    ]
    optimizer = torch.optim.AdamW(groups)
    for name, moments in saved["state"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    return optimizer


def probes_of(given: argparse.Namespace) -> dict[str, Path]:
    """Shard folders by probe, of the yaml first.

    Raises:
        UserError: a name twice, no folder, or shards that have not been downloaded.
    """
    found: dict[str, Path] = {}
    if given.probes_from:
        from cheapertraining.config import load_data_config
        from cheapertraining.data.loader import shard_folders

        for name, folder in shard_folders(load_data_config(given.probes_from))[1].items():
            if folder.remote is not None and not (folder.local / "index.json").is_file():
                raise UserError(f"--probes-from: probe '{name}' is not at {folder.local}. Copy {folder.remote} there.")
            found[name] = folder.local
        if not found:
            raise UserError(f"--probes-from: expected a data yaml with probes, found none in {given.probes_from}.")
    for text in given.probe:
        name, separator, folder_name = text.partition("=")
        if not (name and separator and folder_name):
            raise UserError(f"--probe: expected NAME=FOLDER, found '{text}'.")
        if name in found:
            raise UserError(f"--probe: expected each name once, found '{name}' twice.")
        found[name] = Path(folder_name)
    return found


def run(given: argparse.Namespace) -> None:
    """Score, perhaps select, and say what came of it."""
    from cheapertraining.influence.offline.choose import Rule, select_shards

    rule = Rule(given.select) if given.select else None
    if (rule is None) != (given.select_out is None):
        raise UserError("--select, --select-out: expected both or none, found one. Name what to take and where to.")
    job = ScoringJob(
        models=given.model,
        shards=given.shards,
        probes=probes_of(given),
        out=given.out,
        estimator=given.estimator,
        scorer=given.scorer,
        layers=given.layers[0] if len(given.layers) == 1 else tuple(given.layers),
        by=given.by,
        batch_size=given.batch_size,
        processes=given.processes,
        fit_samples=given.fit_samples,
        rank=given.rank,
        seed=given.seed,
        store=given.store,
        store_dtype=given.store_dtype,
        damping=given.damping,
        device=given.device,
        resume=given.resume,
        overwrite=given.overwrite,
    )
    column = given.probe_column or job.columns[0]
    if rule is not None and given.probe_column is None and len(job.columns) > 1:
        raise UserError(f"--probe-column: expected one of {', '.join(job.columns)} to select by, found none. Name it.")
    if rule is not None and job.by != "sample":
        raise UserError(f"--select: expected --by sample, found --by {job.by}. Whole rows are what can be taken.")
    report = score_shards(job, load_model)
    rate = report.samples / max(report.seconds, 1e-9)
    print(f"{job.out}: {report.rows:,} rows; {report.samples:,} samples in {report.seconds:.1f} s ({rate:,.1f}/s)")
    if rule is not None:
        chosen = select_shards(
            job.out, job.shards, rule, column, given.select_out, resume=job.resume, overwrite=job.overwrite
        )
        counts = ", ".join(f"{name} {count:,}" for name, count in chosen.items())
        print(f"{given.select_out}: {sum(chosen.values()):,} samples with {rule} by '{column}' ({counts})")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and score: 0, 2 on bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    given = parser.parse_args(arguments)
    return exit_code("score_influence", lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
