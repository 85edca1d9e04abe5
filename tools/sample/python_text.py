"""What the interpreter brings: source code of the standard library, and reference text (manual topics, docstrings)."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tools.sample.documents import Document, Source, clean_text, cut, hash_order, take, text_bytes

__all__ = ["code_pieces", "docstrings", "make_code", "make_docs"]

_SHORTEST, _LONGEST = 300, 3000  # characters of a document
# Tests, vendored or generated code, data tables, and what differs from build to build of one Python version.
# fmt: off
_SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages",
    "__pycache__", "encodings", "pydoc_data", "ensurepip", "lib-dynload", "msilib", "__phello__", "_vendor",
    "_pyrepl", "examples", "_examples",
}
# fmt: on
_SKIPPED_FILES = re.compile(r"^(?:_sysconfigdata|_sysconfig_vars|sitecustomize|usercustomize|python-config)|_pb2\.py$")
_PACKAGES = {"numpy": "BSD-3-Clause", "torch": "BSD-3-Clause"}
_SHORTEST_DOCSTRING = 400
_LARGEST_MODULE = 100_000  # bytes; one very long module would fill a whole split
_BREAK = re.compile(r"^(?: {4})?(?:@|def |async def |class )", re.MULTILINE)
_HELP_TOPICS = re.compile(r"^Related help topics:.*$", re.MULTILINE)
_PLACEHOLDER_LINE = re.compile(r"^\s*\{\w+\}\s*$", re.MULTILINE)


def make_code(budget: int) -> Source:
    """The source ``code``; each module of the standard library is a parent. Empty where no sources are installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    size = 0
    for relative in _python_files(root):
        if size >= budget:
            break
        if (root / relative).stat().st_size > _LARGEST_MODULE:
            continue
        pieces = [Document(relative, piece) for piece in code_pieces(_read(root / relative))]
        documents += pieces
        size += text_bytes(pieces)
    version = sysconfig.get_python_version()
    return Source(
        name="code",
        license="PSF-2.0",
        origin=f"standard library of the installed Python {version}",
        credit="CPython standard library, PSF License 2.0 (https://docs.python.org/3/license.html). "
        "Changes: modules cut at functions and classes.",
        documents=documents,
    )


def make_docs(budget: int) -> Source:
    """The source ``docs``: manual topics of the interpreter, then docstrings of installed packages."""
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name) is not None]
    documents = take(_topics(), budget // (len(installed) + 1))
    for position, name in enumerate(installed):
        share = (budget - text_bytes(documents)) // (len(installed) - position)
        documents += _package_docs(name, share)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in installed]
    return Source(
        name="docs",
        license="; ".join(["PSF-2.0 (Python topics)", *(f"{_PACKAGES[name]} ({name})" for name in installed)]),
        origin=", ".join(
            [
                f"help topics of Python {sysconfig.get_python_version()}",
                *(f"docstrings of {v}" for v in versions),
            ]
        ),
        credit="Python manual topics, Python Software Foundation License 2.0; docstrings of the packages under the "
        "licences named, whose texts are installed with them. Changes: cut into pieces; short docstrings left out.",
        documents=documents,
    )


def code_pieces(source: str) -> list[str]:
    """A module in pieces of about 3,000 characters, cut only before functions, methods and classes."""
    text = clean_text(source)
    starts = [0]
    for match in _BREAK.finditer(text):
        before = text[: match.start()].rsplit("\n", 2)[-2:-1]
        if match.start() > 0 and not (before and before[0].lstrip().startswith("@")):
            starts.append(match.start())
    blocks = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    pieces = (piece.strip("\n") for piece in cut([b for b in blocks if b], "", _LONGEST))
    return [piece for piece in pieces if _is_readable_code(piece)]


def _is_readable_code(piece: str) -> bool:
    """Neither a data table nor machine-made."""
    if not _SHORTEST <= len(piece) <= 4 * _LONGEST or max(map(len, piece.splitlines())) > 200:
        return False
    return sum(c.isdigit() for c in piece) < 0.12 * len(piece) and sum(ord(c) > 127 for c in piece) < 0.05 * len(piece)


def docstrings(source: str, module: str) -> Iterator[tuple[str, str, str]]:
    """``(parent, dotted name, docstring)`` of a module's classes, functions and methods; parents are top-level objects.

    Docstrings that a module attaches to compiled objects by a call (``add_newdoc``, ``add_docstr``) are found too.
    The source is parsed, not run.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definition_docs(node, module)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _attached_doc(node.value)


def _definition_docs(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str
) -> Iterator[tuple[str, str, str]]:
    name = f"{module}.{node.name}"
    if text := ast.get_docstring(node):
        yield name, name, text
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(member)):
                yield name, f"{name}.{member.name}", text


def _attached_doc(call: ast.Call) -> Iterator[tuple[str, str, str]]:
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if function not in {"add_newdoc", "add_docstr"} or len(call.args) < 2:
        return
    *target, value = call.args
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "format":
        value = value.func.value  # shared descriptions of arguments are filled in at run time
    if isinstance(value, ast.Tuple) and len(value.elts) == 2:
        target, value = [*target, value.elts[0]], value.elts[1]
    names = [node.value if isinstance(node, ast.Constant) else ast.unparse(node) for node in target]
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        name = ".".join(str(part) for part in names)  # begins with the package already
        text = _PLACEHOLDER_LINE.sub("", value.value).replace("{{", "{").replace("}}", "}")
        yield name, name, inspect.cleandoc(text)


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    documents: list[Document] = []
    for topic in sorted(topics):
        text = clean_text(_HELP_TOPICS.sub("", topics[topic]))
        pieces = cut(text.split("\n\n"), "\n\n", _LONGEST)
        documents += [Document(f"topic:{topic}", piece) for piece in pieces if len(piece) >= _SHORTEST]
    return documents


def _package_docs(package: str, budget: int) -> list[Document]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    root = Path(spec.origin).parent
    documents: list[Document] = []
    size = 0
    for relative in _python_files(root):
        if size >= budget:
            break
        module = ".".join([package, *Path(relative).with_suffix("").parts]).removesuffix(".__init__")
        found = [
            Document(parent, piece)
            for parent, name, text in docstrings(_read(root / relative), module)
            if len(text) >= _SHORTEST_DOCSTRING
            for piece in cut(clean_text(f"{name}\n\n{text}").split("\n\n"), "\n\n", _LONGEST)
            if len(piece) >= _SHORTEST
        ]
        documents += found
        size += text_bytes(found)
    return take(documents, budget)


def _python_files(root: Path) -> list[str]:
    """Relative POSIX paths of the modules below ``root`` in hash order, so that a budget takes an even sample."""
    found = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [p for p in found if not _SKIPPED_FOLDERS.intersection(p.parts) and not _SKIPPED_FILES.search(p.name)]
    return hash_order(path.as_posix() for path in kept)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a module in another encoding
        return ""
