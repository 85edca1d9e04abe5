"""Does the mixture move only where there is a reason, and then far enough? Real runs on corpora with a known answer.

Rows are so short here that a measurement takes 8 of each source; all else is as by default.
"""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cheapertraining.data import TokenizerWrapper, train_bpe, write_split
from tests.end_to_end.real_runs import read_metrics, record, write_yaml

pytestmark = pytest.mark.slow

BATCHES = 120
SOURCES = ("a", "b", "c", "d")


def library() -> list[str]:
    """Some 4,000 documents of one kind, paragraphs of the standard library's code.

    They are many and short on purpose: splits of few long documents are not alike, each has topics of its own.
    """
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    pieces = [piece for file in files for piece in file.read_text(encoding="utf-8").split("\n\n")]
    return [piece for piece in dict.fromkeys(pieces) if 120 <= len(piece) <= 600]


def write_corpus(folder: Path, sources: Mapping[str, Sequence[str]], probe: Sequence[str]) -> Path:
    """Shards of the sources and of a probe that is none of them; returns the data yaml."""
    texts = [text for documents in sources.values() for text in documents[:200]]
    tokenizer = train_bpe(texts, 512, folder / "tokenizer")

    def write(name: str, split: str, documents: Sequence[str], tokenizer: TokenizerWrapper) -> None:
        write_split(
            folder / name / split, documents, tokenizer, seq_len=32, source=name, split=split, license="PSF-2.0",
            origin="CPython standard library",
        )  # fmt: skip

    for name, documents in sources.items():
        write(name, "train", documents, tokenizer)
    write("target", "probe", probe, tokenizer)
    path = folder / "data.yaml"
    names = "".join(f"    {name}: {{}}\n" for name in sources)
    path.write_text(
        f"data:\n  local: {folder}\n  seq_len: 32\n  sources:\n{names}"
        f"  probes:\n    target: {{local: {folder}/target}}\n",
        encoding="utf-8",
    )
    return path


def write_run(folder: Path, data: Path, name: str) -> Path:
    return write_yaml(
        folder / f"{name}.yaml",
        data,
        max_duration=f"{BATCHES}ba",
        model={
            "hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2,
            "max_position_embeddings": 32,
        },
        algorithms={
            "gradient_clipping": {"threshold": 1.0},
            "online_mixing": {
                "strategy": "influence", "interval": "10ba", "warmup": "10ba", "influence": {"source_samples": 8},
            },
        },
    )  # fmt: skip


def write_null(folder: Path) -> Path:
    """Random splits of one corpus; the probe is another."""
    documents = library()
    random.Random(0).shuffle(documents)
    probe, rest = documents[:400], documents[400:]
    return write_corpus(folder, {name: rest[i :: len(SOURCES)] for i, name in enumerate(SOURCES)}, probe)


def write_rigged(folder: Path) -> Path:
    """Source ``a`` is of the probe's domain; the others are its characters shuffled, base64, and random words."""
    documents = library()
    generator = random.Random(0)
    generator.shuffle(documents)
    probe, target = documents[:400], documents[400:1400]
    shuffled = ["".join(generator.sample(text, len(text))) for text in target]
    encoded = [base64.b64encode(generator.randbytes(200)).decode() for _ in target]
    words = ["".join(generator.choices("bcdfg", k=5)) for _ in range(50)]
    nonsense = [" ".join(generator.choices(words, k=50)) for _ in target]
    return write_corpus(folder, {"a": target, "b": shuffled, "c": encoded, "d": nonsense}, probe)


def course(run: Path) -> list[dict[str, float]]:
    """The newest weights after every tenth batch."""
    steps = read_metrics(run)
    return [{name: steps[step][f"mixture/weight/{name}"] for name in SOURCES} for step in range(10, BATCHES + 1, 10)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs ``alike`` and ``rigged``."""
    folder = tmp_path_factory.mktemp("controls")
    for name, write in (("alike", write_null), ("rigged", write_rigged)):
        write_run(folder, write(folder / name), name)
    record(1, [{"label": name, "yaml": str(folder / f"{name}.yaml")} for name in ("alike", "rigged")], folder)
    return folder / "runs"


def test_null_control_stays_near_uniform(runs: Path) -> None:
    for weights in course(runs / "alike"):
        assert all(abs(weight / 0.25 - 1) < 0.1 for weight in weights.values()), weights


def test_rigged_control_gets_most_of_the_weight(runs: Path) -> None:
    steps = course(runs / "rigged")
    assert steps[9]["a"] > 0.5, f"after 100 batches: {steps[9]}"
    assert steps[-1]["a"] > steps[0]["a"]
