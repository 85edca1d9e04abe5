"""Worked word problems from the GSM-symbolic templates of reasoning-gym.

The templates are Python functions, so there is no text to read: they must be run. Installing reasoning-gym would
bring a dozen dependencies, and the two modules need only two small functions of it. So their source is read from the
archive, whose hash was checked, and run by ``word_problem_worker.py`` in a separate interpreter: isolated mode, no
site packages, no environment variables, an empty folder as working directory, a time limit, and inside it a short
list of builtins and imports. ``eval``, which two templates use for fractions such as ``"1/2"``, is replaced by a
fraction parser.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cheapertraining.errors import UserError
from tools.sample.documents import Document, Source, clean_text, take
from tools.sample.packages import read_member

__all__ = ["format_problem", "make_source", "run_templates"]

_FOLDER = "reasoning_gym/arithmetic/gsm_symbolic"
_GENERATORS = (f"{_FOLDER}/generators_00_49.py", f"{_FOLDER}/generators_50_99.py")
# Marked "need fix" by the package: their questions or answers are wrong for some numbers.
_BROKEN = frozenset({32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98})
_INSTANCES = 42  # of each template
_TIMEOUT_S = 120
_ANSWER = re.compile(r"\n*#### *(.+?)\s*$")


def make_source(wheel: Path, budget: int) -> Source:
    """The source ``math``; each template is a parent, so that no template occurs in two splits."""
    sources = {
        member: read_member(wheel, member).decode("utf-8") for member in ("reasoning_gym/utils.py", *_GENERATORS)
    }
    instances = run_templates(sources["reasoning_gym/utils.py"], [sources[m] for m in _GENERATORS], _INSTANCES)
    documents = [
        Document(f"template-{number}", format_problem(question, answer))
        for number, pairs in instances.items()
        if number not in _BROKEN
        for question, answer in pairs
    ]
    return Source(
        name="math",
        license="Apache-2.0",
        origin="reasoning-gym 0.1.25, GSM-symbolic templates",
        credit="Instances of the GSM-symbolic templates of reasoning-gym, Apache-2.0. The templates re-create problems "
        "of the GSM8K test file: do not score that file with a model that was trained on this.",
        documents=take(documents, budget),
        templated=True,
    )


def run_templates(utils: str, generators: list[str], instances: int) -> dict[int, list[tuple[str, str]]]:
    """``(question, worked answer)`` pairs by template number; the arguments are Python sources.

    Raises:
        UserError: the generators did not run; with the last line of their error.
    """
    worker = str(Path(__file__).with_name("word_problem_worker.py"))
    job = json.dumps({"utils": utils, "generators": generators, "instances": instances})
    with tempfile.TemporaryDirectory() as empty:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-S", "-X", "utf8", worker],
                input=job,
                capture_output=True,
                encoding="utf-8",
                env={},
                cwd=empty,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"word problem templates: not done after {_TIMEOUT_S} s. Run again on a less busy machine."
            ) from error
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"word problem templates: they did not run under Python {sys.version.split()[0]} ({reason}).")
    return {int(number): [(q, a) for q, a in pairs] for number, pairs in json.loads(run.stdout).items()}


def format_problem(question: str, worked_answer: str) -> str:
    """Question, worked answer and a closing sentence in place of GSM8K's ``#### 5``."""
    solution = _ANSWER.sub(lambda match: f"\nThe answer is {match[1]}.", worked_answer.strip())
    return clean_text(f"Question: {question.strip()}\nAnswer: {solution.strip()}")
