"""Does the mixture adapt, and does it help? The main run with strategy influence against static, and two controls.

    python tools/bench/adaptation.py [key=value ...] [--seeds 17 18 19] [--out runs/adaptation]
    python tools/bench/adaptation.py --null
    python tools/bench/adaptation.py --rigged

The first needs the embedded sample (`make sample`). It runs `train.py yamls/mixed_pretrain.yaml` for each seed with
both strategies for the same number of batches, and prints the held-out loss of the probe's source, that of all other
sources, the weights at the end, and whether every source was used; about ten minutes a seed on two cores. With
influence the loss on the target is to be lower.

The controls make their own shards from the standard library, train a small model and decide 100 times, a few minutes a
seed. `--null`: sources are random parts of one text, so whatever chance says the weights are to stay within 10 % of
even. `--rigged`: one source is the probe's text, the others are damaged text; the one is to get more than half of the
weight.

Can be stopped at any time: runs that are finished in `--out` are not run again, others go on from their checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheapertraining.config import load_run_config, resolved_yaml

ROOT = Path(__file__).resolve().parents[2]
MIXING = "algorithms.online_mixing"
STRATEGIES = ("static", "influence")
UPDATES, INTERVAL, WARMUP = 100, 5, 20
TEXT_BYTES, NULL_SOURCES, SEQ_LEN = 6_000_000, 4, 128
NULL_LIMIT, RIGGED_GOAL = 0.10, 0.5
SMALL_MODEL = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
VOCAB = 2048
NEVER = "1000000000ba"  # between start and end


@dataclass(frozen=True)
class Result:
    """What a finished run has left on disk.

    Attributes:
        summary: its ``summary.json``.
        course: at each decision or log, the batches trained and the newest weights by source.
    """

    summary: dict[str, Any]
    course: list[tuple[int, dict[str, float]]]

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        sources: dict[str, dict[str, Any]] = self.summary["sources"]
        return sources

    def heldout(self, names: list[str]) -> float:
        """Mean held-out loss of these sources at the end."""
        return statistics.fmean(self.sources[name]["loss_after"] for name in names)


def run(out: Path, name: str, overrides: list[str]) -> Result:
    """Train ``out/name`` with yamls/mixed_pretrain.yaml and these overrides, unless that is done already."""
    folder = out / name
    run_yaml = str(ROOT / "yamls" / "mixed_pretrain.yaml")
    overrides = [f"run_name={name}", f"save_folder={out}", "autoresume=true", "loggers.wandb=null", *overrides]
    config, saved = load_run_config(run_yaml, overrides), folder / "config.yaml"
    if saved.exists() and saved.read_text() != resolved_yaml(config):
        raise SystemExit(f"{folder}: a run with other settings. Use another --out, or remove it.")
    if not (folder / "summary.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"{name}.log"
        print(f"{folder}: training, see {log}", flush=True)
        with log.open("a") as output:
            command = [sys.executable, str(ROOT / "train.py"), run_yaml, *overrides]
            code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            raise SystemExit(f"{folder}: training failed, exit code {code}:\n{log.read_text()[-3000:]}")
    prefix = "mixture/weight/"
    course = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        weights = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
        if weights:
            course.append((int(record["step"]), weights))
    return Result(json.loads((folder / "summary.json").read_text()), course)


def percent(weights: dict[str, float]) -> str:
    heaviest = sorted(weights, key=lambda name: -weights[name])
    return "  ".join(f"{name} {100 * weights[name]:.1f}" for name in heaviest)


def compare_strategies(out: Path, seeds: list[int], overrides: list[str]) -> None:
    """Print, for each seed and in the mean, what influence does against static weights."""
    # Every held-out row counts in the figures, and nothing between start and end is needed for them.
    overrides = ["eval_loader.subset_num_batches=-1", f"eval_loader.interval={NEVER}", *overrides]
    results = {
        (strategy, seed): run(out, f"{strategy}-{seed}", [f"seed={seed}", f"{MIXING}.strategy={strategy}", *overrides])
        for seed in seeds
        for strategy in STRATEGIES
    }
    probes = load_run_config("mixed_pretrain", overrides).data.probes.values()
    targets = [probe.source for probe in probes if probe.source is not None]
    some = next(iter(results.values()))
    others = [name for name in some.sources if name not in targets]
    differences: dict[str, list[float]] = {}
    for title, names in ((f"target ({', '.join(targets)})", targets), (f"mean of {', '.join(others)}", others)):
        print(f"\nheld-out loss, {title}\n  seed      static  influence  difference")
        rows = [[results[strategy, seed].heldout(names) for strategy in STRATEGIES] for seed in seeds]
        differences[title] = [influence - static for static, influence in rows]
        for seed, (static, influence) in zip(seeds, rows, strict=True):
            print(f"  {seed:5d}  {static:9.4f}  {influence:9.4f}  {influence - static:+10.4f}")
        static, influence = (statistics.fmean(column) for column in zip(*rows, strict=True))
        print(f"   mean  {static:9.4f}  {influence:9.4f}  {influence - static:+10.4f}")
    print("\nweights at the end with influence, percent")
    for seed in seeds:
        print(f"  {seed:5d}  {percent({n: s['weight_end'] for n, s in results['influence', seed].sources.items()})}")
    tokens = {result.summary["tokens"] for result in results.values()}
    unused = sorted({name for result in results.values() for name, s in result.sources.items() if not s["tokens"]})
    print(f"\ntokens of each run: {', '.join(f'{n:,}' for n in sorted(tokens))}" + ", the same" * (len(tokens) == 1))
    print(f"sources that a run did not use: {', '.join(unused) or 'none'}")
    lower = sum(difference < 0 for difference in next(iter(differences.values())))
    print(f"influence is lower on the target for {lower} of {len(seeds)} seeds")


def control_shards(folder: Path, kind: str, size: int) -> Path:
    """Shards of a control from ``size`` bytes of text, made once; returns its data yaml, which is written last."""
    from tools.bench._shards import library_texts, write_sources
    from tools.sample.noise import KINDS

    path = folder / "data.yaml"
    if path.exists():
        return path
    texts = library_texts(size)
    if kind == "null":
        sources = {f"part{i}": texts[i::NULL_SOURCES] for i in range(NULL_SOURCES)}
        return write_sources(folder, sources, "part0", vocab_size=VOCAB, seq_len=SEQ_LEN)
    sources = {"target": texts}
    for number, damage in enumerate(KINDS):
        mine = texts[number :: len(KINDS)]
        sources[damage.__name__] = [damage(text, random.Random(f"{number}/{i}")) for i, text in enumerate(mine)]
    return write_sources(folder, sources, "target", vocab_size=VOCAB, seq_len=SEQ_LEN)


def run_control(out: Path, kind: str, seed: int, size: int, overrides: list[str]) -> Result:
    """A small model, and as many decisions as the control allows."""
    data = control_shards(out / f"{kind}-shards", kind, size)
    return run(
        out,
        f"{kind}-{seed}",
        [
            f"seed={seed}",
            f"compose.data={data}",
            f"max_duration={WARMUP + UPDATES * INTERVAL}ba",
            f"{MIXING}.strategy=influence",
            f"{MIXING}.interval={INTERVAL}ba",
            f"{MIXING}.warmup={WARMUP}ba",
            *(f"model.{name}={value}" for name, value in SMALL_MODEL.items()),
            f"eval_loader.interval={NEVER}",
            *overrides,
        ],
    )


def null_control(out: Path, seeds: list[int], size: int, overrides: list[str]) -> None:
    """Print how far the weights strayed from even."""
    print(f"null control: {NULL_SOURCES} random parts of one text; largest distance from even weights, relative")
    for seed in seeds:
        course = run_control(out, "null", seed, size, overrides).course
        distances = [max(abs(weight * len(weights) - 1) for weight in weights.values()) for _, weights in course]
        verdict = "yes" if max(distances) <= NULL_LIMIT else "NO"
        print(
            f"  {seed:5d}  at any time {max(distances):.1%}, at the end {distances[-1]:.1%}; "
            f"within {NULL_LIMIT:.0%}: {verdict}   {percent(course[-1][1])}",
            flush=True,
        )


def rigged_control(out: Path, seeds: list[int], size: int, overrides: list[str]) -> None:
    """Print when the source that is the probe's text got more than half of the weight."""
    print("rigged control: one source is the probe's text, the others are damaged text; weight of the one")
    for seed in seeds:
        course = run_control(out, "rigged", seed, size, overrides).course
        first = next((step for step, weights in course if weights["target"] > RIGGED_GOAL), None)
        updates = None if first is None else (first - WARMUP) // INTERVAL + 1
        print(
            f"  {seed:5d}  at the end {course[-1][1]['target']:.1%}; more than {RIGGED_GOAL:.0%} "
            f"{'NEVER' if updates is None else f'after {updates} updates'}   {percent(course[-1][1])}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "adaptation", help="(default: runs/adaptation)")
    parser.add_argument("--null", action="store_true", help="sources are random parts of one text")
    parser.add_argument("--rigged", action="store_true", help="one source is the probe's text, the others are noise")
    parser.add_argument("--text-bytes", type=int, default=TEXT_BYTES, help="of the controls (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the run")
    given = parser.parse_args()
    out, overrides = given.out.resolve(), given.overrides
    if given.null:
        null_control(out, given.seeds, given.text_bytes, overrides)
    if given.rigged:
        rigged_control(out, given.seeds, given.text_bytes, overrides)
    if not (given.null or given.rigged):
        compare_strategies(out, given.seeds, overrides)


if __name__ == "__main__":
    main()
