"""The pages of docs/ do what they say: code runs, links lead somewhere, quoted messages are said."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cheapertraining.commands import cli
from cheapertraining.config import load_run_config
from cheapertraining.influence import InfluenceCalculator

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = tuple(sorted(path.stem for path in DOCS.glob("*.md")))
# Of a size for tests, behind what the page says.
SMALL = [
    "max_duration=6ba",
    "train_loader.global_batch_size=4",
    "train_loader.lag=2",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.intermediate_size=32",
    "eval_loader.subset_num_batches=1",
    "eval_loader.batch_size=2",
    "algorithms.online_mixing.interval=2ba",
    "algorithms.online_mixing.warmup=2ba",
    "loggers.wandb=null",
    "device=cpu",
]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(what the comment before it says, language, text) of each code block; pictures and output have no language."""
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)```", text, re.DOTALL)
    return [(mark, language, body) for mark, language, body in found]


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for mark, language, body in blocks(page):
        if language:
            assert mark.startswith(("run", "not run: ")), body
        else:
            assert not re.search(r"^(\$ |make |composer |pip |python |cheapertraining |wandb )", body, re.MULTILINE), (
                body
            )
        for test in re.findall(r"tests/[\w/]+(?:\.py)?", mark):
            assert (ROOT / test).exists(), mark


def test_every_block_that_is_marked_so_is_run() -> None:
    """By this file, and the README's by tests/end_to_end/test_readme.py."""
    marked = {page for page in PAGES if any(mark.startswith("run") for mark, _, _ in blocks(page))}
    assert marked == {"tutorial", "howto", "looking", "conversion", "influence", "mixing"}
    named = {mark.removeprefix("run:") for mark, _, _ in blocks("README") if mark.startswith("run")}
    text = (ROOT / "tests" / "end_to_end" / "test_readme.py").read_text(encoding="utf-8")
    assert {name for name in named if f'block("{name}")' not in text} == set()


def _run(page: str, names: dict[str, object]) -> None:
    """The marked blocks of a page, in order, in the present folder."""
    for mark, language, body in blocks(page):
        if mark.startswith("run: "):
            Path(mark.removeprefix("run: ")).write_text(body, encoding="utf-8")
        elif mark == "run" and language == "python":
            exec(compile(body, page, "exec"), names)
        elif mark == "run":
            for line in body.strip().splitlines():
                _command(shlex.split(line))


def _command(words: list[str]) -> None:
    if words[:1] == ["python"]:
        module = words[1].removesuffix(".py").replace("/", ".")
        assert import_module(module).main(words[2:]) == 0, words
        return
    assert words[0] == "cheapertraining"
    if words[1] == "train":
        words = [*words[:2], str(ROOT / words[2]), *words[3:], *SMALL]
    assert cli.main(words[1:]) == 0, words


@pytest.fixture
def own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `my/manuals` and `my/notes`, which a newcomer would have; the process works there."""
    library = Path(os.__file__).parent
    for folder, pattern in (("manuals", "[a-c]*.py"), ("notes", "[d-g]*.py")):
        (tmp_path / "my" / folder).mkdir(parents=True)
        for file in sorted(library.glob(f"**/{pattern}"))[:60]:
            text = file.read_text(encoding="utf-8", errors="replace")[:1500] + str(file)
            (tmp_path / "my" / folder / f"{file.parent.name}-{file.stem}.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


@pytest.mark.slow
def test_tutorial_and_howtos_run(own_text: Path) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    _run("tutorial", names)
    for name in ("mine", "fixed"):
        assert (own_text / "runs" / name / "report.html").is_file()
    assert "fixed" in (own_text / "comparison.html").read_text(encoding="utf-8")
    _run("howto", names)
    assert "optimizer" in names
    _run("looking", names)
    (own_text / "data" / "sample").symlink_to(own_text / "data" / "mine")
    _run("conversion", names)
    assert names["batch"]["input_ids"].shape == (1, 128)  # type: ignore[index]
    names |= {"batches": [next(iter(names["loader"]))], "batch": next(iter(names["loader"]))}  # type: ignore[call-overload]
    names["InfluenceCalculator"] = InfluenceCalculator
    _run("influence", names)
    assert names["scores"].shape == (8, 1)  # type: ignore[attr-defined]


def test_the_settings_of_the_page_on_mixing_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _run("mixing", {})
    run = OmegaConf.load(ROOT / "yamls" / "mixed_pretrain.yaml")
    run.algorithms.online_mixing = OmegaConf.load("matching.yaml").algorithms.online_mixing
    OmegaConf.save(run, "run.yaml")
    settings = load_run_config("run.yaml").algorithms.online_mixing
    assert settings is not None
    assert settings.strategy == "matching"
    assert settings.constraints.kl_step == 0.5


def test_quoted_messages_are_said_somewhere() -> None:
    sources = [*(ROOT / "cheapertraining").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    # Messages are put together from pieces of adjacent literals.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert len(quoted) > 10
    assert [message for message in quoted if message not in code] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (DOCS / target).is_file(), target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    shutil.copytree(DOCS, tmp_path / "docs")
    config = load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"), strict=True
    )
    build(config)
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "MixturePlan" in reference
    assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="https?://', reference)
