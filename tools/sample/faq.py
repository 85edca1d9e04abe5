"""Question and answer pairs: the Swedish construction FAQ of Zaragoza AB, in its English edition."""

from __future__ import annotations

import json
from pathlib import Path

from tools.sample.documents import Document, Source, clean_text, take
from tools.sample.packages import read_member

__all__ = ["make_source", "pairs_to_documents"]

_MEMBER = "zaragoza_construction_faq/data/faq-en.json"


def make_source(wheel: Path, budget: int) -> Source:
    """The source ``faq``; one document for each pair."""
    content = json.loads(read_member(wheel, _MEMBER))
    return Source(
        name="faq",
        license="CC-BY-4.0",
        origin="zaragoza-construction-faq 1.2.1, faq-en.json",
        credit="Swedish Construction FAQ by Zaragoza AB, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). "
        "Changes: question and answer joined to one text; near-duplicates dropped.",
        documents=take(pairs_to_documents(content["questions"]), budget),
    )


def pairs_to_documents(pairs: list[dict[str, str]]) -> list[Document]:
    """``{"id", "q", "a"}`` to a text of question, blank line, answer; pairs without an answer are left out."""
    return [
        Document(parent=pair["id"], text=clean_text(f"{pair['q'].strip()}\n\n{pair['a'].strip()}"))
        for pair in pairs
        if pair["q"].strip() and len(pair["a"].strip()) >= 40
    ]
