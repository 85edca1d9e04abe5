"""A W&B workspace for a project of runs: panels in the groups of docs/metrics.md.

    python tools/wandb_dashboard.py --project cheapertraining --dry-run       prints the panels, touches no network
    python tools/wandb_dashboard.py --project cheapertraining --entity TEAM   saves the workspace, prints its address
    … --run runs/mine                                                         only panels that this run has numbers for

Without --run the panels are those of a plain run whose mixture moves by influence. Needs a key (`wandb login`) unless
--dry-run, and the extra `dashboard` (pip install 'cheapertraining[dashboard]').
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from cheapertraining.errors import UserError
from cheapertraining.observe.credentials import has_wandb_key
from cheapertraining.observe.vocabulary import GROUPS, VOCABULARY

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        group: a key of ``GROUPS``.
        title: of the panel.
        regex: of the metrics in it, RE2; of ``media`` and ``table`` the one key.
        kind: how it is drawn.
        needs: what a run must have for it; None: every run with influence mixing has it.
        log_y: logarithmic.
    """

    group: str
    title: str
    regex: str
    kind: Literal["lines", "area", "media", "table"] = "lines"
    needs: Literal["distillation", "cuda", "influence_scores", "generations", "gradients"] | None = None
    log_y: bool = False


_DISTILLATION = {
    "Divergence and losses": "^distillation/(total|cross_entropy|divergence|kl|hidden|relations)$",
    "Agreement of student and teacher": "^distillation/(agreement|acceptance)$",
    "Entropy of teacher and student": "^distillation/(teacher|student)_entropy$",
    "Share of the divergence, temperature": "^distillation/(alpha|temperature)$",
    "Distillation by source": "^distillation/[^/]+/.+$",
}


def panels() -> list[Panel]:
    """All panels there are, in the order of the vocabulary's groups."""
    of = {entry.pattern: entry.wandb_regex for entry in VOCABULARY}
    return [
        Panel("loss", "Training loss", of["loss/train/total"]),
        Panel("loss", "Training loss by source", of["loss/train/{source}"]),
        Panel("loss", "Held-out loss by source", "^metrics/heldout/.+/TokenCrossEntropy$"),
        Panel("loss", "Loss on the probes", "^metrics/probe/.+/TokenCrossEntropy$"),
        Panel("mixture", "What batches are drawn with", of["mixture/sampled/{source}"], "area"),
        Panel("mixture", "Newest weights", of["mixture/weight/{source}"]),
        Panel("mixture", "Weights in the training loss", of["mixture/objective/{source}"]),
        Panel("mixture", "Share of all tokens so far", of["mixture/share/{source}"], "area"),
        Panel("mixture", "Tokens by source", of["mixture/tokens/{source}"]),
        Panel("mixture", "Passes over each source", of["mixture/epochs/{source}"]),
        Panel("mixture", "Tokens left of each source", of["mixture/tokens_left/{source}"]),
        Panel("mixture", "Mixture over batches", "pictures/mixture", "media"),
        Panel("influence", "Influence of sources on probes", of["mixture/score/{direction}/{source}"]),
        Panel("influence", "Standard errors of influence", of["mixture/score_se/{direction}/{source}"]),
        Panel("influence", "Last influence matrix", "pictures/influence", "media"),
        Panel("influence", "Probe loss at decisions", of["mixture/probe_loss/{probe}"]),
        Panel("influence", "Weights of probes at decisions", of["mixture/probe_weight/{probe}"]),
        Panel("influence", "Predicted and realized change of the probe loss", "^fidelity/.+$"),
        Panel("influence", "Squared gradient norms", of["mixture/gradient_norm2/{source}"], needs="gradients"),
        Panel("influence", "Gradient variances", of["mixture/gradient_variance/{source}"], needs="gradients"),
        Panel("influence", "Influence of trained samples", "^influence/score/.+$", needs="influence_scores"),
        Panel("influence", "Their standard errors", "^influence/score_se/.+$", needs="influence_scores"),
        Panel("influence", "Influence summed over the run", "^influence/total/.+$", needs="influence_scores"),
        Panel("influence", "Probe loss of the directions", "^influence/probe_loss/.+$", needs="influence_scores"),
        *(Panel("distillation", title, regex, needs="distillation") for title, regex in _DISTILLATION.items()),
        Panel("speed", "Tokens per second", of["throughput/tokens_per_sec"]),
        Panel("speed", "Samples and batches per second", "^throughput/(samples|batches)_per_sec$"),
        Panel("speed", "Share of time: algorithms, waiting for data", "^([a-z]+/overhead|time/data_wait)$"),
        Panel("speed", "FLOP per second", of["throughput/flops_per_sec"]),
        Panel("speed", "By device", "^throughput/device/.+$"),
        Panel("speed", "Main memory", of["memory/host_peak"]),
        Panel("speed", "Memory of the GPU", "^memory/(current|peak|alloc)_.+$", needs="cuda"),
        Panel("speed", "Hours", "^time/(train|val|total)$"),
        Panel("optimization", "Norm of the gradient, before clipping", of["gradient/norm"], log_y=True),
        Panel("optimization", "Norm of the weights", of["weight/norm"]),
        Panel("optimization", "Learning rate", "^lr-.+$"),
        Panel("optimization", "Loss spikes and numbers that are not finite", "^event/.+$"),
        Panel("optimization", "Rows per forward pass", of["trainer/device_train_microbatch_size"]),
        Panel("progress", "Tokens, samples, batches", "^time/(token|sample|batch)(_in_epoch)?$|^time/epoch$"),
        Panel("progress", "What the model writes", "generations", "table", needs="generations"),
    ]


def chosen(names: Sequence[str] | None) -> list[Panel]:
    """Those that every run fills; with the ``names`` that a run has logged, those that it fills."""
    if names is None:
        return [panel for panel in panels() if panel.needs is None]
    drawn = [panel for panel in panels() if panel.kind in ("lines", "area")]
    filled = [panel for panel in drawn if any(re.search(panel.regex, name) for name in names)]
    influence = any(name.startswith("mixture/score/") for name in names)
    pictures = [panel for panel in panels() if panel.kind == "media" and (influence or panel.group != "influence")]
    return sorted(filled + pictures, key=panels().index)


def workspace(project: str, entity: str, wanted: Sequence[Panel]) -> ws.Workspace:
    """The workspace as W&B's library has it; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    sections = []
    for group, question in GROUPS.items():
        own = [_drawn(panel) for panel in wanted if panel.group == group]
        if own:
            sections.append(ws.Section(name=f"{group}: {question}", panels=own, is_open=group != "progress"))
    return ws.Workspace(entity=entity, project=project, name="CheaperTraining", sections=sections)


def _drawn(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "media":
        return wr.MediaBrowser(title=panel.title, media_keys=[panel.regex])
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.regex)
    kind = "pct-area" if panel.kind == "area" else "line"
    return wr.LinePlot(title=panel.title, metric_regex=panel.regex, plot_type=kind, log_y=panel.log_y)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print or save; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="cheapertraining", help="default: %(default)s, as loggers.wandb.project")
    parser.add_argument("--entity", default="", help="user or team; default: that of the key")
    parser.add_argument("--run", metavar="RUN", help="folder of a run whose log says which panels there are")
    parser.add_argument("--dry-run", action="store_true", help="print the panels as JSON and send nothing")
    given = parser.parse_args(arguments)
    try:
        names = None
        if given.run is not None:
            from cheapertraining.observe.run_folder import read_run

            names = list(read_run(given.run).metrics)
        wanted = chosen(names)
        if given.dry_run:
            print(json.dumps({"project": given.project, "panels": [asdict(panel) for panel in wanted]}, indent=2))
            return 0
        print(_save(given.project, given.entity, wanted))
    except UserError as error:
        print(f"wandb_dashboard: {error}", file=sys.stderr)
        return 2
    return 0


def _save(project: str, entity: str, wanted: Sequence[Panel]) -> str:
    from cheapertraining.observe.wandb_log import key_trouble

    if not has_wandb_key(os.environ):
        raise UserError("no key for W&B was found. Get one with `wandb login`; --dry-run shows the panels without one.")
    if (trouble := key_trouble(os.environ)) is not None:  # W&B's client would try for half a minute
        raise UserError(f"{trouble.what}: {trouble.cure}. --dry-run shows the panels without a network.")
    try:
        import wandb

        made = workspace(project, entity or wandb.Api().default_entity, wanted)
        made.save()
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'cheapertraining[dashboard]'.") from error
    except Exception as error:  # W&B's client raises of many kinds: no key, wrong key, no network, no such project
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"W&B did not take the workspace ({reason}). Check the key (`wandb login`), --entity, and that the project "
            "has a run; --dry-run shows the panels without a network."
        ) from error
    return str(made.url)


if __name__ == "__main__":
    sys.exit(main())
