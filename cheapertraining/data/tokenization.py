"""Text to token ids and back, with a fingerprint that shards and checkpoints are held against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cheapertraining.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["END_OF_TEXT", "TokenizerWrapper", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"


class TokenizerWrapper:
    """A Hugging Face tokenizer reduced to what pre-training needs: ids without added specials, EOS, a fingerprint.

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
            self._tokenizer, eos, pad = _load(self.path)
        else:
            self.path = source.name_or_path
            self._tokenizer, eos, pad = _backend_of(source, self.path)
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
        return [list(encoding.ids) for encoding in encodings]

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


def _load(path: str) -> tuple[Tokenizer, str | None, str | None]:
    """The backend tokenizer and its end-of-text and padding tokens."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return _load_with_transformers(path)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        settings = _read_json(file.with_name("tokenizer_config.json"))
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise UserError(f"tokenizer '{file}': not a readable tokenizer file ({error}). Make it anew.") from error
    special = _read_json(file.with_name("special_tokens_map.json")) | settings
    return tokenizer, _token_text(special.get("eos_token")), _token_text(special.get("pad_token"))


def _load_with_transformers(path: str) -> tuple[Tokenizer, str | None, str | None]:
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


def _backend_of(tokenizer: PreTrainedTokenizerFast, path: str) -> tuple[Tokenizer, str | None, str | None]:
    """A copy of the fast tokenizer inside a transformers tokenizer, so that its own settings stay as they are."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer '{path}': it has no fast version (tokenizer.json). Use one that has.")
    return Tokenizer.from_str(backend.to_str()), tokenizer.eos_token, tokenizer.pad_token


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
