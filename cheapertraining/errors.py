"""One kind of error for what a user can put right: a yaml key, a shard, a checkpoint, a tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


class UserError(ValueError):
    """Bad input. The message names the file or key, what was expected, what was found and what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises what its worker raised anew, with the worker's traceback put before the message.
        super().__init__(message.rsplit(f"{__name__}.UserError: ", 1)[-1].rstrip())


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the option closest to ``name``, or ``""`` where none is close."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
