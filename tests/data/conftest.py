"""What the tests of the data package share."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Forty pieces of real text of a few hundred characters to a few thousand, from the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "csv", "enum"))
    pieces, start = [], 0
    for number in range(40):
        length = 200 + (number * 367) % 2600
        pieces.append(text[start : start + length])
        start += length
    return pieces


@pytest.fixture
def data_config(tiny_sample: Path) -> dict[str, Any]:
    """A data config over ``tiny_sample`` that probes ``topics``."""
    return {
        "local": str(tiny_sample),
        "seq_len": 32,
        "sources": {"code": {}, "docs": {}, "topics": {}},
        "probes": {"topics": {"source": "topics"}},
    }
