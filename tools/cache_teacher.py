"""Write what a teacher says about every token of shards, once, for any number of students and runs.

    python tools/cache_teacher.py --teacher runs/teacher/checkpoints/latest-rank0.pt --shards data/sample/*/train \\
        --out data/sample-teacher --processes 2

    composer train.py yamls/distill.yaml algorithms.distillation.cache=data/sample-teacher

By default 50 tokens are drawn at each position and stored with their counts (37 bytes a token where 12 of them are
distinct); --kind top_k stores the k most probable with their log-probabilities and what the others have together. The
teacher is a Hugging Face folder, or a checkpoint of one of your own runs; checkpoints are pickles, so give none that
came from elsewhere. A run that was stopped in any way goes on with the same command and --resume; the files are the
same, byte for byte, for any number of processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.convert_text import exit_code


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="PATH", help="a model folder or a checkpoint (….pt)")
    add("--shards", nargs="+", type=Path, required=True, metavar="FOLDER", help="shard folders, or folders of such")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the cache: FOLDER/<source>/<split>")
    add("--kind", default="sampled", metavar="sampled|top_k", help="default: %(default)s")
    add("--size", type=int, metavar="N", help="draws a position, up to 63 (default: 50); or k (default: 12)")
    add("--temperature", type=float, default=1.0, help="of what is stored, and of training (default: %(default)s)")
    add("--drawing", default="systematic", metavar="systematic|multinomial", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="rows in a pass (default: %(default)s)")
    add("--dtype", default="float32", metavar="float32|bfloat16|float16", help="default: %(default)s")
    add("--quantization", metavar="8bit|4bit", help="of the teacher's weights (CUDA, bitsandbytes)")
    add("--processes", type=int, default=1, help="that share the work (default: %(default)s)")
    add("--device", metavar="cpu|cuda", help="default: the GPU where there is one")
    add("--resume", action="store_true", help="go on with what was begun, and leave alone what is finished")
    add("--overwrite", action="store_true", help="begin anew where something is already")


def run(given: argparse.Namespace) -> None:
    """Write the cache and say what came of it."""
    from cheapertraining.distillation.caching import CacheJob, cache_teacher

    report = cache_teacher(CacheJob(**vars(given)))
    rate = report.rows / max(report.seconds, 1e-9)
    print(
        f"{given.out}: {report.samples:,} rows, {report.positions:,} tokens with targets, "
        f"{report.entries / max(report.positions, 1):.1f} ids and {report.bytes_per_token:.1f} bytes each; "
        f"{report.rows:,} rows in {report.seconds:.1f} s ({rate:,.1f}/s)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write: 0, 2 on bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    given = parser.parse_args(arguments)
    return exit_code("cache_teacher", lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
