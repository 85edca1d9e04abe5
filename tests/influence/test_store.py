"""Parts on disk, and the low-rank gradient store: its scores against dense linear algebra."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence import store as store_module
from cheapertraining.influence.store import GradientStore, Parts, model_fingerprint, part_dtype
from tests.influence.tiny_llama import tiny_llama

ROOT = Path(__file__).parents[2]
WIDTHS = {"a.weight": 6, "b.weight": 4}
IDENTITY: dict[str, Any] = {"model": "abc", "projection_seed": 0, "projection_rank": 2, "shards": {"code": "1f"}}
SIZES = (5, 7, 3)


def gradients_of(part: int) -> torch.Tensor:
    """Low-rank gradients of one part; columns of unlike scale, so that a preconditioner matters."""
    generator = torch.Generator().manual_seed(part)
    return torch.randn(SIZES[part], 10, generator=generator) * torch.logspace(-1, 1, 10)


def units_of(part: int) -> np.ndarray:
    records = np.zeros(SIZES[part], part_dtype(0))
    records["sample_id"] = np.arange(SIZES[part]) + 100 * part
    records["tokens"], records["loss"] = 23, 1.5
    return records


def filled(folder: Path, dtype: str = "float32", **changes: Any) -> GradientStore:
    store = GradientStore(folder, WIDTHS, len(SIZES), IDENTITY | changes, dtype=dtype)
    for part in store.parts.missing():
        store.write(part, units_of(part), gradients_of(part))
    return store


def all_scores(store: GradientStore, probes: torch.Tensor | None, mode: Any, **options: Any) -> np.ndarray:
    return np.concatenate([values for _, _, values in store.scores(probes, mode, **options)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    return filled(tmp_path_factory.mktemp("stored") / "store")


@pytest.fixture(scope="module")
def gradients() -> torch.Tensor:
    return torch.cat([gradients_of(part) for part in range(len(SIZES))]).double()


@pytest.fixture(scope="module")
def probes() -> torch.Tensor:
    return torch.randn(2, 10, generator=torch.Generator().manual_seed(9))


def damped(gradients: torch.Tensor, damping: float) -> torch.Tensor:
    """``P F P^T + delta I``, dense, block by block."""
    whole = torch.zeros(10, 10, dtype=torch.float64)
    for block in (slice(0, 6), slice(6, 10)):
        fisher = gradients[:, block].T @ gradients[:, block] / len(gradients)
        whole[block, block] = fisher + damping * torch.linalg.eigvalsh(fisher).mean() * torch.eye(
            len(fisher), dtype=torch.float64
        )
    return whole


class TestScores:
    @pytest.mark.parametrize("damping", [0.1, 1e-3])
    def test_influence(
        self, store: GradientStore, gradients: torch.Tensor, probes: torch.Tensor, damping: float
    ) -> None:
        wanted = gradients @ torch.linalg.solve(damped(gradients, damping), probes.double().T)
        np.testing.assert_allclose(all_scores(store, probes, "influence", damping=damping), wanted, rtol=1e-9)

    def test_dot_and_cosine(self, store: GradientStore, gradients: torch.Tensor, probes: torch.Tensor) -> None:
        wanted = gradients @ probes.double().T
        np.testing.assert_allclose(all_scores(store, probes, "dot"), wanted, rtol=1e-9)
        lengths = gradients.norm(dim=1)[:, None] * probes.double().norm(dim=1)
        np.testing.assert_allclose(all_scores(store, probes, "cosine"), wanted / lengths, rtol=1e-9)

    def test_self_influence_is_that_of_a_unit_on_itself(self, store: GradientStore, gradients: torch.Tensor) -> None:
        wanted = (gradients * torch.linalg.solve(damped(gradients, 0.1), gradients.T).T).sum(dim=1)
        np.testing.assert_allclose(all_scores(store, None, "self")[:, 0], wanted, rtol=1e-9)

    def test_small_blocks_give_the_same(
        self, store: GradientStore, probes: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However little is in memory at a time (here two rows)."""
        before = all_scores(store, probes, "influence")
        monkeypatch.setattr(store_module, "_BLOCK_BYTES", 2 * 8 * 10)
        assert len(list(store.scores(probes, "dot"))) == 3 + 4 + 2
        np.testing.assert_allclose(all_scores(store, probes, "influence"), before, rtol=1e-12)

    def test_records_come_along(self, store: GradientStore, probes: torch.Tensor) -> None:
        samples = np.concatenate([records["sample_id"] for _, records, _ in store.scores(probes)])
        assert samples.tolist() == [*range(5), *range(100, 107), *range(200, 203)]

    def test_half_precision_takes_half_the_space(
        self, store: GradientStore, gradients: torch.Tensor, probes: torch.Tensor, tmp_path: Path
    ) -> None:
        half = filled(tmp_path / "half", "float16")
        found, wanted = all_scores(half, probes, "dot"), all_scores(store, probes, "dot")
        assert 0 < np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
        assert half.parts.dtype["values"].itemsize * 2 == store.parts.dtype["values"].itemsize

    def test_a_parameter_without_gradient(self, tmp_path: Path, probes: torch.Tensor) -> None:
        store = GradientStore(tmp_path / "zero", WIDTHS, 1, IDENTITY)
        values = gradients_of(0).clone()
        values[:, 6:] = 0
        store.write(0, units_of(0), values)
        assert np.isfinite(all_scores(store, probes, "influence")).all()


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "xyz"}, "made with another model: expected xyz, found abc"),
            ({"projection_seed": 1}, "made with another projection_seed: expected 1, found 0"),
            ({"projection_rank": 4}, "made with another projection_rank: expected 4, found 2"),
            ({"shards": {"code": "2e"}}, "made with another shards.code: expected 2e, found 1f"),
        ],
    )
    def test_a_store_of_something_else(self, store: GradientStore, change: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            GradientStore(store.parts.folder, WIDTHS, len(SIZES), IDENTITY | change)
        assert message in str(error.value)
        assert str(store.parts.folder) in str(error.value)
        assert "\n" not in str(error.value)

    def test_other_layers(self, store: GradientStore) -> None:
        with pytest.raises(UserError, match=r"another layers\.c\.weight: expected 4, found None"):
            GradientStore(store.parts.folder, {"a.weight": 6, "c.weight": 4}, len(SIZES), IDENTITY)

    def test_another_dtype(self, store: GradientStore) -> None:
        with pytest.raises(UserError, match="another dtype: expected float16, found float32"):
            GradientStore(store.parts.folder, WIDTHS, len(SIZES), IDENTITY, dtype="float16")
        with pytest.raises(UserError, match="expected dtype float16 or float32, found 'int8'"):
            GradientStore(store.parts.folder, WIDTHS, len(SIZES), IDENTITY, dtype="int8")

    def test_unfinished(self, tmp_path: Path, probes: torch.Tensor) -> None:
        store = GradientStore(tmp_path / "s", WIDTHS, 3, IDENTITY)
        store.write(1, units_of(1), gradients_of(1))
        with pytest.raises(UserError, match="expected 3 parts of gradients, found 1"):
            next(store.scores(probes))

    def test_not_finite(self, tmp_path: Path) -> None:
        store = GradientStore(tmp_path / "s", WIDTHS, 3, IDENTITY, dtype="float16")
        with pytest.raises(UserError, match="found NaN or infinity for sample 102"):
            store.write(1, units_of(1), gradients_of(1) * torch.tensor([1, 1, 1e9, 1, 1, 1, 1])[:, None])
        assert store.parts.missing() == [0, 1, 2]

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = GradientStore(tmp_path / "s", WIDTHS, 3, IDENTITY)

        def no_room(handle: Any, *_: Any, **__: Any) -> None:
            handle.write(b"half a part")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "save", no_room)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device; \d+ MiB free\)"):
            store.write(1, units_of(1), gradients_of(1))
        assert [file.name for file in (tmp_path / "s").iterdir()] == ["meta.json"]

    def test_probe_mode_and_damping(self, store: GradientStore, probes: torch.Tensor) -> None:
        with pytest.raises(UserError, match="expected probes of 10 columns, found 9"):
            next(store.scores(probes[:, 1:], "dot"))
        with pytest.raises(UserError, match=r"found 'influnce'\. Did you mean 'influence'\?"):
            next(store.scores(probes, "influnce"))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="expected a share above 0"):
            store.solve(probes, 0.0)

    def test_files_that_are_no_parts(self, tmp_path: Path, probes: torch.Tensor) -> None:
        store = filled(tmp_path / "s")
        content = store.parts.path(1).read_bytes()
        store.parts.path(1).write_bytes(content[:-7])
        with pytest.raises(UserError, match=r"part-000001\.npy: unreadable .* Remove it and resume"):
            all_scores(store, probes, "dot")
        np.save(store.parts.path(1), np.array([{"a": 1}], dtype=object), allow_pickle=True)  # no pickle is opened
        with pytest.raises(UserError, match="unreadable"):
            store.parts.read(1)
        np.save(store.parts.path(1), np.zeros(3))
        with pytest.raises(UserError, match="expected records of"):
            store.parts.read(1)
        (store.parts.folder / "meta.json").write_text("{")
        with pytest.raises(UserError, match=r"meta\.json: unreadable"):
            filled(tmp_path / "s")


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from cheapertraining.influence.store import Parts, part_dtype
parts = Parts(Path(sys.argv[1]), 200, part_dtype(50), {"of": "this"})
print("ready", flush=True)
for part in parts.missing()[int(sys.argv[2])::2]:
    records = np.zeros(40, parts.dtype)
    records["values"] = part
    parts.write(part, records)
    print(part, flush=True)
"""


def test_two_writers_killed_and_resumed(tmp_path: Path) -> None:
    """Parts are whole or absent after kill -9, and whoever goes on makes only those that are missing."""
    folder = tmp_path / "parts"
    writers = []
    for number in ("0", "1"):
        command = [sys.executable, "-c", WRITER, str(folder), number]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(4):  # ready, and three parts
            assert writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    assert [writer.wait() for writer in writers] == [-signal.SIGKILL] * 2
    parts = Parts(folder, 200, part_dtype(50), {"of": "this"})
    found = sorted(set(range(200)) - set(parts.missing()))
    assert 6 <= len(found) < 200
    assert all((parts.read(part)["values"] == part).all() and len(parts.read(part)) == 40 for part in found)
    times = {part: parts.path(part).stat().st_mtime_ns for part in found}
    for part in parts.missing():
        parts.write(part, np.zeros(40, parts.dtype))
    assert parts.missing() == []
    assert all(parts.path(part).stat().st_mtime_ns == when for part, when in times.items())


class TestFingerprint:
    def test_same_parameters(self) -> None:
        assert model_fingerprint(tiny_llama(0)) == model_fingerprint(tiny_llama(0))

    def test_any_change(self) -> None:
        model = tiny_llama(0)
        before = model_fingerprint(model)
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-17
        assert model_fingerprint(model) == before  # less than the spacing of floats at 1
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-12
        assert model_fingerprint(model) != before
        assert model_fingerprint(tiny_llama(0, torch.float32)) != before
        assert model_fingerprint(tiny_llama(0, tied=False)) != before

    def test_wrappers_and_modes_do_not_matter(self) -> None:
        model = tiny_llama(0)
        before = model_fingerprint(model)
        assert model_fingerprint(torch.nn.ModuleDict({"module": model})) == before
        model.train()
        assert model_fingerprint(model) == before

    def test_many_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = model_fingerprint(tiny_llama(0))
        monkeypatch.setattr(store_module, "_HASH_BYTES", 100)
        assert model_fingerprint(tiny_llama(0)) == before


def test_meta_says_what_it_is_of(store: GradientStore) -> None:
    meta = json.loads((store.parts.folder / "meta.json").read_text())
    assert {key: meta[key] for key in IDENTITY} == IDENTITY
    assert meta["layers"] == WIDTHS
    assert (meta["dtype"], meta["width"], meta["parts"]) == ("float32", 10, 3)


def test_reading_maps_the_file(store: GradientStore) -> None:
    assert isinstance(store.parts.read(0), np.memmap)


def test_parts_wait_for_nobody(tmp_path: Path) -> None:
    """A process that died while it wrote leaves a file that nobody takes for a part."""
    parts = Parts(tmp_path / "p", 2, part_dtype(1), {})
    (tmp_path / "p" / ".part-000000.1.unfinished").write_bytes(b"half")
    assert parts.missing() == [0, 1]
    parts.write(0, np.zeros(3, part_dtype(1)))
    assert parts.missing() == [1]
