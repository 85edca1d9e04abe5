"""Every document of the small real corpora comes back from its shards; skipped where the corpora are not there."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cheapertraining.data import TokenizerWrapper, train_bpe
from cheapertraining.data.conversion import Job, Settings, TextEncoder, convert
from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.pieces import list_pieces
from tests.data.streamed import streamed

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
DOMAINS = sorted(folder.parent.name + "/" + folder.name for folder in CORPORA.glob("*/*") if folder.is_dir())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    with gzip.open(CORPORA / "embed/wiki/probe.jsonl.gz", "rt", encoding="utf-8") as handle:
        return train_bpe([json.loads(line)["text"] for line in handle], 2000, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.skipif(not DOMAINS, reason="needs the corpora beside the checkout")
@pytest.mark.parametrize("domain", DOMAINS or ["none"])
def test_every_document_comes_back(domain: str, tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    file = CORPORA / domain / "heldout.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle]
    longest = max(len(tokenizer.encode(text)) + 1 for text in texts)
    settings = Settings("s", longest, (("train", 1.0),), compression="zstd:3")
    job = Job(settings, TextEncoder(tokenizer.path), tuple(list_pieces([str(file)])), Destination(str(tmp_path / "s")),
              tmp_path / "s" / ".conversion")  # fmt: skip
    report = convert(job)
    found: Counter[str] = Counter()
    for row in streamed(tmp_path / "s" / "train"):
        for ids in np.split(row["tokens"], np.cumsum(row["doc_lengths"]))[:-1]:
            found[tokenizer.decode(ids[:-1].tolist())] += 1
    assert found == Counter(texts)
    assert report.metas["train"].cut_documents == 0
