"""A teacher's targets on disk: what is written is read beside the right tokens, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cheapertraining.config import load_data_config
from cheapertraining.data import get_loader
from cheapertraining.data.mixing import MixtureLoader
from cheapertraining.distillation import SampledTargets, TopKTargets, shifted_mask
from cheapertraining.distillation.cached import TARGETS_KEY, CachedTeacher
from cheapertraining.distillation.drawing import Drawing, draw, uniforms
from cheapertraining.distillation.packing import Layout, pack_sampled, pack_top
from cheapertraining.distillation.teacher import TeacherWrapper
from cheapertraining.errors import UserError
from tests.distillation.tiny import TEACHER, save_teacher, write_cache
from tests.observe.tiny_trainer import tiny_loader
from tools.cache_teacher import main as cache_main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def caches(tiny_sample: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``sampled`` and ``top_k`` over all sources."""
    folder = tmp_path_factory.mktemp("caches")
    write_cache(tiny_sample, teacher, folder / "sampled", size=50)
    write_cache(tiny_sample, teacher, folder / "top_k", kind="top_k", size=12)
    return folder


@pytest.fixture
def cache(caches: Path, tmp_path: Path) -> Path:
    """A cache to be spoiled."""
    return Path(shutil.copytree(caches / "sampled", tmp_path / "cache"))


@pytest.mark.parametrize("vocabulary", [500, 262_144, 262_145])
def test_packed_draws_come_back(vocabulary: int) -> None:
    generator, layout = np.random.default_rng(0), Layout("sampled", 63, vocabulary, 9)
    ids = np.stack([np.sort(generator.choice(vocabulary, 12, replace=False)) for _ in range(9)])
    counts = generator.integers(0, 6, (9, 12))
    counts[3], ids[0, -1], counts[0, -1] = 0, vocabulary - 1, 63
    record = pack_sampled(layout, ids, counts)
    assert len(record) == 9 + int((counts > 0).sum()) * (3 if vocabulary <= 262_144 else 4)
    padded = torch.cat([torch.frombuffer(bytearray(record), dtype=torch.uint8), torch.full((5,), 255).byte()])
    found = layout.unpack_sampled(padded[None])
    for position in range(9):
        pairs = zip(found.ids[0, position].tolist(), found.counts[0, position].tolist(), strict=True)
        expected = zip(ids[position].tolist(), counts[position].tolist(), strict=True)
        assert {i: n for i, n in pairs if n} == {i: n for i, n in expected if n}


@pytest.mark.parametrize("vocabulary", [500, 70_000, 17_000_000])
def test_packed_top_k_comes_back(vocabulary: int) -> None:
    generator, layout = np.random.default_rng(1), Layout("top_k", 4, vocabulary, 6)
    ids = generator.integers(0, vocabulary, (6, 4))
    logs, tail = -20 * generator.random((6, 4)), -3 * generator.random(6)
    present = np.array([True, False, True, True, False, True])
    tail[0], ids[5, 3] = -np.inf, vocabulary - 1
    found = layout.unpack_top(
        torch.frombuffer(bytearray(pack_top(layout, ids, logs, tail, present)), dtype=torch.uint8)[None]
    )
    assert found.present[0].tolist() == present.tolist()
    assert found.ids[0].numpy()[present].tolist() == ids[present].tolist()
    np.testing.assert_allclose(found.log_probs[0].numpy()[present], logs[present], rtol=2**-11)
    assert float(found.log_tail[0, 0]) == -65504.0
    np.testing.assert_allclose(found.log_tail[0].numpy()[[2, 3, 5]], tail[[2, 3, 5]], rtol=2**-11)


@pytest.mark.parametrize("drawing", ["systematic", "multinomial"])
def test_draws_are_unbiased(drawing: Drawing) -> None:
    """Means over 4,000 draws within 5 standard errors of p, and systematic counts next to R p."""
    rounds, repeats = 8, 4000
    log_p = torch.tensor([0.55, 0.2, 0.12, 0.1, 0.03, 0.0]).log()
    numbers = np.concatenate([uniforms(0, "s", k, 1, rounds, drawing) for k in range(repeats)])
    ids, counts = draw(log_p.expand(repeats, -1), numbers)
    table = np.zeros((repeats, 6))
    np.add.at(table, (np.arange(repeats)[:, None], ids), counts)
    assert (table.sum(axis=1) == rounds).all()
    assert (table[:, 5] == 0).all()
    p = log_p.exp().numpy()
    error = np.maximum(table.std(axis=0), 1e-3) / np.sqrt(repeats)
    assert (np.abs(table.mean(axis=0) - rounds * p) < 5 * error).all()
    if drawing == "systematic":
        assert (np.abs(table - rounds * p) < 1).all()
    else:  # binomial
        np.testing.assert_allclose(table.var(axis=0), rounds * p * (1 - p), rtol=0.15, atol=0.01)


def test_killed_and_resumed_with_other_processes_gives_the_same_bytes(
    tiny_sample: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [str(tiny_sample / source / "train") for source in ("code", "docs")]
    options = ["--teacher", str(teacher), "--shards", *shards, "--batch-size", "2", "--size", "20"]
    assert cache_main([*options, "--out", str(tmp_path / "whole")]) == 0
    killed = [
        sys.executable,
        "-m",
        "tools.cache_teacher",
        *options,
        "--out",
        str(tmp_path / "killed"),
        "--processes",
        "2",
    ]
    with subprocess.Popen(killed, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        parts = tmp_path / "killed" / ".parts"
        while len(list(parts.glob("part-*.npz"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not list((tmp_path / "killed").glob("*/train"))
    assert cache_main([*options, "--out", str(tmp_path / "killed")]) == 2  # without --resume
    assert "--resume" in capsys.readouterr().err
    assert cache_main([*options[:-1], "21", "--out", str(tmp_path / "killed"), "--resume"]) == 2
    assert "size" in capsys.readouterr().err
    assert cache_main([*options, "--out", str(tmp_path / "killed"), "--resume"]) == 0
    assert "bytes each" in capsys.readouterr().out
    whole = {file.relative_to(tmp_path / "whole"): file for file in (tmp_path / "whole").rglob("*") if file.is_file()}
    assert len(whole) == 6
    for name, file in whole.items():
        assert (tmp_path / "killed" / name).read_bytes() == file.read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize(("kind", "ranks"), [("sampled", 1), ("sampled", 2), ("top_k", 1)])
def test_targets_are_those_of_the_rows_in_the_batch(
    tiny_sample: Path, teacher: Path, caches: Path, kind: str, ranks: int
) -> None:
    """Whatever the mixture and rank: against the live teacher on the same rows."""
    live = TeacherWrapper.load(teacher)
    for rank in range(ranks):
        config = load_data_config(tiny_sample / "data.yaml")
        loader = get_loader(config, batch_size=12, lag=2, seed=5, rank=rank, world_size=ranks)
        cached = CachedTeacher(caches / kind, loader.mixture, teacher=live.fingerprint())
        for number, batch in zip(range(6), loader, strict=False):
            if number == 1:
                loader.mixture.set_weights({"code": 0.1, "docs": 3.0, "topics": 0.5})
            mask = shifted_mask(batch["labels"])
            log_p = live.model(batch)["logits"].float().log_softmax(-1)
            targets = cached(batch)
            if isinstance(targets, TopKTargets):
                expected, ids = log_p.topk(12, dim=-1)
                assert (targets.ids == ids)[mask].float().mean() > 0.999  # float16 ties
                torch.testing.assert_close(targets.log_probs[mask], expected[mask], rtol=2e-3, atol=1e-4)
                mass = targets.log_probs.exp().sum(-1) + targets.tail.exp()
                torch.testing.assert_close(mass[mask], torch.ones(int(mask.sum())), rtol=0, atol=0.01)
            else:
                assert isinstance(targets, SampledTargets)
                torch.testing.assert_close(targets.weights.sum(-1)[mask], torch.ones(int(mask.sum())))
                assert (targets.weights.sum(-1)[~mask] == 0).all()
                found = torch.zeros_like(log_p).scatter_add(2, targets.ids, targets.weights)
                # Systematic draws are within one of R p.
                assert float((found - log_p.exp())[mask].abs().max()) <= 1 / 50 + 1e-4
        loader.close()


def test_a_source_without_weight_needs_no_cache(tiny_sample: Path, teacher: Path, caches: Path, tmp_path: Path) -> None:
    some = Path(shutil.copytree(caches / "sampled", tmp_path / "some"))
    shutil.rmtree(some / "topics")
    loader = tiny_loader(tiny_sample)
    cached = CachedTeacher(some, loader.mixture, sources=["code", "docs"])
    batch = next(iter(loader))
    targets, mask = cached(batch), shifted_mask(batch["labels"])
    assert isinstance(targets, SampledTargets)
    assert set(batch["source"].tolist()) == {0, 1, 2}
    torch.testing.assert_close(targets.weights.sum(-1)[mask], torch.ones(int(mask.sum())))
    with pytest.raises(UserError, match=r"topics/train/meta.json: expected a teacher's targets, found none"):
        CachedTeacher(some, tiny_loader(tiny_sample).mixture)


def _edit_meta(**changes: Any) -> Callable[[Path], None]:
    def edit(cache: Path) -> None:
        file = cache / "docs" / "train" / "meta.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _truncate(cache: Path) -> None:
    file = cache / "docs" / "train" / "shard.00000.mds"
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cache: shutil.rmtree(cache / "docs"), "expected a teacher's targets, found none"),
        (_truncate, "truncated or missing: expected .* bytes, found"),
        (lambda cache: (cache / "docs/train/shard.00000.mds").unlink(), "truncated or missing: .*found no file"),
        (lambda cache: (cache / "docs/train/index.json").unlink(), "expected a finished folder of records"),
        (_edit_meta(shards="other"), "made with another shards"),
        (_edit_meta(tokenizer_fingerprint="other"), "made with another tokenizer_fingerprint"),
        (_edit_meta(teacher="other"), "made with another teacher"),
        (_edit_meta(size=49), "made with another size"),
        (_edit_meta(seq_len=64), "made with another seq_len"),
        (_edit_meta(format_version=9), "expected format version 1 of targets, found 9"),
        (lambda cache: (cache / "docs/train/meta.json").write_text("{"), "unreadable"),
    ],
)
def test_a_cache_that_is_not_the_right_one_is_refused(
    tiny_sample: Path, cache: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(cache)
    with pytest.raises(UserError, match=message):
        CachedTeacher(cache, tiny_loader(tiny_sample).mixture)


def test_records_of_other_rows_or_tokens_are_refused(tiny_sample: Path, cache: Path) -> None:
    """The folders are whole, but what is in them is not of the row that is read."""
    loader = tiny_loader(tiny_sample)
    CachedTeacher(cache, loader.mixture)
    store = loader.mixture.store
    sidecar = store._sidecars[TARGETS_KEY][1]
    row = np.array([3])
    tokens = store.read(store.ids(np.array([1]), row)).tokens
    assert len(sidecar.read(row, tokens)) == 1
    with pytest.raises(UserError, match="the record of row 3 is of other tokens"):
        sidecar.read(row, tokens + 1)
    file = cache / "docs" / "train" / "shard.00000.mds"
    data = bytearray(file.read_bytes())
    end = int.from_bytes(data[4 + 4 * 4 : 8 + 4 * 4], "little")  # of row 3
    data[end - 8] ^= 1
    file.write_bytes(data)
    sidecar._maps.clear()
    with pytest.raises(UserError, match="expected the record of row 3, found that of 2"):
        sidecar.read(row, tokens)


def test_a_batch_without_targets_is_refused(tiny_sample: Path, caches: Path) -> None:
    loader: MixtureLoader = tiny_loader(tiny_sample)
    cached = CachedTeacher(caches / "sampled", loader.mixture)
    batch = next(iter(loader))
    del batch[TARGETS_KEY]
    with pytest.raises(UserError, match="expected a teacher's targets in the batch"):
        cached(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "top_k", "size": 513}, "top_k: expected 1 to the vocabulary of 512, found 513"),
        ({"size": 64}, "rounds: expected 1 to 63 draws"),
        ({"kind": "topk"}, "--kind: expected one of sampled, top_k, found 'topk'. Did you mean 'top_k'"),
        ({"temperature": 0.0}, "--temperature"),
        ({"quantization": "4bit"}, "expected a CUDA device, found none"),
        ({"resume": True, "overwrite": True}, "--resume, --overwrite"),
    ],
)
def test_bad_settings_are_refused(
    tiny_sample: Path, teacher: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "quantization" in options and torch.cuda.is_available():
        pytest.skip("this machine may be able to")
    with pytest.raises(UserError, match=message):
        write_cache(tiny_sample, teacher, tmp_path / "out", **options)


def test_teachers_that_cannot_teach_are_refused(tiny_sample: Path, tmp_path: Path) -> None:
    short = save_teacher(tmp_path / "short", replace(TEACHER, max_position_embeddings=16))
    with pytest.raises(UserError, match=r"expected rows of up to 32 tokens, as data\.seq_len, found a context of 16"):
        write_cache(tiny_sample, short, tmp_path / "out")
    with pytest.raises(UserError, match="expected a folder with config"):
        write_cache(tiny_sample, tmp_path / "nothing", tmp_path / "out")
    broken = TeacherWrapper.load(save_teacher(tmp_path / "broken", replace(TEACHER, tie_embeddings=False)))
    often = int(next(iter(tiny_loader(tiny_sample)))["input_ids"].flatten().mode().values)
    body = broken.model.model
    body.get_input_embeddings().weight.data[often] = torch.eye(24)[0] * 1e3  # its states point along one axis
    body.get_output_embeddings().weight.data[300] = torch.eye(24)[0] * 1e38  # 4.9 times that is too much
    body.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="expected finite logits, found NaN or infinity for row"):
        write_cache(tiny_sample, tmp_path / "broken", tmp_path / "out")
