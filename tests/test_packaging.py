"""The wheel carries the yamls, and a uv workspace member that depends on the package finds the checkout's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import requires
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = sysconfig.get_path("purelib")
PRINT_CONFIG = """
import cheapertraining
from cheapertraining.config import load_data_config
print(cheapertraining.__file__)
print(*load_data_config("mixed_pretrain").sources)
"""
WORKSPACE = """
[project]
name = "workspace"
version = "0"
requires-python = ">=3.10,<3.13"

[tool.uv.workspace]
members = ["packages/*"]
"""
MEMBER = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "member"
version = "0"
requires-python = ">=3.10,<3.13"
dependencies = ["cheapertraining"]

[tool.uv.sources]
cheapertraining = { workspace = true }
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that must not need the network; what it printed."""
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**outside, "UV_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _copy_of_the_project(folder: Path) -> Path:
    """What a checkout holds of the package, without the environment, sample and runs that lie beside it here."""
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("cheapertraining", "yamls", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    project = _copy_of_the_project(folder / "project")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=project)
    (built,) = folder.glob("cheapertraining-*.whl")
    return built


def test_wheel_holds_the_package_every_yaml_and_the_tools_and_nothing_else(wheel: Path) -> None:
    def files(folder: str, pattern: str) -> set[str]:
        return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}

    expected = files("cheapertraining", "*.py") | files("cheapertraining", "py.typed")
    expected |= {f"cheapertraining/{name}" for name in files("yamls", "*.yaml")}
    of_the_checkout = ("tools/bench/", "tools/sample/", "tools/prepare_sample.py")
    tools = {name for name in files("tools", "*.py") if not name.startswith(of_the_checkout)}
    expected |= {f"cheapertraining/scripts/{name}" for name in tools}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert packed == expected
    assert "cheapertraining/yamls/data/mixed_pretrain.yaml" in packed
    assert licenses


def test_data_config_loads_from_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    printed = _run(sys.executable, "-c", PRINT_CONFIG, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    where, sources = printed.splitlines()
    assert Path(where) == tmp_path / "site" / "cheapertraining" / "__init__.py"
    assert "math" in sources.split()
    command = (sys.executable, "-m", "cheapertraining.commands.cli", "report", "--help")
    helped = _run(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert helped.startswith("usage: cheapertraining report")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A uv workspace with this package as one member and another member that depends on it."""
    folder = tmp_path / "workspace"
    _copy_of_the_project(folder / "packages" / "cheapertraining")
    (folder / "pyproject.toml").write_text(WORKSPACE, encoding="utf-8")
    (folder / "packages" / "member" / "member").mkdir(parents=True)
    (folder / "packages" / "member" / "member" / "__init__.py").touch()
    (folder / "packages" / "member" / "pyproject.toml").write_text(MEMBER, encoding="utf-8")
    return folder


def test_workspace_member_resolves_to_the_workspace_package(workspace: Path) -> None:
    """uv takes the package from the workspace; its dependencies are those that this environment has already."""
    uv = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)
    plan = _run(*uv, "--dry-run", "--no-build-isolation", "./packages/member", cwd=workspace)
    installed = {line.split()[1].split("==")[0]: line for line in plan.splitlines() if line.startswith(" + ")}
    assert set(installed) == {"cheapertraining", "member"}
    assert f"file://{workspace}/packages/cheapertraining" in installed["cheapertraining"]


def test_editable_install_finds_the_yamls_of_the_checkout(workspace: Path) -> None:
    """As after `uv sync`, which installs members editable; here over the dependencies of this environment."""
    _run(sys.executable, "-m", "uv", "venv", "--python", sys.executable, ".venv", cwd=workspace)
    python = workspace / ".venv" / "bin" / "python"
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=workspace).strip()
    (Path(site) / "dependencies.pth").write_text(SITE_PACKAGES + "\n", encoding="utf-8")
    install = (sys.executable, "-m", "uv", "pip", "install", "--python", python, "--no-deps", "--no-build-isolation")
    _run(*install, "-e", "packages/cheapertraining", "./packages/member", cwd=workspace)
    where, sources = _run(python, "-c", "import member" + PRINT_CONFIG, cwd=workspace).splitlines()
    assert Path(where) == workspace / "packages" / "cheapertraining" / "cheapertraining" / "__init__.py"
    assert "math" in sources.split()
    assert not (Path(site) / "cheapertraining").exists()


def test_lock_pins_every_dependency_with_hashes_and_names_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert all(re.match(r"[a-z0-9-]+==\S+( ; .*)? \\$", pin) for pin in pins)
    others = [line for line in lines if line and line not in pins and not line.startswith("#")]
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in others)
    for line, following in pairwise(lines):
        assert line not in pins or "--hash=" in following
    # Other libraries that a benchmark compares with, and a browser's driver, are no part of the set-up.
    needed = [each for each in requires("cheapertraining") or [] if not re.search(r"extra == .(bench|browser).", each)]
    names = {re.split(r"[<>=!~ ;\[]", requirement)[0] for requirement in needed}
    assert {"mosaicml", "pytest"} <= names
    assert names <= {pin.split("==")[0] for pin in pins}


def test_set_up_without_a_fitting_python_says_what_is_needed() -> None:
    done = subprocess.run([ROOT / "tools" / "bootstrap", "no-such-python"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no 'no-such-python' found. Python 3.10, 3.11 or 3.12 is needed")
