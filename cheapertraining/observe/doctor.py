"""Is this machine fit to train on? Versions, processors, memory, disk, shared memory, keys; each fault with its cure.

    cheapertraining doctor [--folder runs]

Keys are looked for and never printed. Exit code 1 where something will not work.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from cheapertraining.observe.credentials import credentials
from cheapertraining.observe.environment import environment

__all__ = ["Finding", "examine", "main"]

Level = Literal["ok", "note", "fault"]
_GIB = 2**30
_LEAST_DISK = 10 * _GIB
_LEAST_SHARED = _GIB
_LEAST_FILES = 4096
_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``note`` may be in the way of some runs, ``fault`` is in the way of all.
        what: was looked at.
        found: there.
        cure: what to do; "" where nothing is to be done.
    """

    level: Level
    what: str
    found: str
    cure: str = ""


def examine(folder: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything.

    Args:
        folder: where runs are kept, or the next folder above that exists.
        environ: environment variables.
    """
    yield _python()
    yield from _packages()
    yield from _processors()
    yield _disk(folder)
    yield from _shared_memory()
    yield from _open_files()
    yield _own_name()
    yield from _variables(environ)
    for service, there in credentials(environ).items():
        yield Finding("ok", f"key for {service}", "present" if there else "none", "" if there else _WITHOUT[service])
    yield _sample()


_WITHOUT = {
    "Weights & Biases": "runs log offline; `wandb login` sends them",
    "S3": "needed for s3:// shards alone: AWS_ACCESS_KEY_ID or `aws configure`",
    "Google Cloud Storage": "needed for gs:// shards alone: GOOGLE_APPLICATION_CREDENTIALS",
    "Hugging Face": "needed for gated data sets alone: `huggingface-cli login`",
}


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] < (3, 13):
        return Finding("ok", "python", found)
    return Finding("fault", "python", found, "expected 3.10, 3.11 or 3.12: make clean, then make install PYTHON=…")


def _packages() -> Iterator[Finding]:
    """Every package that this one requires, in a version that it accepts."""
    wrong = []
    checked = 0
    for line in requires("cheapertraining") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        checked += 1
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} (none)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} (expected {requirement.specifier})")
    if wrong:
        yield Finding("fault", "packages", ", ".join(wrong), "make install, or pip install -e . in the checkout")
    else:
        yield Finding("ok", "packages", f"{checked} required, all there")


def _processors() -> Iterator[Finding]:
    import torch

    found = environment()  # with torch loaded it knows of accelerators
    yield Finding("ok", "cpu", found["cpu"])
    if "memory" in found:
        yield Finding("ok", "memory", found["memory"])
    if "gpu" in found:
        yield Finding("ok", "gpu", f"{found['gpu']}, CUDA {torch.version.cuda}")
        if not torch.cuda.is_bf16_supported():
            yield Finding("note", "gpu", "no bfloat16", "precision=amp_fp16, or fp32")
    elif shutil.which("nvidia-smi"):
        cure = f"the driver is older than torch's CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides the devices"
        yield Finding("note", "gpu", "there is a driver, but torch finds no device", cure)
    else:
        yield Finding("ok", "gpu", "none: runs use the CPU (device=auto)")


def _disk(folder: Path) -> Finding:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / _GIB:.1f} GiB free in {there}"
    if not os.access(there, os.W_OK):
        return Finding("fault", "disk", f"{there} cannot be written to", "save_folder=…, somewhere you may write")
    if free < _LEAST_DISK:
        return Finding("note", "disk", text, "a checkpoint has 12 bytes a parameter; save_num_checkpoints_to_keep=1")
    return Finding("ok", "disk", text)


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    usage = shutil.disk_usage(place)
    text = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < _LEAST_SHARED:
        cure = "loader workers share batches there: docker run --shm-size=8g, or train_loader.num_workers=0"
        yield Finding("note", "shared memory", text, cure)
    else:
        yield Finding("ok", "shared memory", text)


def _open_files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < soft < _LEAST_FILES:
        yield Finding("note", "open files", str(soft), f"with many sources and workers: ulimit -n {2 * _LEAST_FILES}")
    else:
        yield Finding("ok", "open files", str(soft))


def _own_name() -> Finding:
    """Processes of one machine find each other by its name."""
    name = socket.gethostname()
    try:
        return Finding("ok", "host name", f"is {socket.gethostbyname(name)}")
    except OSError:
        cure = "several processes on it: put the name into /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
        return Finding("note", "host name", "has no address", cure)


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    mode = environ.get("WANDB_MODE")
    if mode and mode not in _MODES:
        yield Finding("fault", "WANDB_MODE", repr(mode), f"expected one of {', '.join(_MODES)}, or unset it")
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", threads):
        yield Finding("fault", "OMP_NUM_THREADS", repr(threads), "expected a whole number, or unset it")
    if "RANK" in environ and "WORLD_SIZE" not in environ:
        cure = "left over from a launcher: unset RANK, or start with `composer`"
        yield Finding("fault", "RANK", "set without WORLD_SIZE", cure)


def _sample() -> Finding:
    if Path("data/sample/data.yaml").is_file():
        return Finding("ok", "sample", "data/sample")
    return Finding("ok", "sample", "not made yet", "make sample (17 seconds), for yamls/mixed_pretrain.yaml")


def main(arguments: list[str] | None = None) -> int:
    """Print what there is, faults with their cure; 1 where something will not work."""
    parser = argparse.ArgumentParser(
        prog="cheapertraining doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are kept (default: %(default)s)")
    given = parser.parse_args(arguments)
    findings = []
    for finding in examine(given.folder, os.environ):
        findings.append(finding)
        print(_line(finding, _painter()), flush=True)
    faults = sum(finding.level == "fault" for finding in findings)
    notes = sum(finding.level == "note" for finding in findings)
    print(f"{faults} faults, {notes} notes" if faults or notes else "Nothing is in the way.")
    return 1 if faults else 0


def _painter() -> Callable[[str, str], str]:
    coloured = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return lambda text, code: f"\033[{code}m{text}\033[0m" if coloured else text


def _line(finding: Finding, paint: Callable[[str, str], str]) -> str:
    mark = {"ok": paint("ok   ", "32"), "note": paint("note ", "33"), "fault": paint("FAULT", "1;31")}[finding.level]
    cure = f"\n        → {finding.cure}" if finding.cure else ""
    return f"{mark} {finding.what}: {finding.found}{cure}"


if __name__ == "__main__":
    sys.exit(main())
