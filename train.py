"""The front door: `composer train.py yamls/mixed_pretrain.yaml [key=value …]`; `python train.py …` is one process."""

from __future__ import annotations

import sys

from cheapertraining.commands.train import USAGE, main

__all__ = ["USAGE", "main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
