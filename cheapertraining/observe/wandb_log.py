"""Weights & Biases, such that a wrong key is told at once and a lost network costs a run minutes at most.

key_trouble(os.environ) -> KeyTrouble | None                 # does the server take the key?
WandbLog(project, entity, mode="online", folder=run_folder)  # Trainer(loggers=[...])
"""

from __future__ import annotations

import atexit
import base64
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from composer.core import State
from composer.loggers import Logger, WandBLogger
from composer.utils import dist

from cheapertraining.errors import UserError
from cheapertraining.observe.credentials import wandb_key, wandb_server

__all__ = ["ONLINE", "KeyTrouble", "WandbLog", "key_trouble"]

ONLINE = ("online", "run", "shared")
"""Modes in which W&B's client talks to a server."""

# How long W&B's client tries again before it gives up sending; what it could not send is in its file all the same, for
# `wandb sync`. By its own settings it tries for hours: once its queue of some thousand records is full, logging, and so
# training, stands still, and a run does not end. With these, an outage of 90 seconds is bridged, one that is longer
# ends the sending, and the end of a run is delayed by two minutes (refused) to five (nothing answers) at most.
RETRIES: dict[str, float] = {
    "_file_stream_retry_max": 8,
    "_file_stream_retry_wait_min_seconds": 1,
    "_file_stream_retry_wait_max_seconds": 20,
    "_file_stream_timeout_seconds": 20,
    "_graphql_retry_max": 4,
    "_graphql_retry_wait_min_seconds": 1,
    "_graphql_retry_wait_max_seconds": 8,
    "_graphql_timeout_seconds": 10,
    "_file_transfer_retry_max": 4,
    "_file_transfer_retry_wait_min_seconds": 1,
    "_file_transfer_retry_wait_max_seconds": 8,
}


@dataclass(frozen=True)
class KeyTrouble:
    """Why a run cannot be online.

    Attributes:
        refused: the server does not know the key; otherwise there was no answer that says so or not.
        what: the reason, with server and place of the key, but without the key.
        cure: what to do.
    """

    refused: bool
    what: str
    cure: str


def key_trouble(environment: Mapping[str, str], timeout: float = 10.0) -> KeyTrouble | None:
    """Ask the server, once, whose the key is.

    Args:
        environment: with a key, or with a home whose netrc has one.
        timeout: seconds to wait for an answer.
    """
    server, found = wandb_server(environment), wandb_key(environment)
    assert found is not None, "asked for without a key"
    key, place = found
    page = "https://wandb.ai/authorize" if server == "https://api.wandb.ai" else f"{server}/authorize"
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    question = json.dumps({"query": "{viewer {username}}"}).encode()
    refused = KeyTrouble(True, f"{server} does not take the key of {place}", f"get one at {page}")
    try:
        with urlopen(Request(f"{server}/graphql", question, headers), timeout=timeout) as answer:
            return None if json.load(answer)["data"]["viewer"] else refused
    except HTTPError as error:
        if error.code == 401:
            return refused
        reason = f"HTTP {error.code}"
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        reason = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
    return KeyTrouble(False, f"{server} gives no answer to go by ({reason})", "look at the network and WANDB_BASE_URL")


class WandbLog(WandBLogger):
    """Composer's logger for W&B, which begins on all ranks or on none, and asks nothing of a server while one trains.

    It prints where the charts are when it is online and nothing when it is not.

    Args:
        project, entity: where the run goes; None: W&B's default.
        mode: as ``wandb.init`` takes it.
        folder: of the run; the files are in ``<folder>/wandb``.
    """

    def __init__(self, project: str | None, entity: str | None, mode: str, folder: Path) -> None:
        import wandb

        self.online = online = mode in ONLINE
        # Its summary of all metrics would push the table of the mixture off the screen. Without the third, a table that
        # is logged offline waits for a server that is not there.
        settings = wandb.Settings(quiet=True, silent=not online, allow_offline_artifacts=online, **RETRIES)
        if dist.get_global_rank() == 0:
            wandb.setup(settings)  # or its first lines come before the settings are known
        start: dict[str, Any] = {"mode": mode, "dir": str(folder), "settings": settings}
        super().__init__(project=project, entity=entity, init_kwargs=start)

    def init(self, state: State, logger: Logger) -> None:
        """Begin the run, as Composer does but that no rank waits for a first one that failed.

        Raises:
            UserError: on all ranks; W&B did not take it.
        """
        import wandb

        told = ["", "", ""]  # entity, project, what went wrong
        if self._enabled:
            try:
                run = wandb.init(**{"name": state.run_name} | self._init_kwargs)
                told = [str(getattr(run, what, "disabled")) for what in ("entity", "project")] + [""]
                self.run_dir, self.run_url = run.dir, run.get_url()
            except wandb.errors.Error as error:
                told[2] = str(error).strip().rstrip(".")
            atexit.register(self._set_is_in_atexit)
        dist.broadcast_object_list(told)
        self.entity, self.project, trouble = told
        if trouble:
            raise UserError(
                f"loggers.wandb: W&B did not begin the run ({trouble}). Look at loggers.wandb.entity and project and "
                "at what the key may do, or use loggers.wandb.mode=offline."
            )
        if self._enabled and self.online:
            # What the server can do is asked for with the first picture, and tried for a year; the answer is kept.
            wandb.api.max_cli_version()  # type: ignore[no-untyped-call]

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Log a table as an offline run does: a file of the run, which the client's own process sends.

        The artifact that W&B would make of it besides, when it is online, is asked for in the training's own time.
        """
        if not (self._enabled and self.online):
            super().log_table(columns, rows, name, step)
            return
        import wandb

        assert wandb.run is not None
        table = wandb.Table(columns=columns, rows=rows)  # type: ignore[no-untyped-call]
        table.bind_to_run(  # type: ignore[no-untyped-call]
            wandb.run, name, wandb.run.step if step is None else step
        )
        wandb.log({name: table}, step=step)
