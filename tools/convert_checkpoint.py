"""A checkpoint of a run to a Hugging Face model folder, to a folder of shards, and back.

    python tools/convert_checkpoint.py runs/NAME/checkpoints/latest-rank0.pt models/NAME          # for transformers
    python tools/convert_checkpoint.py runs/NAME/checkpoints/ep0-ba100 ep0-ba100.pt --to composer   # shards to one file
    python tools/convert_checkpoint.py models/NAME weights --to dcp

What the input is (a file of a run, a folder of shards, a Hugging Face folder) is seen from its content. Between a file
and shards everything is kept: the run goes on from either. A Hugging Face folder has safetensors, config and tokenizer:
`train.py … model.name_or_path=models/NAME tokenizer.path=models/NAME` trains on from its weights. The output appears
whole or not at all. Files of runs are pickles: give none that came from elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cheapertraining.errors import UserError

FORMATS = ("hf", "composer", "dcp")


def main(arguments: list[str]) -> int:
    """Convert and return the exit code: 0, or 2 where the user can put something right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="the checkpoint")
    add("target", type=Path, help="a new file (composer) or folder (hf, dcp)")
    add("--to", choices=FORMATS, default="hf", help="format to write (default: %(default)s)")
    add("--config", type=Path, metavar="YAML", help="of the run, for hf; default: config.yaml two folders up")
    add("--tokenizer", type=Path, metavar="FOLDER", help="to take in, for hf; default: the run's")
    options = parser.parse_args(arguments)
    from cheapertraining.models.conversion import convert

    try:
        # The link to the latest checkpoint stands for what it names, by which the run's config is found.
        source = options.source.resolve() if options.source.is_symlink() else options.source
        print(convert(source, options.target, options.to, config=options.config, tokenizer=options.tokenizer))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
