"""Small shards of real text for the benchmarks, from the standard library's source code: no download, any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cheapertraining.data import train_bpe, write_split
from tools.sample.python_text import make_code

SPLITS = ("heldout", "probe")
SHARE = 0.1  # of the documents, for each of SPLITS; the rest is train


def library_texts(size: int, seed: int = 0) -> list[str]:
    """About ``size`` bytes of the standard library in pieces of some thousand characters, in random order."""
    texts = list(dict.fromkeys(document.text for document in make_code(size).documents))
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order]


def write_sources(
    folder: Path, texts: Mapping[str, Sequence[str]], probe: str, *, vocab_size: int, seq_len: int
) -> Path:
    """Tokenize, pack and write ``texts`` by source, split by document, with a tokenizer trained on all of it.

    Returns:
        A data yaml whose only probe is the ``probe`` split of source ``probe``.
    """
    tokenizer = train_bpe((text for source in texts.values() for text in source), vocab_size, folder / "tokenizer")
    for name, documents in texts.items():
        share = max(1, round(SHARE * len(documents)))
        parts = {split: documents[i * share : (i + 1) * share] for i, split in enumerate(SPLITS)}
        parts["train"] = documents[len(SPLITS) * share :]
        for split, part in parts.items():
            write_split(
                folder / name / split,
                part,
                tokenizer,
                seq_len=seq_len,
                source=name,
                split=split,
                license="PSF-2.0",
                origin="standard library of the Python that wrote this",
            )
    sources = "".join(f"    {name}: {{weight: 1.0}}\n" for name in texts)
    path = folder / "data.yaml"
    path.write_text(
        f"data:\n  local: {folder}\n  seq_len: {seq_len}\n  sources:\n{sources}"
        f"  probes:\n    {probe}: {{source: {probe}}}\n",
        encoding="utf-8",
    )
    return path
