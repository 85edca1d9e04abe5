"""The conversion on a real Ray cluster of two nodes on this machine: the bytes of convert_text, and what goes wrong."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cheapertraining.data import pieces
from tools.convert_on_ray import main
from tools.convert_text import main as convert_text

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes of one core each, beside a head that takes no work."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some ten pieces of documents; a few come twice."""
    monkeypatch.setattr(pieces, "SMALLEST_PIECE", 20_000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for file in range(3):
        lengths = generator.lognormal(4.5, 1.2, 300).astype(int)
        texts = ["".join(generator.choice(list("def f(x)\n"), length)) for length in lengths]
        lines = [json.dumps({"text": text}) for text in [*texts, "twice", "again"]]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def options(corpus: Path, tiny_sample: Path, out: Path) -> list[str]:
    made = ["--tokenizer", str(tiny_sample / "tokenizer"), "--seq-len", "32", "--source", "s", "--deduplicate"]
    size = ["--shard-size", "40kb", "--window-tokens", "5000", "--split-by-hash", "train:0.9,heldout:0.1"]
    return [str(corpus), *made, *size, "--out", str(out)]


def same_files(one: Path, other: Path) -> bool:
    names = [sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) for root in (one, other)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, names[0], shallow=False)[1:])


def test_the_same_bytes_as_without_a_cluster(address: str, corpus: Path, tiny_sample: Path, tmp_path: Path) -> None:
    assert convert_text(options(corpus, tiny_sample, tmp_path / "alone")) == 0
    assert main([*options(corpus, tiny_sample, tmp_path / "ray"), "--address", address]) == 0
    assert len(list((tmp_path / "ray" / "train").glob("*.mds"))) > 2
    assert same_files(tmp_path / "alone", tmp_path / "ray")


def test_a_bad_record_is_one_line_and_mended_input_goes_on(
    address: str, corpus: Path, tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was finished before the error is kept: the rest is done by convert_text, without a cluster."""
    assert convert_text(options(corpus, tiny_sample, tmp_path / "alone")) == 0
    bad = corpus / "1.jsonl"
    good = bad.read_text(encoding="utf-8")
    bad.write_text(good.replace('{"text"', '{"txet"', 1), encoding="utf-8")
    capsys.readouterr()
    arguments = options(corpus, tiny_sample, tmp_path / "ray")
    assert main([*arguments, "--address", address]) == 2
    said = capsys.readouterr().err
    assert said.startswith("convert_on_ray: ")
    assert said.count("\n") == 1
    assert f"{bad}:1" in said
    assert not list((tmp_path / "ray").glob("*/index.json"))
    bad.write_text(good, encoding="utf-8")
    assert convert_text([*arguments, "--resume"]) == 0
    assert same_files(tmp_path / "alone", tmp_path / "ray")


def test_no_cluster_at_the_address(
    corpus: Path, tiny_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(corpus, tiny_sample, tmp_path / "out")
    assert main([*arguments, "--address", "127.0.0.1:1"]) == 2
    assert "convert_on_ray: --address: no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
