"""Text to token ids and back, with a fingerprint that shards and checkpoints are held against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cheapertraining.data.special_tokens import SpecialTokens
from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["END_OF_TEXT", "TokenizerWrapper", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerWrapper:
    """A Hugging Face tokenizer reduced to what training data needs: ids without added specials, EOS, a chat template.

    Args:
        source: a folder that holds ``tokenizer.json`` (read without importing transformers), anything that
            ``transformers.AutoTokenizer.from_pretrained`` takes and that has a fast tokenizer, or such a
            tokenizer itself.

    Raises:
        UserError: nothing usable at ``source``, or the tokenizer has no end-of-text token.
    """

    def __init__(self, source: str | Path | PreTrainedTokenizerFast) -> None:
        if isinstance(source, str | Path):
            self.path = str(source)
            loaded = _load(self.path)
        else:
            self.path = source.name_or_path
            loaded = _backend_of(source, self.path)
        self._tokenizer = loaded.tokenizer
        self.chat_template: str | None = loaded.chat_template
        """Jinja source of the template that renders conversations; None where the tokenizer has none."""
        self.special_texts: dict[str, str] = loaded.special_texts
        """Texts of the special tokens by role (``bos_token``, ``eos_token``, ...), which chat templates refer to."""
        eos, pad = self.special_texts.get("eos_token"), self.special_texts.get("pad_token")
        self._special_tokens: SpecialTokens | None = None
        # Truncation or padding saved with a tokenizer would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells a special token is text; it must not become the token.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if eos is None or eos not in vocabulary:
            raise UserError(
                f"tokenizer '{self.path}': it has no end-of-text token (eos_token is {eos!r}). Documents are "
                "separated by it: set eos_token in its tokenizer_config.json to a token of its vocabulary."
            )
        self.eos_id: int = vocabulary[eos]
        self.pad_id: int = vocabulary.get(pad, self.eos_id) if pad else self.eos_id
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.fingerprint: str = _fingerprint(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added and nothing is cut."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, computed together (in parallel threads where the library is allowed to)."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_rendered(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings (ids and offsets in characters) of texts that a chat template rendered.

        Special tokens are parsed, except where :attr:`special_tokens` hid their spelling before rendering; none is
        added.
        """
        return self.special_tokens.encode_batch(texts)

    @property
    def special_tokens(self) -> SpecialTokens:
        """The special tokens, told apart from text that spells them; made when first asked for."""
        if self._special_tokens is None:
            self._special_tokens = SpecialTokens(self._tokenizer)
        return self._special_tokens

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickling a tokenizer forgets that special tokens spelt in text are text."""
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    @property
    def token_dtype(self) -> str:
        """The smallest of ``"uint16"`` and ``"uint32"`` that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> TokenizerWrapper:
    """Train a byte-level BPE tokenizer (every string of bytes can be encoded) and save it to ``folder``.

    The folder loads with ``transformers.AutoTokenizer``; ``<|endoftext|>`` has id 0. The same texts in the
    same order give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return TokenizerWrapper(folder)


class _Loaded(NamedTuple):
    tokenizer: Tokenizer
    special_texts: dict[str, str]
    chat_template: str | None


def _load(path: str) -> _Loaded:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return _load_with_transformers(path)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        settings = _read_json(file.with_name("tokenizer_config.json"))
        special = _read_json(file.with_name("special_tokens_map.json")) | settings
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise UserError(f"tokenizer '{file}': not a readable tokenizer file ({error}). Make it anew.") from error
    template: Any = settings.get("chat_template")
    if (beside := file.with_name("chat_template.jinja")).is_file():  # transformers prefers it too
        template = beside.read_text(encoding="utf-8")
    elif isinstance(template, list):  # several, as {name, template}
        template = {entry["name"]: entry["template"] for entry in template}
    texts = {key: text for key in _ROLES if (text := _token_text(special.get(key))) is not None}
    return _Loaded(tokenizer, texts, _chat_template(template, path))


def _load_with_transformers(path: str) -> _Loaded:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer '{path}': expected a folder with tokenizer.json or a Hugging Face tokenizer name, "
            f"found neither ({reason}). Check the path."
        ) from error
    return _backend_of(tokenizer, path)


def _backend_of(tokenizer: PreTrainedTokenizerFast, path: str) -> _Loaded:
    """A copy of the fast tokenizer inside a transformers tokenizer, so that its own settings stay as they are."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer '{path}': it has no fast version (tokenizer.json). Use one that has.")
    texts = {key: str(text) for key in _ROLES if (text := tokenizer.special_tokens_map.get(key)) is not None}
    return _Loaded(Tokenizer.from_str(backend.to_str()), texts, _chat_template(tokenizer.chat_template, path))


def _chat_template(found: Any, path: str) -> str | None:
    """A tokenizer has one template, or several by name, of which ``default`` is meant.

    Raises:
        UserError: several, and none of them is the default.
    """
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"tokenizer '{path}': expected a chat template named 'default', found {', '.join(found) or 'none'}. "
                "Name one of them so in its tokenizer_config.json."
            )
        found = found["default"]
    return found if isinstance(found, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _token_text(entry: Any) -> str | None:
    """A special token is saved as a string or as a mapping with ``content``."""
    value = entry.get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else None


def _fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits of the SHA-256 of all that decides which ids a text gets."""
    parts = json.loads(tokenizer.to_str())
    parts.pop("truncation", None)
    parts.pop("padding", None)
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8")
    return hashlib.sha256(canonical).hexdigest()[:16]
