"""Open small talk: two-person conversations of the Chit-Chat data set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tools.sample.documents import Document, Source, clean_text, cut, take
from tools.sample.packages import read_member

__all__ = ["conversation_turns", "make_source"]

_MEMBER = "chitchat_dataset/dataset.json"
_SHORTEST, _LONGEST = 550, 3000  # characters of a document
_FEWEST_TURNS = 6
# Addresses and long numbers could be somebody's; whole conversations with rude words are left out.
_PRIVATE = re.compile(r"https?:|www\.|\S@\S|\d{5,}|\d{3}[-. ]\d{4}")
_RUDE = re.compile(
    r"\b(?:fuck|shit|bitch|cunt|dick|cock|puss(?:y|ies)|porn|slut|whore|rape|rapist|nigg|fag|penis|vagina|tits|boob|"
    r"asshole|bastard|damn|sex|naked|nude|kill (?:you|my)self|suicid|retard|hitler|nazi)",
    re.IGNORECASE,
)
_KEYBOARD_MASHING = re.compile(r"(.)\1{7,}|\S{40,}")


def make_source(wheel: Path, budget: int) -> Source:
    """The source ``chat``; each conversation is a parent."""
    conversations: dict[str, dict[str, Any]] = json.loads(read_member(wheel, _MEMBER))
    documents: list[Document] = []
    for key, conversation in conversations.items():
        if len(conversation["messages"]) < _FEWEST_TURNS:
            continue
        turns = conversation_turns(conversation["messages"])
        pieces = cut(turns, "\n", _LONGEST) if len(turns) >= _FEWEST_TURNS else []
        documents += [Document(key, piece) for piece in pieces if len(piece) >= _SHORTEST]
    return Source(
        name="chat",
        license="MIT",
        origin="chitchat-dataset 0.9.0",
        credit="Chit-Chat data set, Perception, Control and Cognition Lab (BYU), MIT licence. Changes: long "
        "conversations of two people only, none with rude words, addresses or long numbers; speakers named A and B.",
        documents=take(documents, budget),
    )


def conversation_turns(messages: list[list[dict[str, str]]]) -> list[str]:
    """Turns ``A: ...`` and ``B: ...`` in order, neighbouring messages of one speaker joined.

    Empty for a conversation that is not between exactly two people or that should not be trained on.
    """
    speakers = list(dict.fromkeys(utterance["sender"] for message in messages for utterance in message))
    if len(speakers) != 2:
        return []
    spoken: list[tuple[str, str]] = []
    for message in messages:
        for utterance in message:
            text = " ".join(clean_text(utterance["text"]).split())
            if text and spoken and spoken[-1][0] == utterance["sender"]:
                spoken[-1] = (utterance["sender"], f"{spoken[-1][1]} {text}")
            elif text:
                spoken.append((utterance["sender"], text))
    everything = "\n".join(text for _, text in spoken)
    unfit = _PRIVATE.search(everything) or _RUDE.search(everything) or _KEYBOARD_MASHING.search(everything)
    if unfit:
        return []
    names = dict(zip(speakers, "AB", strict=True))
    return [f"{names[sender]}: {text}" for sender, text in spoken]
