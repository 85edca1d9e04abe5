"""Chat templates and tokenizers for the tests of conversations."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from cheapertraining.data import TokenizerWrapper, train_bpe

TEXTS = [
    "the user asks and the assistant answers, system and tool too",
    "What is the capital of France? It is Paris. Grüße, 世界",
]
SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|eot|>",
    "<|head|>",
    "<|/head|>",
)

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

GENERATION = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
    {%- generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}
        {{- '<|im_end|>' }}
    {%- endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA = """\
{{ bos_token }}{% for message in messages %}\
{{ '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""

INST = """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

# The last turn alone begins with a thinking block, so that turns look otherwise once more follow.
THINKING = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}\
{{ message['content'].strip() + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The prompt has a thinking block that the turn has not.
THINKING_PROMPT = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

# No generation prompt, though there is a header.
NO_PROMPT = """\
{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"""

# Only the last answer is closed.
LAST_CLOSED = """\
{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}\
{% if loop.last %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def make_tokenizer(folder: Path, template: str | None = None, specials: tuple[str, ...] = SPECIALS) -> TokenizerWrapper:
    """A byte-level BPE tokenizer of some hundred tokens with special tokens, and perhaps a chat template."""
    train_bpe(TEXTS, 330, folder)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.save(str(file))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"bos_token": "<s>", "eos_token": "</s>"} if "</s>" in specials else {}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return TokenizerWrapper(folder)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
