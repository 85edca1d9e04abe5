"""A control that good weighting should push down: damaged text made from the other sources' train split."""

from __future__ import annotations

import base64
import random
import textwrap
from collections.abc import Callable

from tools.sample.documents import Document, Source, hash_order

__all__ = ["KINDS", "make_source"]

_LONGEST = 1500  # characters of a document before the damage
_OCR = {
    "m": "rn",
    "rn": "m",
    "l": "1",
    "o": "0",
    "e": "c",
    "h": "li",
    "S": "5",
    "B": "8",
    "i": "!",
    "d": "cl",
    "g": "q",
}


def shuffled_words(text: str, rng: random.Random) -> str:
    """All words in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def shuffled_letters(text: str, rng: random.Random) -> str:
    """The letters inside each word in random order."""
    return " ".join("".join(rng.sample(word, len(word))) for word in text.split())


def as_base64(text: str, rng: random.Random) -> str:
    """Base64 of the text under a random key, so that no pattern of the text is left."""
    content = text.encode("utf-8")
    mixed = bytes(a ^ b for a, b in zip(content, rng.randbytes(len(content)), strict=True))
    return "\n".join(textwrap.wrap(base64.b64encode(mixed).decode("ascii"), 76))


def boilerplate(text: str, rng: random.Random) -> str:
    """Menus, notices and footers of a web page around a few words of the text, again and again."""
    words = [word for word in text.split() if word.isalpha() and len(word) > 3] or ["Page"]
    first, second, third = (rng.choice(words).capitalize() for _ in range(3))
    lines = [
        f"Home | {first} | {second} | {third} | Log in | Register",
        "This site uses cookies. Accept all    Reject all    Settings",
        f"Share    Print    E-mail    More about {second}    0 comments",
        f"© {rng.randint(1998, 2024)} {first} & {third}. All rights reserved. Terms | Privacy | Sitemap",
        f"« Previous    Page {rng.randint(1, 99)} of {rng.randint(100, 999)}    Next »",
    ]
    return "\n".join(rng.choice(lines) for _ in range(20))


def bad_ocr(text: str, rng: random.Random) -> str:
    """A bad scan: letters misread, spaces lost or put in, lines broken anywhere."""
    read: list[str] = []
    for character in text:
        chance = rng.random()
        if character in _OCR and chance < 0.35:
            read.append(_OCR[character])
        elif character == " " and chance < 0.2:
            continue
        elif chance < 0.03:
            read.append(rng.choice(["~", "'", ".", "|", " ", "-\n", "^"]))
        else:
            read.append(character)
    return "".join(read)


KINDS: tuple[Callable[[str, random.Random], str], ...] = (
    shuffled_words,
    shuffled_letters,
    as_base64,
    boilerplate,
    bad_ocr,
)


def make_source(train: dict[str, list[Document]], budget: int, seed: int = 0) -> Source:
    """The source ``noise``; ``train`` has the train documents of the other sources by name.

    Documents are taken in hash order, so all sources contribute in proportion to their number of documents; the kinds
    of damage take turns.
    """
    by_key = {
        f"{name}/{document.text}": (name, document) for name, documents in train.items() for document in documents
    }
    documents: list[Document] = []
    size = 0
    for number, key in enumerate(hash_order(by_key)):
        if size >= budget:
            break
        name, document = by_key[key]
        damage = KINDS[number % len(KINDS)]
        text = damage(document.text[:_LONGEST], random.Random(f"{seed}/{number}"))
        documents.append(Document(f"{name}/{document.parent}", text))
        size += len(text.encode("utf-8"))
    return Source(
        name="noise",
        license="those of the sources it was made from",
        origin=f"damaged text of the train split of {', '.join(train)}",
        credit="Made from the other sources; their licences and credits apply.",
        documents=documents,
        templated=True,
    )
