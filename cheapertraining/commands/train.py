"""What `composer train.py RUN.yaml [key=value …]` and `cheapertraining train` run, on every process."""

from __future__ import annotations

import os
import sys

__all__ = ["USAGE", "main"]

USAGE = """usage: composer [-n PROCESSES] train.py RUN.yaml [key=value ...]
       cheapertraining train [-n PROCESSES] RUN.yaml [key=value ...]

Trains what RUN.yaml describes. Any of its keys can be set on the command line, e.g. optimizer.lr=1e-3;
compose.data=NAME takes in yamls/data/NAME.yaml. Start with yamls/mixed_pretrain.yaml, which explains the keys.
"""


def main(arguments: list[str]) -> int:
    """Run and return the exit code: 0, or 2 where the user can put something right (said in a line on stderr)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    first, processes = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    # Composer, torch and transformers take seconds to import; what is wrong with the config is said before.
    from cheapertraining.config import check_batch_size, check_prepared, load_run_config
    from cheapertraining.errors import UserError

    begun = False
    try:
        config = load_run_config(arguments[0], arguments[1:])
        check_batch_size(config, processes)
        check_prepared(config.data)
        if first:
            print(f"{arguments[0]}: {len(config.data.sources)} sources, {config.max_duration}. Starting …", flush=True)
            from cheapertraining.observe.startup import startup_lines

            for line in startup_lines(config, processes):
                print(line, flush=True)
        from cheapertraining.training import train

        begun = True
        train(config)
    except UserError as error:
        if first or begun:  # what is wrong with the config, every rank finds; what goes wrong later, perhaps one alone
            print(f"{error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
