"""What a student gains from a teacher at equal tokens, and when that pays.

    python tools/bench/distillation_worth.py [--seeds 0 1 2] [--out runs/distillation_worth] [--ideas]
    python tools/bench/distillation_worth.py --pays

The first needs the embedded sample (`make sample`): real text of three sources, with a vocabulary of 1,024 made for
it. A teacher is trained by cross-entropy, then students on the same batches: by cross-entropy alone, from the live
teacher (forward KL), from cached top-12 with and without tail, and from 50 cached draws a token. Printed for each:
held-out loss, expected calibration error, acceptance of its drafts by the teacher, the share of the gap between
cross-entropy and live KL that it recovers, and the tokens after which it has the loss that cross-entropy ends with.
`--ideas` adds what else was tried for sampled targets. About 20 CPU-minutes; what is done stays in `--out`.

`--pays` says when distillation costs less than cross-entropy alone for the same loss, with the teacher's passes
counted, from the tokens saved in the runs; `--share`, `--student`, `--teacher`, `--tokens`, `--students` and
`--teacher-tokens` set numbers of your own.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

VARIANTS = ("ce", "live", "top12+tail", "top12", "sampled50")
IDEAS = ("sampled12", "sampled63", "multinomial50", "sampled50-alpha1", "sampled50-T2")
LABELS = {
    "ce": "cross-entropy alone",
    "live": "live teacher, forward KL",
    "top12+tail": "cached top-12 with tail",
    "top12": "cached top-12, renormalized",
    "sampled50": "cached, 50 systematic draws",
    "sampled12": "cached, 12 systematic draws",
    "sampled63": "cached, 63 systematic draws",
    "multinomial50": "cached, 50 independent draws",
    "sampled50-alpha1": "50 systematic draws, alpha 1",
    "sampled50-T2": "50 systematic draws, T = 2",
}


def variants() -> dict[str, Any]:
    """All ways to train, by name."""
    from tools.bench._worth_runs import Variant

    sampled = Variant("sampled", 50)
    return {
        "ce": Variant("none", alpha=0.0),
        "live": Variant("live"),
        "top12+tail": Variant("top_k", 12),
        "top12": Variant("top_k", 12, renormalize=True),
        "sampled50": sampled,
        "sampled12": replace(sampled, size=12),
        "sampled63": replace(sampled, size=63),
        "multinomial50": replace(sampled, drawing="multinomial"),
        "sampled50-alpha1": replace(sampled, alpha=1.0),
        "sampled50-T2": replace(sampled, temperature=2.0),
    }


def tokens_to(course: list[tuple[int, float]], loss: float) -> float:
    """Tokens after which a held-out loss is reached, straight between evaluations; infinite where it is not."""
    before = (0, math.inf)
    for tokens, found in course:
        if found <= loss:
            if math.isinf(before[1]):
                return float(tokens)
            return before[0] + (tokens - before[0]) * (before[1] - loss) / (before[1] - found)
        before = (tokens, found)
    return math.inf


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table(results: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Lines of a markdown table: means over seeds with standard errors, paired by seed where something is compared."""
    lines = [
        "| targets | held-out loss | gap recovered | calibration error | acceptance | KL to teacher | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone, live = results["ce"], results["live"]
    for name, by_seed in results.items():
        cells = [LABELS[name]]
        loss, error = mean_error([found["loss"] for found in by_seed.values()])
        cells.append(f"{loss:.4f} ± {error:.4f}")
        gaps = [(alone[s]["loss"] - by_seed[s]["loss"]) / (alone[s]["loss"] - live[s]["loss"]) for s in by_seed]
        gap, error = mean_error(gaps)
        cells.append("0 %" if name == "ce" else "100 %" if name == "live" else f"{gap:.0%} ± {error:.0%}")
        for key, percent in (("ece", True), ("acceptance", True), ("kl", False)):
            value, error = mean_error([found[key] for found in by_seed.values()])
            cells.append(f"{value:.2%} ± {error:.2%}" if percent else f"{value:.3f} ± {error:.3f}")
        share, error = mean_error([saved(alone[seed], found) for seed, found in by_seed.items()])
        cells.append(f"{share:.0%} ± {error:.0%}" if math.isfinite(share) else "not reached")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def saved(alone: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of cross-entropy's tokens after which ``other`` has cross-entropy's final loss."""
    return tokens_to(other["course"], alone["course"][-1][1]) / alone["course"][-1][0]


def report_worth(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Print the table, and whether the goal is met."""
    print("\n".join(table(results)))
    one = next(iter(results["ce"].values()))
    print(f"\nteacher's held-out loss {one['teacher_loss']:.4f}; {one['course'][-1][0]:,} tokens a student")
    pairs = results["sampled50"].items()
    ce, live = results["ce"], results["live"]
    gaps = [(ce[s]["loss"] - found["loss"]) / (ce[s]["loss"] - live[s]["loss"]) for s, found in pairs]
    gap = statistics.fmean(gaps)
    print(f"sampled targets recover {gap:.0%} of the gap; the goal of 95 % is {'met' if gap >= 0.95 else 'missed'}")


def report_pays(given: argparse.Namespace, results: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Print what distillation costs for the loss that cross-entropy reaches."""
    from tools.bench._worth_pays import Plan, pays

    shares = {"given": given.share} if given.share else {}
    for name, by_seed in ({} if given.share else results).items():
        if name != "ce":
            shares[name] = statistics.fmean(saved(results["ce"][seed], found) for seed, found in by_seed.items())
    for name, share in shares.items():
        if not share < 1:
            print(f"{name}: does not pay: cross-entropy's final loss took {share:.0%} of its tokens or was not reached")
            continue
        for cached in (False, True) if name == "given" else (name != "live",):
            print(f"{name}: {share:.0%} of the tokens, {'cached' if cached else 'live'}")
            for students in sorted({1, given.students, 10}):
                plan = Plan(
                    given.student,
                    given.teacher,
                    given.tokens,
                    share,
                    students=students,
                    cached=cached,
                    teacher_tokens=given.teacher_tokens,
                )
                print(f"  {students} student(s): {pays(plan)}")


def main() -> None:
    """Parse the command line; run, or reckon."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/distillation_worth"), help="default: %(default)s")
    add("--sample", type=Path, default=Path("data/sample"), help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--ideas", action="store_true", help="also what else was tried for sampled targets")
    add("--batches", type=int, help="of each student, for a quick look")
    add("--teacher-batches", type=int, help="likewise of the teacher")
    add("--pays", action="store_true", help="when distillation pays")
    add("--share", type=float, help="of cross-entropy's tokens that distillation needs, in place of the measured ones")
    add("--student", type=float, default=1e8, help="parameters (default: %(default)g)")
    add("--teacher", type=float, default=1e9, help="parameters (default: %(default)g)")
    add("--tokens", type=float, default=1e10, help="of cross-entropy alone (default: %(default)g)")
    add("--students", type=int, default=1, help="that learn from it (default: %(default)s)")
    add("--teacher-tokens", type=float, default=0.0, help="to train the teacher on first (default: it is there)")
    given = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {}
    if not (given.pays and given.share):
        results = measure(given)
    if given.pays:
        report_pays(given, results)
    else:
        report_worth(results)


def measure(given: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of all runs, by name and seed."""
    from cheapertraining.influence.offline.workers import limited_threads

    with limited_threads():
        return _measure(given)


def _measure(given: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    from tools.bench._worth_runs import Scale, make_data, make_teacher, run

    scale = Scale()
    if given.batches:
        scale = replace(scale, batches=given.batches, every=max(1, given.batches // 10))
    if given.teacher_batches:
        scale = replace(scale, teacher_batches=given.teacher_batches)
    data = make_data(given.out, given.sample, scale)
    make_teacher(given.out, data, scale)
    names = VARIANTS + (IDEAS if given.ideas else ())
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for seed in given.seeds:
        for name in names:
            results[name][seed] = run(given.out, data, name, variants()[name], seed, scale)
            found = results[name][seed]
            print(f"seed {seed} {name}: loss {found['loss']:.4f}, {found['seconds']:.0f} CPU-seconds", flush=True)
    return results


if __name__ == "__main__":
    main()
