"""A run that is online when it begins, and whose network is gone after its third batch.

python lost_network.py RUN.yaml KEY [KEY=VALUE ...]
"""

from __future__ import annotations

import os
import sys
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from wandb_server import WandbServer

from cheapertraining.commands.train import main
from cheapertraining.observe import wandb_log
from cheapertraining.training import run

# Seconds of a test instead of minutes of a run.
wandb_log.RETRIES |= {name: 2 for name in wandb_log.RETRIES if name.endswith("_max")}
wandb_log.RETRIES |= {name: 0.5 for name in wandb_log.RETRIES if name.endswith(("min_seconds", "max_seconds"))}


class Vanish(Callback):
    """Take the server away."""

    def __init__(self, server: WandbServer) -> None:
        self.server = server

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 3:
            self.server.vanish()


if __name__ == "__main__":
    with WandbServer(sys.argv[2]) as server:
        os.environ["WANDB_BASE_URL"] = server.url
        build_callbacks = run.build_callbacks

        def with_vanishing(*arguments: Any) -> list[Callback]:
            return [*build_callbacks(*arguments), Vanish(server)]

        run.build_callbacks = with_vanishing
        code = main([sys.argv[1], *sys.argv[3:]])
    sys.exit(code)
