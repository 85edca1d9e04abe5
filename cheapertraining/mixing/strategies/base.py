"""What strategies without memory share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Stateless"]

_VERSION = 1


class Stateless:
    """State of a strategy that decides from its settings and the signals alone: none."""

    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take over: the settings are the run's own."""
