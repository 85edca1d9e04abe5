"""Encyclopedic prose: the shortened English Wikipedia dump inside the gensim package, markup removed."""

from __future__ import annotations

import bz2
import html
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from tools.sample.documents import Document, Source, clean_text, cut, take
from tools.sample.packages import read_member

__all__ = ["article_pieces", "clean_markup", "make_source"]

_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_MEMBER_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_SHORTEST, _LONGEST = 300, 3000  # characters of a document
_SHORTEST_PARAGRAPH = 60

_END_MATTER = re.compile(
    "see also|references|external links|further reading|notes|bibliography|footnotes|sources|citations|gallery|"
    "works cited|notes and references|references and notes|publications|selected bibliography|literature|"
    "filmography|discography|selected works|works|explanatory notes|general references",
    re.IGNORECASE,
)
_DROPPED_TAGS = "gallery|timeline|score|source|syntaxhighlight|pre|imagemap|hiero|code"
_REMOVE = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*?/>|<ref\b[^>]*?>.*?</ref\s*>|<(" + _DROPPED_TAGS + r")\b[^>]*?>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_FORMULA = re.compile(r"<(math|chem)\b[^>]*?>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_HOLE = "\x02"  # stands where a formula was; no paragraph with a hole is kept
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|//)[^\s\]]*\s*([^\]]*)\]")
_NOT_PROSE_LINK = re.compile(r"(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BOLD_ITALIC = re.compile(r"'{2,}")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$")
_EMPTY_BRACKETS = re.compile(r" ?\((?:[\s,;:/]|or|and)*\)")
_AFTER_OPENING = re.compile(r"\((?:\s*[,;:])+\s*")
_BEFORE_CLOSING = re.compile(r"(?:\s*[,;:])+\s*\)")
_SPACE_BEFORE = re.compile(r" +([,.;:)])")
_SPACES = re.compile(r"[ \t]{2,}")


def make_source(wheel: Path, budget: int) -> Source:
    """The source ``wiki``; each article is a parent."""
    documents: list[Document] = []
    for title, markup in _articles(read_member(wheel, _MEMBER, _MEMBER_SHA256)):
        documents += [Document(title, piece) for piece in article_pieces(title, markup)]
    documents = take(documents, budget)
    titles = "; ".join(dict.fromkeys(document.parent for document in documents))
    return Source(
        name="wiki",
        license="CC-BY-SA-3.0",
        origin="gensim 4.4.0, shortened English Wikipedia dump of 2016",
        credit="Text by the Wikipedia contributors, CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/); "
        "the authors of an article are listed in its history on en.wikipedia.org. Changes: markup, references, tables, "
        f"lists and end matter removed; articles cut into pieces. Articles: {titles}.",
        documents=documents,
    )


def _articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """Title and wikitext of each article of a bz2-packed XML dump: no redirects, no other namespaces."""
    title, namespace, redirect = "", "", False
    for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump))):
        tag = element.tag.rsplit("}", 1)[-1]
        if tag == "title":
            title = element.text or ""
        elif tag == "ns":
            namespace = element.text or ""
        elif tag == "redirect":
            redirect = True
        elif tag == "text" and namespace == "0" and not redirect:
            yield title, element.text or ""
        elif tag == "page":
            redirect = False
            element.clear()


def article_pieces(title: str, markup: str) -> list[str]:
    """The prose of an article in pieces of whole paragraphs, about 3,000 characters at most.

    A heading stands on the line before its section's first paragraph. Formulas leave holes, so their paragraphs go,
    as do lists, end matter (references, further reading, ...) and paragraphs too short to be prose.
    """
    blocks: list[str] = []
    heading, skipped_level = title + "\n", 0
    for line in clean_markup(markup).splitlines():
        match = _HEADING.match(line)
        if match:
            level = len(match[1])
            if not skipped_level or level <= skipped_level:
                skipped_level = level if _END_MATTER.fullmatch(match[2]) else 0
            if not skipped_level:
                heading = match[2]
            continue
        if skipped_level or not _is_prose(line):
            continue
        blocks.append(f"{heading}\n{line}" if heading else line)
        heading = ""
    return [piece for piece in cut(blocks, "\n\n", _LONGEST) if len(piece) >= _SHORTEST]


def _is_prose(line: str) -> bool:
    if len(line) < _SHORTEST_PARAGRAPH or line[0] in "*#:;|!{}=":
        return False
    return _HOLE not in line and not any(mark in line for mark in ("{{", "}}", "[[", "]]", "{|", "|}", "<", "||"))


def clean_markup(markup: str) -> str:
    """Wikitext to plain lines: headings keep their ``==``, lists their ``*``, paragraphs are one line each."""
    text = _FORMULA.sub(_HOLE, _REMOVE.sub("", markup))
    text = _replace_until_stable(_TEMPLATE, _template_text, text)
    text = _replace_until_stable(_TABLE, lambda match: "", text)
    text = _replace_until_stable(_LINK, _link_text, text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _BOLD_ITALIC.sub("", _MAGIC_WORD.sub("", text))
    text = html.unescape(_TAG.sub("", re.sub(r"<br\s*/?>", " ", text)))
    text = _BEFORE_CLOSING.sub(")", _AFTER_OPENING.sub("(", _EMPTY_BRACKETS.sub("", text)))
    parts = text.split(_HOLE)  # the mark is a control character, which clean_text would remove
    text = _HOLE.join(clean_text(f"|{part}|")[1:-1] for part in parts)  # the bars keep the blanks at both ends
    return _SPACE_BEFORE.sub(r"\1", _SPACES.sub(" ", text))


def _replace_until_stable(pattern: re.Pattern[str], replacement: object, text: str) -> str:
    """Replace innermost matches first, so that what is nested in them goes too."""
    while True:
        text, count = pattern.subn(replacement, text)  # type: ignore[call-overload]
        if not count:
            return text


def _template_text(match: re.Match[str]) -> str:
    """What a template shows in running text, for the few that matter there; else nothing."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower()
    values = [argument for argument in arguments if not re.match(r"[a-z_]+\d*\s*=", argument)]
    if not values:
        return {"ndash": "–", "spaced ndash": " – ", "mdash": "—", "snd": " – "}.get(name, "")
    if name in {"convert", "cvt"}:
        ranged = len(values) > 3 and values[1] in {"to", "-", "–", "and", "or", "by", "x"}
        return " ".join(values[: 4 if ranged else 2])
    if (
        name == "lang"
        or name.startswith("lang-")
        or name in {"nowrap", "nobr", "abbr", "quote", "cquote", "small", "smallcaps"}
    ):
        return values[0] if name == "abbr" else values[-1]
    if name in {"circa", "c."}:
        return f"c. {values[0]}"
    if name in {"frac", "fraction"} and len(values) == 2:
        return f"{values[0]}/{values[1]}"
    if name == "val":
        return values[0]
    return ""


def _link_text(match: re.Match[str]) -> str:
    target, _, shown = match[1].partition("|")
    if _NOT_PROSE_LINK.match(target.strip()):
        return ""
    return shown.rsplit("|", 1)[-1] if shown else target.lstrip(":")
