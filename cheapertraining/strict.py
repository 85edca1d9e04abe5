"""Plain data (what a yaml gives) to typed dataclasses, strictly, with every problem reported at once.

No conversion is made beyond int to float and list to tuple: a number in quotes is text, and a number where
text belongs is an error. Nothing is evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cheapertraining.errors import nearest

__all__ = ["Check", "Problems", "above", "between", "build", "duration"]

Problems = list[tuple[str, str]]
"""(dotted key, what is wrong with it), in the order found."""

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Check:
    """A restriction on a value, put beside its type: ``Annotated[float, above(0)]``.

    Args:
        expected: what the value should be, to be read after "expected".
        holds: whether a value of the right type is inside the restriction.
    """

    def __init__(self, expected: str, holds: Callable[[Any], bool]) -> None:
        self.expected = expected
        self.holds = holds


def above(limit: float) -> Check:
    """A number greater than ``limit``."""
    return Check(f"a number above {limit:g}", lambda value: value > limit)


def between(low: float, high: float = math.inf) -> Check:
    """A number from ``low`` to ``high``, both included."""
    text = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number of at least {low:g}"
    return Check(text, lambda value: low <= value <= high)


def duration(*units: str, zero: bool = False) -> Check:
    """A Composer time string such as ``300ba`` or ``10_000tok``, in one of ``units``.

    ``dur`` is a share of the run (``0.1dur``). Epochs (``ep``) are never among the units: the mixture is
    sampled endlessly, so that a pass over it has no end to count.
    """
    samples = {"ba": "300ba", "tok": "10_000tok", "sp": "5000sp", "dur": "0.1dur"}
    expected = f"a duration ({', '.join(samples[unit] for unit in units)})"

    def holds(text: str) -> bool:
        match = re.fullmatch(rf"(\d[\d_]*|\d*\.\d+|\d+\.\d*)({'|'.join(units)})", text)
        if match is None or ("." in match[1] and match[2] != "dur"):
            return False
        number = float(match[1])
        return (number > 0 or zero) and (match[2] != "dur" or number <= 1)

    return Check(expected, holds)


def build(kind: Any, value: Any, key: str, problems: Problems) -> Any:
    """``value`` as ``kind``; where it does not fit, a line is added to ``problems`` and the result is no good.

    Args:
        kind: a dataclass, ``bool``/``int``/``float``/``str``, ``Literal``, ``Any``, and ``list``, ``tuple``,
            ``dict[str, ...]``, unions and ``Annotated[..., Check]`` of these.
        key: dotted name of the value, for the messages.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key, problems)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _build_checked(arguments[0], arguments[1:], value, key, problems)
    if origin in (Union, UnionType):
        return _build_union(arguments, value, key, problems)
    if origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        hint = nearest(value, map(str, arguments)) if isinstance(value, str) else ""
        return _wrong(_expected(kind), value, key, problems, hint)
    if origin is dict:
        if not isinstance(value, Mapping):
            return _wrong(_expected(kind), value, key, problems)
        return {str(k): build(arguments[1], item, f"{key}.{k}", problems) for k, item in value.items()}
    if origin in (list, tuple):
        return _build_sequence(kind, value, key, problems)
    if type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    if kind is float and type(value) is int:
        return float(value)
    return _wrong(_expected(kind), value, key, problems)


def _build_dataclass(kind: Any, value: Any, key: str, problems: Problems) -> Any:
    if not isinstance(value, Mapping):
        return _wrong(_expected(kind), value, key, problems)
    hints = get_type_hints(kind, include_extras=True)
    dot = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            known = nearest(str(name), hints) or f" Known here: {', '.join(hints) or 'no key at all'}."
            problems.append((f"{dot}{name}", f"unknown key.{known}"))
    given = {}
    for field in fields(kind):
        if field.name in value:
            given[field.name] = build(hints[field.name], value[field.name], f"{dot}{field.name}", problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append((f"{dot}{field.name}", f"missing; expected {_expected(hints[field.name])}."))
            given[field.name] = None
    return kind(**given)


def _build_checked(kind: Any, checks: tuple[Check, ...], value: Any, key: str, problems: Problems) -> Any:
    found: Problems = []
    result = build(kind, value, key, found)
    if found or not all(check.holds(result) for check in checks):
        return _wrong(_expected_checked(kind, checks), value, key, problems)
    return result


def _build_union(kinds: tuple[Any, ...], value: Any, key: str, problems: Problems) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    attempts = []
    for kind in kinds:
        found: Problems = []
        result = build(kind, value, key, found)
        if not found:
            return result
        attempts.append(found)
    if len(kinds) == 1:
        problems.extend(attempts[0])
        return None
    return _wrong(" or ".join(map(_expected, kinds)), value, key, problems)


def _build_sequence(kind: Any, value: Any, key: str, problems: Problems) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    endless = origin is list or arguments[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (endless or len(value) == len(arguments)):
        return _wrong(_expected(kind), value, key, problems)
    kinds = [arguments[0]] * len(value) if endless else arguments
    pairs = enumerate(zip(kinds, value, strict=True))
    return origin(build(k, item, f"{key}.{i}", problems) for i, (k, item) in pairs)


def _wrong(expected: str, value: Any, key: str, problems: Problems, hint: str = "") -> None:
    found = "nothing (null)" if value is None else repr(value)
    if isinstance(value, str) and re.fullmatch(r"[\d._]+ep", value):
        hint = " Epochs (ep) do not exist here: the mixture is sampled endlessly, so no pass over it ends."
    elif isinstance(value, str) and "number" in expected and _looks_like_number(value):
        hint = " Write it without quotes."
    elif type(value) in (int, float) and expected.startswith(_PLAIN[str]):
        hint = " Put quotes around it."
    problems.append((key, f"expected {expected}, found {found}.{hint}"))


def _looks_like_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _expected(kind: Any) -> str:
    """``kind`` in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind is type(None):
        return "null"
    if origin is Annotated:
        return _expected_checked(arguments[0], arguments[1:])
    if origin is Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        return " or ".join(_expected(argument) for argument in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list, each {_expected(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_expected(arguments[0])}"
    if origin is dict:
        return f"a mapping of names to {_expected(arguments[1])}"
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return f"a mapping with keys among {', '.join(names)}" if names else "an empty mapping {}"
    return "any value"


def _expected_checked(kind: Any, checks: tuple[Check, ...]) -> str:
    text = " and ".join(check.expected for check in checks)
    return text.replace("a number", "a whole number") if kind is int else text
