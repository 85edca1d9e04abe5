"""Real text as token shards for the mixture benchmark: made once, known by the hash of what went into it."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cheapertraining.data import TokenizerWrapper, train_bpe, write_split
from cheapertraining.errors import UserError
from tools.sample import noise
from tools.sample.build import Options, collect_splits

SEQ_LEN, VOCAB = 64, 1024
SPLITS = ("train", "probe", "heldout")
_VERSION = 1
_SAMPLE_BYTES = 1_800_000
CORRUPTED: dict[str, Callable[[str, random.Random], str]] = {
    "shuffled_words": noise.shuffled_words,
    "shuffled_letters": noise.shuffled_letters,
    "base64": noise.as_base64,
}
_LONGEST = 1500  # characters of a document before the damage

Texts = dict[str, dict[str, list[str]]]
"""By source, then by split."""


@dataclass(frozen=True)
class Corpus:
    """Shards of every source and split under ``folder``; ``fingerprint`` stands for all their bytes."""

    folder: Path
    fingerprint: str
    sources: tuple[str, ...]
    texts: Path

    def cut(self, source: str, tokens: int) -> Path:
        """A copy of a source whose train split is its first documents of about ``tokens`` tokens; made once."""
        place = self.folder / f"{source}_{tokens}"
        if not (place / "done").is_file():
            shutil.rmtree(place, ignore_errors=True)
            tokenizer = TokenizerWrapper(self.folder / "tokenizer")
            splits = json.loads((self.texts / f"{source}.json").read_text())
            kept: list[str] = []
            for text in splits["train"]:
                if tokens <= 0:
                    break
                kept.append(text)
                tokens -= len(tokenizer.encode(text)) + 1
            _write(place, {**splits, "train": kept}, source, tokenizer)
            (place / "done").touch()
        return place


def make_corpus(root: Path, corpora: Path | None, report: Callable[[str], None] = print) -> Corpus:
    """The embedded sample's texts, and those of ``corpora`` where it is given, tokenized and packed under ``root``.

    Args:
        root: keeps the shards; a second call finds them there.
        corpora: a folder of ``<source>/{train,probe,heldout}.jsonl.gz``, one object with a ``text`` a line.

    Raises:
        UserError: ``corpora`` has no such files.
    """
    texts = _sample_texts(root, report)
    if corpora is not None:
        texts |= _corpora_texts(corpora)
    texts |= _corrupted(texts["wiki" if "wiki" in texts else "docs"]["train"])
    fingerprint = _fingerprint(texts)
    folder = root / f"corpus-{fingerprint}"
    corpus = Corpus(folder, fingerprint, tuple(texts), folder / "texts")
    if (folder / "done").is_file():
        return corpus
    shutil.rmtree(folder, ignore_errors=True)
    report(f"writing shards of {len(texts)} sources to {folder}")
    corpus.texts.mkdir(parents=True)
    train = (text for splits in texts.values() for text in splits["train"])
    tokenizer = train_bpe(train, VOCAB, folder / "tokenizer")
    for source, splits in texts.items():
        _write(folder / source, splits, source, tokenizer)
        (corpus.texts / f"{source}.json").write_text(json.dumps(splits))
    (folder / "done").touch()
    return corpus


def _sample_texts(root: Path, report: Callable[[str], None]) -> Texts:
    """The sample's documents; they are kept, since making them takes a quarter of a minute."""
    kept = root / "sample_texts.json"
    if kept.is_file():
        stored: Texts = json.loads(kept.read_text())
        return stored
    root.mkdir(parents=True, exist_ok=True)
    _, splits, _ = collect_splits(Options(root / "sample", bytes_per_source=_SAMPLE_BYTES), report)
    texts = {
        source: {split: [document.text for document in documents] for split, documents in parts.items()}
        for source, parts in splits.items()
    }
    kept.write_text(json.dumps(texts))
    return texts


def _corpora_texts(corpora: Path) -> Texts:
    texts: Texts = {}
    for folder in sorted(entry for entry in corpora.iterdir() if entry.is_dir()):
        texts[folder.name] = {split: _read(folder / f"{split}.jsonl.gz") for split in SPLITS}
    if not texts:
        raise UserError(f"--corpora {corpora}: expected folders with train, probe and heldout .jsonl.gz, found none.")
    return texts


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--corpora: expected a file {path}, found none.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [str(json.loads(line)["text"]) for line in lines]
    random.Random(0).shuffle(texts)  # Pieces of one parent follow each other in the files.
    return texts


def _corrupted(train: Sequence[str]) -> Texts:
    """Damaged copies of one source, the same text under each kind of damage; they are trained on, never judged on."""
    return {
        name: {"train": [damage(text[:_LONGEST], random.Random(f"{name}/{i}")) for i, text in enumerate(train)]}
        for name, damage in CORRUPTED.items()
    }


def _write(folder: Path, splits: Mapping[str, Sequence[str]], source: str, tokenizer: TokenizerWrapper) -> None:
    for split, texts in splits.items():
        write_split(
            folder / split,
            texts,
            tokenizer,
            seq_len=SEQ_LEN,
            source=source,
            split=split,
            license="see the source",
            origin="made for a benchmark",
        )


def _fingerprint(texts: Texts) -> str:
    content = json.dumps([_VERSION, SEQ_LEN, VOCAB, texts], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
