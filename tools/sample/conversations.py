"""Conversations for fine-tuning, made from documents of the sample: small talk as turns, questions with answers.

A conversation is in the split of the document it is made from, so that what is held out here was held out of
pre-training too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from tools.sample.documents import Document

__all__ = ["CHAT_TEMPLATE", "pairs_to_conversations", "questions_and_answers", "reference_questions", "small_talk"]

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:' }}
{%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- message.role | capitalize + ': ' + message.content }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
"""Goes beside the sample's tokenizer: roles as words, every answer closed by the end of text."""

_CHARACTERS_PER_TOKEN = 2.8  # of small talk, with the sample's tokenizer and on the safe side
_HEADER = 14  # characters of a role, about
_SPEAKER = re.compile(r"^[AB]: ")
_NAME = re.compile(r"^[A-Za-z_][\w.]*\w$")
_SIGNATURE = re.compile(r"[\w.]+\s?\(")
_SENTENCE_END = re.compile(r"(?<=[a-z`)]\.)\s+(?=[A-Z`])")
_UNDERLINE = re.compile(r"^([*=\-~])\1{2,}$")
_SHORTEST, _LONGEST = 20, 200  # characters of an answer from a reference text

Record = dict[str, Any]


def small_talk(documents: Iterable[Document], seq_len: int) -> Iterator[Record]:
    """``messages`` of neighbouring turns, about as many as fit into ``seq_len`` tokens, the first speaker as user."""
    room = int(seq_len * _CHARACTERS_PER_TOKEN)
    for document in documents:
        said = [_SPEAKER.sub("", line) for line in document.text.split("\n")]
        turns: list[str] = []
        for exchange in zip(said[::2], said[1::2], strict=False):
            if turns and sum(len(turn) + _HEADER for turn in [*turns, *exchange]) > room:
                yield _messages(turns)
                turns = []
            turns += exchange
        if turns:
            yield _messages(turns)


def questions_and_answers(documents: Iterable[Document]) -> Iterator[Record]:
    """``prompt`` and ``response`` of documents that are a question, a blank line and an answer."""
    for document in documents:
        question, _, answer = document.text.partition("\n\n")
        if answer:
            yield {"prompt": question, "response": answer}


def reference_questions(documents: Iterable[Document]) -> Iterator[Record]:
    """``prompt`` and ``response`` of manual topics and docstrings: what a thing is, and the first sentence about it."""
    for document in documents:
        lines = document.text.split("\n")
        title, behind = lines[0], 2 if len(lines) > 1 and _UNDERLINE.match(lines[1]) else 1
        if behind == 1 and not _NAME.match(title):
            continue  # a later piece of a text
        paragraphs = "\n".join(lines[behind:]).strip().split("\n\n")
        prose = [" ".join(text.split()) for text in paragraphs if not _SIGNATURE.match(text.strip())]
        answer = _SENTENCE_END.split(prose[0])[0] if prose else ""
        if _SHORTEST <= len(answer) <= _LONGEST:
            prompt = f"What does {title} do?" if behind == 1 else f"Tell me about this: {title}"
            yield {"prompt": prompt, "response": answer}


def pairs_to_conversations(pairs: Iterable[Record]) -> Iterator[Record]:
    """``messages`` of two questions and their answers, for each two neighbours."""
    for first, second in pairwise(pairs):
        yield _messages([first["prompt"], first["response"], second["prompt"], second["response"]])


def _messages(turns: list[str]) -> Record:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}
