"""Run the GSM-symbolic generator functions of reasoning-gym. A program of its own, started by word_problems.py.

Standard input: JSON ``{"utils": source, "generators": [source, ...], "instances": n}``.
Standard output: JSON ``{template number: [[question, worked answer], ...]}``.
Imports nothing but the standard library, so that it runs with ``python -I -S``.
"""

from __future__ import annotations

import ast
import builtins
import decimal
import fractions
import json
import math
import random
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence

_PREFIX = "generate_"
_UTILITIES = ("format_number", "is_integer")
# What a generator may import; anything else is refused.
_MODULES: dict[str, types.ModuleType] = {
    "math": math,
    "fractions": fractions,
    "random": random,
    "typing": typing,
}
# fmt: off
_BUILTINS = (
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "int", "isinstance", "len", "list",
    "map", "max", "min", "next", "pow", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip",
    "AssertionError", "Exception", "ValueError", "ZeroDivisionError",
)
# fmt: on

Generator = Callable[[random.Random, float], dict[str, typing.Any]]


def main() -> None:
    """Read the sources, write the instances."""
    job = json.load(sys.stdin)
    json.dump(make_instances(job["utils"], job["generators"], job["instances"]), sys.stdout)


def make_instances(utils: str, generators: Sequence[str], instances: int) -> dict[int, list[list[str]]]:
    """Up to ``instances`` distinct ``[question, worked answer]`` by template number.

    Every template has a generator of random numbers of its own, seeded with its number.
    """
    package = types.ModuleType("reasoning_gym.utils")
    package.__dict__.update(_utilities(utils))
    found: dict[int, Generator] = {}
    for source in generators:
        for name, value in _run(source, {**_MODULES, "reasoning_gym.utils": package}).items():
            if name.startswith(_PREFIX):
                found[int(name.removeprefix(_PREFIX))] = value
    return {number: _instances(found[number], number, instances) for number in sorted(found)}


def _instances(generate: Generator, number: int, instances: int) -> list[list[str]]:
    rng = random.Random(number)
    drawn: dict[str, str] = {}
    for _ in range(instances):
        try:
            example = generate(rng, 1.0)
        except (ValueError, ZeroDivisionError):  # numbers that do not work out for this template
            continue
        drawn.setdefault(example["question"], example["metadata"]["answer_cot"])
    return [[question, answer] for question, answer in drawn.items()]


def _utilities(source: str) -> dict[str, typing.Any]:
    """The two helper functions the generators use, out of a module whose other parts are not run."""
    tree = ast.parse(source)
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in _UTILITIES]
    imports = "import math\nfrom decimal import Decimal, InvalidOperation\nfrom fractions import Fraction\n"
    imports += "from typing import Any, Optional, Union\n"
    code = imports + "\n".join(ast.unparse(node) for node in wanted)
    return _run(code, {**_MODULES, "decimal": decimal})


def _run(source: str, modules: Mapping[str, types.ModuleType]) -> dict[str, typing.Any]:
    """Execute a module with few builtins and imports; ``eval`` only reads a fraction such as ``"1/2"``."""

    def import_allowed(name: str, *_: object) -> types.ModuleType:
        if name not in modules:
            raise ImportError(f"the generators may not import '{name}'")
        return modules[name]

    allowed = {name: getattr(builtins, name) for name in _BUILTINS}
    allowed |= {"__import__": import_allowed, "eval": lambda text: float(fractions.Fraction(text))}
    space: dict[str, typing.Any] = {"__builtins__": allowed, "__name__": "generators"}
    exec(compile(source, "<generators>", "exec"), space)
    return space


if __name__ == "__main__":
    main()
