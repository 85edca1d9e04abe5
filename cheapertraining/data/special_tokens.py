"""Special tokens that a chat template writes, told apart from text that happens to spell them.

A template writes ``<|im_end|>`` and means the token; a user who writes the same ten characters must not end the turn.
Once rendered, both look alike. So the spellings in contents are *hidden* before rendering: their first character is
exchanged for a private one. What spells a special token afterwards is the template's own; it is exchanged for another
private spelling, the hidden ones are shown again, and a copy of the tokenizer that knows its special tokens by the
private spellings alone gives the ids. All exchanges keep the length, so offsets stay those of the rendered text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["SpecialTokens"]

_HIDDEN, _PRIVATE = 0xF0000, 0x100000  # the private-use planes of Unicode: the number of the token is added


class SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: a fast tokenizer; a copy is made. Only tokens that are marked as special count: added tokens that
            are not, such as ``<think>`` in some tokenizers, become tokens wherever they are spelt, as in all text.

    Raises:
        UserError: the tokenizer cannot be copied with other spellings.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        spellings = sorted(token.content for token in added.values() if token.special and token.content)
        self._hidden = {text: chr(_HIDDEN + n) + text[1:] for n, text in enumerate(spellings)}
        self._private = {text: chr(_PRIVATE + n) + text[1:] for n, text in enumerate(spellings)}
        self._spelt = _any_of(spellings)
        self._shown = {hidden: text for text, hidden in self._hidden.items()}
        self._hides = _any_of(self._hidden.values())
        self._escapes = _any_of(json.dumps(hidden)[1:-1] for hidden in self._hidden.values())
        self._reserved = _any_of([*self._hidden.values(), *self._private.values()])
        self._tokenizer = _with_spellings(tokenizer, self._private)

    def hide(self, text: str) -> str:
        """``text`` such that its spellings of special tokens survive rendering as text.

        Raises:
            ValueError: the text has one of the private spellings that are used for this.
        """
        if self._reserved.search(text):
            raise ValueError("a private-use character stands where a special token would begin. Remove it.")
        return self._spelt.sub(lambda match: self._hidden[match[0]], text)

    def show(self, text: str) -> str:
        """The text as it was before :meth:`hide`; the length is the same."""
        return self._hides.sub(lambda match: self._shown[match[0]], text)

    def escaped(self, text: str) -> bool:
        """Whether a hidden spelling in ``text`` became an escape sequence, which :meth:`show` does not find."""
        return self._escapes.search(text) is not None

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings of rendered texts; special tokens where a template wrote them, none added, nothing cut.

        Offsets count the characters of ``texts``.
        """
        private = [self.show(self._spelt.sub(lambda match: self._private[match[0]], text)) for text in texts]
        return list(self._tokenizer.encode_batch(private, add_special_tokens=False))


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest where several begin; nothing where there is none."""
    ordered = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _with_spellings(tokenizer: Tokenizer, spellings: dict[str, str]) -> Tokenizer:
    """A copy of ``tokenizer`` with other spellings for some tokens and the same ids, and without post-processing.

    Post-processing adds tokens and trims offsets; neither is wanted.
    """
    from tokenizers import Tokenizer

    state: dict[str, Any] = json.loads(tokenizer.to_str())
    state["post_processor"] = state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spellings.get(text, text): number for text, number in model["vocab"].items()}
    else:  # Unigram: texts with their scores
        model["vocab"] = [[spellings.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
    copy = Tokenizer.from_str(json.dumps(state))
    for text, private in spellings.items():
        if copy.token_to_id(private) != tokenizer.token_to_id(text):
            raise UserError(f"tokenizer: its special token {text!r} cannot be told apart from text that spells it.")
    return copy
