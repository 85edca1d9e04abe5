"""What a run ran on: versions, processors, memory. Nothing that is secret, and nothing heavy is imported for it.

environment() -> dict[str, str]
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["PACKAGES", "environment", "processor"]

PACKAGES = (
    "cheapertraining",
    "torch",
    "mosaicml",
    "mosaicml-streaming",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "wandb",
    "plotly",
)


def environment() -> dict[str, str]:
    """Names and values for people: Python, packages, system, processors, memory, accelerators where torch is loaded."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    found["cpu"] = f"{processor()}, {len(_usable_cpus())} cores to use"
    if (memory := _memory()) is not None:
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    found |= _accelerators()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _memory() -> int | None:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _accelerators() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpu": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))}
