"""Conversations to tokens with a loss mask: read a record, render it with a chat template, find what to predict.

Predicted are the assistant's turns, without the role header and with what ends the turn. Where a template has
``{% generation %}`` blocks, these say what the assistant's text is, exactly as for
``apply_chat_template(return_assistant_tokens_mask=True)`` of transformers. Where it has none, a turn is what
``render(messages[: i + 1])`` adds to ``render(messages[:i], add_generation_prompt=True)``, less the white space after
the end marker. Some templates render a turn otherwise when more turns follow, or have no generation prompt: their
contents are marked with two characters that no text has, and the loss runs from the content to the end marker. Where
that does not work either, the record is refused; a mask is never guessed.

A token that lies across the border of an answer counts as part of it.

What text can and cannot do: a special token spelt in any content stays text, so that no user can end a turn or begin
another. What a template writes becomes the special tokens; text that a template writes and that is no special token of
the tokenizer is plain text (so is ChatML where ``<|im_start|>`` and ``<|im_end|>`` are no special tokens, and contents
can then spell its markers: give the tokenizer these tokens where that matters).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError, nearest

__all__ = ["CHATML", "ROLES", "ChatError", "ChatFormat", "Conversation", "RenderedChat", "read_conversation"]

ROLES = ("system", "user", "assistant", "tool")

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The template for tokenizers that have none."""

_LAYOUTS = (("messages",), ("prompt", "response"), ("instruction", "output"))
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # code points that are no characters, kept for programs' own use
# Some templates write today's date. Shards must not depend on the day they are made; this is Llama 3.1's own default.
_TODAY = datetime(2024, 7, 26)

Span = tuple[int, int]


class ChatError(ValueError):
    """What is wrong with one record."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: mappings with ``role`` and ``content``, perhaps more; and tool schemas."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """What is said as JSON: the same whatever the record's layout and the template, so splits go by its hash."""
        content = [self.messages, self.tools] if self.tools else [self.messages]
        return json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: what the template gave; special tokens spelt in contents are hidden (see
            :mod:`cheapertraining.data.special_tokens`).
        answers: first character and end of what is to be predicted, in order.
        ends_with_answer: the last message is the assistant's.
    """

    text: str
    answers: tuple[Span, ...]
    ends_with_answer: bool


# ---- records -------------------------------------------------------------------------------------------------------


def read_conversation(record: object) -> Conversation | None:
    """The conversation of a record.

    Args:
        record: a mapping with ``messages`` (``role`` and ``content`` each; an assistant's message may have
            ``tool_calls``), perhaps with ``tools``; or with ``prompt`` and ``response``; or with ``instruction``,
            ``output`` and perhaps ``input``. The last two may have ``system``. Other columns are left alone, and a
            column that is null counts as absent.

    Returns:
        None: all columns of a conversation are null.

    Raises:
        ChatError: it is no conversation with something to learn, or it has several layouts.
    """
    if not isinstance(record, Mapping):
        raise ChatError(f"expected a mapping with a conversation, found {type(record).__name__}.")
    given = {key: value for key, value in record.items() if value is not None}
    layouts = [layout for layout in _LAYOUTS if all(key in given for key in layout)]
    if len(layouts) > 1:
        both = " as well as ".join(" and ".join(layout) for layout in layouts)
        raise ChatError(f"expected a conversation in one layout, found {both}. Leave out one.")
    if not layouts:
        columns = {key for layout in _LAYOUTS for key in layout}
        if columns & record.keys() and not columns & given.keys():
            return None
        found = ", ".join(map(repr, given)) or "none"
        raise ChatError(f"expected columns messages, or prompt and response, or instruction and output; found {found}.")
    messages = given["messages"] if layouts[0] == ("messages",) else _pair(given, *layouts[0])
    conversation = Conversation(_checked_messages(messages), _checked_tools(given))
    try:
        conversation.text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ChatError("no Unicode text: a lone surrogate in a message.") from error
    return conversation


def _pair(given: Mapping[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    for key in (question, answer, "system", "input"):
        if key in given and not isinstance(given[key], str):
            raise ChatError(f"expected text in column '{key}', found {type(given[key]).__name__}.")
    for key in (question, answer):
        if not given[key].strip():
            raise ChatError(f"column '{key}' is empty.")
    said = given[question]
    if question == "instruction" and given.get("input", "").strip():
        said = f"{said}\n\n{given['input']}"
    system = [{"role": "system", "content": given["system"]}] if given.get("system", "").strip() else []
    return [*system, {"role": "user", "content": said}, {"role": "assistant", "content": given[answer]}]


def _checked_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ChatError(f"expected a list of messages, found {_kind(messages)}.")
    checked = tuple(_checked_message(message, f"message {n}") for n, message in enumerate(messages, 1))
    if not any(message["role"] == "assistant" for message in checked):
        raise ChatError("no message of the assistant, so there is nothing to learn.")
    return checked


def _checked_message(message: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError(f"{name}: expected a mapping with role and content, found {_kind(message)}.")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    role, content, calls = given.get("role"), given.get("content", ""), given.get("tool_calls")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise ChatError(f"{name}: expected a role of {', '.join(ROLES)}, found {role!r}.{hint}")
    if not isinstance(content, str):
        raise ChatError(f"{name} ({role}): expected text as its content, found {_kind(content)}.")
    if calls is not None and role != "assistant":
        raise ChatError(f"{name} ({role}): only the assistant can have tool_calls.")
    if calls is not None and not (isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)):
        raise ChatError(f"{name} ({role}): expected tool_calls to be a list of mappings, found {_kind(calls)}.")
    if not content.strip() and calls is None:
        raise ChatError(f"{name} ({role}): its content is empty.")
    return {**given, "content": content}


def _checked_tools(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = given.get("tools", ()) if "messages" in given else ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ChatError(f"expected column 'tools' to be a list of mappings, found {_kind(tools)}.")
    return tuple(tools)


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return "nothing" if value is None else type(value).__name__


# ---- rendering -----------------------------------------------------------------------------------------------------


class ChatFormat:
    """A tokenizer with a chat template.

    Args:
        tokenizer: gives the ids, and the template where none is given.
        template: Jinja source in place of the tokenizer's own; :data:`CHATML` where neither is there.

    Raises:
        UserError: the template is no Jinja, or has its ``{% generation %}`` blocks where transformers loses their
            place (in a macro, a ``set`` block, a filter block).
    """

    def __init__(self, tokenizer: TokenizerWrapper, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or tokenizer.chat_template or CHATML
        self.has_generation = _check_template(self.template)

    def render(self, conversation: Conversation) -> RenderedChat:
        """Render a conversation and find the assistant's turns in it.

        Raises:
            ChatError: the template refuses the conversation, or does not tell where the turns are.
        """
        self._check_tools(conversation)
        try:
            messages, tools = self._hidden([*conversation.messages]), self._hidden([*conversation.tools])
        except ValueError as error:
            raise ChatError(str(error)) from error
        if self.has_generation:
            text, answers = self._with_generation(messages, tools)
        else:
            text = self._render(messages, tools)
            found = self._by_prefixes(messages, tools, text) or self._by_marks(messages, tools, text)
            if found is None:
                raise ChatError(
                    "the chat template renders a turn of the assistant otherwise when more turns follow, or changes "
                    "what is said, so that the loss cannot be placed. Give the template {% generation %} blocks."
                )
            answers = found
        if self.tokenizer.special_tokens.escaped(text):
            raise ChatError("the chat template escapes a special token that is spelt in a message.")
        return RenderedChat(text, tuple(answers), messages[-1]["role"] == "assistant")

    def encode_batch(self, chats: Sequence[RenderedChat]) -> list[tuple[NDArray[Any], NDArray[np.uint8]]]:
        """Ids (uint16 or uint32 ``[n]``) and loss mask (uint8 ``[n]``) of each rendered conversation.

        One end-of-text token closes each, unless the template's last words, white space aside, are that token
        already. It is predicted where it follows a turn of the assistant.
        """
        end = self.tokenizer.special_texts["eos_token"]
        encoded = []
        for chat, encoding in zip(chats, self.tokenizer.encode_rendered([chat.text for chat in chats]), strict=True):
            ids = np.array(encoding.ids, self.tokenizer.token_dtype)
            mask = _token_mask(np.array(encoding.offsets, np.int64).reshape(-1, 2), chat.answers)
            if not chat.text.rstrip().endswith(end):
                ids = np.append(ids, ids.dtype.type(self.tokenizer.eos_id))
                mask = np.append(mask, np.uint8(chat.ends_with_answer))
            encoded.append((ids, mask))
        return encoded

    def _check_tools(self, conversation: Conversation) -> None:
        """Refuse what the template would leave out without a word."""
        if conversation.tools and "tools" not in self.template:
            raise ChatError("the chat template does not render tools.")
        if "tool_calls" not in self.template:
            for number, message in enumerate(conversation.messages, 1):
                if "tool_calls" in message:
                    raise ChatError(f"message {number}: the chat template does not render tool_calls.")

    def _hidden(self, values: list[Any]) -> list[Any]:
        hide = self.tokenizer.special_tokens.hide
        return [{key: value if key == "role" else _map_text(value, hide) for key, value in v.items()} for v in values]

    def _render(self, messages: list[Any], tools: list[Any], prompt: bool = False) -> str:
        return self._render_with_spans(messages, tools, prompt, spans=False)[0]

    def _render_with_spans(
        self, messages: list[Any], tools: list[Any], prompt: bool, spans: bool
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[messages],
                tools=tools or None,
                chat_template=self.template,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=prompt,
                strftime_now=_TODAY.strftime,
                **self.tokenizer.special_texts,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ChatError(f"the chat template refuses the conversation: {reason or type(error).__name__}.") from error
        return texts[0], [tuple(span) for span in found[0]] if spans else []

    def _with_generation(self, messages: list[Any], tools: list[Any]) -> tuple[str, list[Span]]:
        text, spans = self._render_with_spans(messages, tools, prompt=False, spans=True)
        spans = [(first, end) for first, end in spans if first < end]
        if not spans:
            raise ChatError("the chat template has no {% generation %} block around a turn of this conversation.")
        return text, spans

    def _by_prefixes(self, messages: list[Any], tools: list[Any], text: str) -> list[Span] | None:
        """What each turn adds to the text before it; None where the text before it is not what the text begins with."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt = self._render(messages[:number], tools, prompt=True)
                last = number + 1 == len(messages)
                through = text if last else self._render(messages[: number + 1], tools)
                if not (text.startswith(through) and through.startswith(prompt)):
                    return None
                turn, content = through[len(prompt) :], message["content"].strip()
                # Without a generation prompt the turn has its header in it, unless the content comes first.
                begins = bool(content) and turn.lstrip().startswith(content)
                if not begins and self._render(messages[:number], tools) == prompt:
                    return None
            except ChatError:  # many templates do not take an empty or half a conversation
                return None
            # White space after an end marker is layout; where nothing else ends the turn, it is the end marker.
            behind = turn[turn.find(content) + len(content) :] if content in turn else turn
            spans.append((len(prompt), len(prompt) + len(turn.rstrip() if behind.strip() else turn)))
        return spans

    def _by_marks(self, messages: list[Any], tools: list[Any], text: str) -> list[Span] | None:
        """From each content to the end marker that follows it where it is the last turn; None where that fails."""
        if _OPEN in text or _CLOSE in text:
            return None
        for mark in (_mark_all, _mark_stripped):
            marked = [
                {**message, "content": mark(message["content"])} if message["role"] == "assistant" else message
                for message in messages
            ]
            try:
                rendered = self._render(marked, tools)
                if rendered.replace(_OPEN, "").replace(_CLOSE, "") == text:
                    return self._marked_spans(marked, tools, rendered)
            except ChatError:
                continue
        return None

    def _marked_spans(self, marked: list[Any], tools: list[Any], rendered: str) -> list[Span] | None:
        turns = [number for number, message in enumerate(marked) if message["role"] == "assistant"]
        parts = rendered.replace(_CLOSE, _OPEN).split(_OPEN)
        marks = "".join(character for character in rendered if character in (_OPEN, _CLOSE))
        if marks != (_OPEN + _CLOSE) * len(turns):
            return None
        starts = np.cumsum([len(part) for part in parts]).tolist()  # where each mark stood, without the marks
        spans = []
        for nth, number in enumerate(turns):
            content, rest = parts[2 * nth + 1], parts[2 * nth + 2]
            through = self._render(marked[: number + 1], tools)
            tail = through[through.rfind(_CLOSE) + 1 :]
            end = tail.rstrip() or tail
            if not content.strip() or not rest.startswith(end):
                return None
            spans.append((starts[2 * nth], starts[2 * nth + 1] + len(end)))
        return spans


def _check_template(template: str) -> bool:
    """Whether a template has generation blocks; see :class:`ChatFormat` for what it raises."""
    from jinja2 import TemplateError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        # transformers' own environment: it knows {% generation %}, loop controls and its filters
        tree = _compile_jinja_template(template).environment.parse(template)
    except TemplateError as error:
        raise UserError(f"chat template: not a readable Jinja template ({error}). Mend the template.") from error
    around = (nodes.Macro, nodes.AssignBlock, nodes.FilterBlock)
    if any(_generation_blocks(node) for node in tree.find_all(around)):
        raise UserError(
            "chat template: a {% generation %} block stands in a macro, set block or filter block, where its place in "
            "the text is lost. Move it to the place where the text is written."
        )
    return bool(_generation_blocks(tree))


def _generation_blocks(node: Any) -> list[Any]:
    from jinja2 import nodes

    calls = [block.call.node for block in node.find_all(nodes.CallBlock)]
    return [call for call in calls if isinstance(call, nodes.ExtensionAttribute) and call.name == "_generation_support"]


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with all its texts changed, those in lists and mappings too; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(inner, change) for inner in value]
    return value


def _mark_all(content: str) -> str:
    return f"{_OPEN}{content}{_CLOSE}"


def _mark_stripped(content: str) -> str:
    """Marks within the white space around, which some templates trim."""
    inner = content.strip()
    before, _, after = content.partition(inner)
    return f"{before}{_OPEN}{inner}{_CLOSE}{after}"


def _token_mask(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.uint8]:
    """uint8 ``[n]``: 1 for tokens (int64 ``[n, 2]`` first character and end) with a character in one of the spans."""
    mask = np.zeros(len(offsets), np.uint8)
    for first, end in spans:
        mask[(offsets[:, 0] < end) & (offsets[:, 1] > first)] = 1
    return mask
