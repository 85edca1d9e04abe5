"""Shards in, scores out: against a loop over samples with autograd; the same bytes whatever is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cheapertraining.config import load_run_config
from cheapertraining.data import (
    TokenizerWrapper,
    collate,
    get_loader,
    read_meta,
    train_bpe,
    write_documents,
    write_split,
)
from cheapertraining.data.documents import EncodedDocument
from cheapertraining.data.inspection import read_rows
from cheapertraining.data.rows import SampledRows
from cheapertraining.data.verification import verify
from cheapertraining.errors import UserError
from cheapertraining.influence.offline import score_shards
from cheapertraining.influence.scorers.consumers import Projection
from cheapertraining.training import train
from tests.tools.toy_scoring import load_toy, toy_job
from tools.score_influence import main

ROOT = Path(__file__).parents[2]
ABOUT = {"license": "none", "origin": "test"}
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two saved Llamas of one layer over the sample's vocabulary."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        folders.append(tmp_path_factory.mktemp("models") / str(seed))
        LlamaForCausalLM(config).save_pretrained(folders[-1])
    return folders


def places_in(sample: Path) -> tuple[list[Path], dict[str, Path]]:
    """Shards and probes; which split they are does not matter here, only that they are small."""
    return [sample / "docs" / "probe", sample / "code" / "heldout"], {
        "code": sample / "code" / "probe",
        "topics": sample / "topics" / "heldout",
    }


class Command:
    """The command line over the sample's shards: 36 rows of docs and 32 of code, and two probes."""

    def __init__(self, sample: Path, models: list[Path], folder: Path) -> None:
        self.sample, self.models, self.folder = sample, models, folder
        self.shards, self.probes = places_in(sample)
        self.out = folder / "scores.parquet"

    def arguments(self, *more: str, probes: bool = True, models: int = 1) -> list[str]:
        named = [word for name, place in self.probes.items() for word in ("--probe", f"{name}={place}")]
        places = [*map(str, self.models[:models]), "--shards", *map(str, self.shards)]
        return ["--model", *places, *(named if probes else []), "--out", str(self.out), *more]

    def table(self, *more: str, probes: bool = True, models: int = 1) -> dict[str, np.ndarray]:
        assert main(self.arguments(*more, "--overwrite", probes=probes, models=models)) == 0
        table = pq.read_table(self.out)
        return {name: table.column(name).to_numpy() for name in table.column_names}


@pytest.fixture
def command(tiny_sample: Path, models: list[Path], tmp_path: Path) -> Command:
    return Command(tiny_sample, models, tmp_path)


# ---- the reference: one sample at a time, and nothing of the package but the shards ------------------------
def batch_of(folder: Path, rows: list[int]) -> dict[str, torch.Tensor]:
    index = np.array(rows)
    return collate(SampledRows(read_rows(folder, rows), np.zeros_like(index), index))


def losses_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Losses by the position that is predicted, ``[B, S - 1]``, 0 where none is."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # with a cache, packed documents see each other
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none").view(
        len(logits), -1
    )


def gradients_of(model: LlamaForCausalLM, loss: torch.Tensor) -> Gradients:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def mean_gradient(model: LlamaForCausalLM, folder: Path) -> Gradients:
    batch = batch_of(folder, list(range(read_meta(folder).samples)))
    return gradients_of(model, losses_of(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum())


def product(a: Gradients, b: Gradients) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def reference(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def by_loop(tiny_sample: Path, models: list[Path]) -> dict[str, Any]:
    """Gradients of every third row of both shard folders, and of both probes."""
    model = reference(models[0])
    rows = {}
    shards, folders = places_in(tiny_sample)
    for source, folder in zip(("docs", "code"), shards, strict=True):
        for row in range(0, read_meta(folder).samples, 3):
            losses = losses_of(model, batch_of(folder, [row]))
            rows[source, row] = (float(losses.sum()), gradients_of(model, losses.sum()))
    probes = {name: mean_gradient(model, folder) for name, folder in folders.items()}
    return {"model": model, "rows": rows, "probes": probes}


def places(table: dict[str, np.ndarray]) -> dict[tuple[str, int], int]:
    return {key: place for place, key in enumerate(zip(table["source"], table["sample_id"].tolist(), strict=True))}


def close(found: list[float], wanted: list[float], relative: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=relative * float(np.abs(wanted).max()))


# ---- scores ------------------------------------------------------------------------------------------------
def test_dot_is_what_a_loop_gives(command: Command, by_loop: dict[str, Any]) -> None:
    table = command.table()
    assert list(table) == ["source", "sample_id", "tokens", "loss", "code", "topics"]
    place = places(table)
    assert len(place) == sum(read_meta(folder).samples for folder in command.shards)
    for name, direction in by_loop["probes"].items():
        found = [table[name][place[key]] for key in by_loop["rows"]]
        close(found, [product(gradient, direction) for _, gradient in by_loop["rows"].values()])
    close([table["loss"][place[key]] for key in by_loop["rows"]], [loss for loss, _ in by_loop["rows"].values()])
    batch = batch_of(command.shards[0], list(range(36)))
    assert table["tokens"][:36].tolist() == (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()


def test_cosine_and_self(command: Command, by_loop: dict[str, Any]) -> None:
    lengths = [product(gradient, gradient) ** 0.5 for _, gradient in by_loop["rows"].values()]
    table = command.table("--estimator", "cosine")
    place = places(table)
    for name, direction in by_loop["probes"].items():
        products = [product(gradient, direction) for _, gradient in by_loop["rows"].values()]
        wanted = np.array(products) / lengths / product(direction, direction) ** 0.5
        close([table[name][place[key]] for key in by_loop["rows"]], wanted.tolist())
    table = command.table("--estimator", "self", probes=False)
    close([table["self"][place[key]] for key in by_loop["rows"]], [length**2 for length in lengths])


def test_layers(command: Command, by_loop: dict[str, Any]) -> None:
    table = command.table("--layers", "*.mlp.*", "model.norm.weight")
    place = places(table)
    kept = [name for name in by_loop["probes"]["code"] if ".mlp." in name or name == "model.norm.weight"]
    direction = {name: by_loop["probes"]["code"][name] for name in kept}
    wanted = [product(direction, {name: each[name] for name in kept}) for _, each in by_loop["rows"].values()]
    assert len(kept) == 4
    close([table["code"][place[key]] for key in by_loop["rows"]], wanted)


def test_by_document(command: Command, by_loop: dict[str, Any]) -> None:
    """Documents that share rows, one by one against a loop; what fills up a row is none."""
    model, folder = by_loop["model"], command.folder / "short"
    texts = [f"def f{number}(x):\n    return x{' + x' * (number % 4)}" for number in range(11)]
    tokenizer = TokenizerWrapper(command.sample / "tokenizer")
    write_split(folder, texts, tokenizer, seq_len=32, source="short", split="train", **ABOUT)
    command.shards = [folder]
    table = command.table("--by", "document")
    assert list(table) == ["source", "sample_id", "document", "tokens", "loss", "code", "topics"]
    assert len(table["code"]) == len(texts)
    wanted, numbers = [], []
    for row in range(read_meta(folder).samples):
        losses, lengths = losses_of(model, batch_of(folder, [row])), read_rows(folder, [row]).doc_lengths
        for number, (end, length) in enumerate(zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True)):
            own = losses[:, max(0, end - length - 1) : end - 1].sum()  # what is predicted from within it
            wanted.append(product(gradients_of(model, own), by_loop["probes"]["code"]))
            numbers.append((row, number, length - 1))
    assert max(number for _, number, _ in numbers) > 0
    assert read_meta(folder).padding > 0
    found = [table[name].tolist() for name in ("sample_id", "document", "tokens")]
    assert list(zip(*found, strict=True)) == numbers
    close(table["code"].tolist(), wanted)


def test_by_source_is_the_token_mean_with_its_error(command: Command) -> None:
    samples, sources = command.table(), command.table("--by", "source")
    assert sources["source"].tolist() == ["docs", "code"]
    for place, name in enumerate(sources["source"]):
        mine = samples["source"] == name
        scores, tokens = samples["topics"][mine], samples["tokens"][mine]
        mean = scores.sum() / tokens.sum()
        residuals = scores - mean * tokens
        error = (len(scores) / (len(scores) - 1) * (residuals**2).sum()) ** 0.5 / tokens.sum()
        close([sources["topics"][place], sources["topics_error"][place]], [mean, error], 1e-9)
        assert (sources["samples"][place], sources["tokens"][place]) == (len(scores), tokens.sum())
        close([sources["loss"][place]], [samples["loss"][mine].sum() / tokens.sum()], 1e-9)


def test_several_models_are_averaged(command: Command) -> None:
    first = command.table()
    command.models = command.models[::-1]
    second = command.table()
    both = command.table(models=2)
    assert np.abs(first["code"] - second["code"]).max() > 0.1
    np.testing.assert_allclose(both["code"], (first["code"] + second["code"]) / 2, rtol=1e-12)
    np.testing.assert_allclose(both["loss"], (first["loss"] + second["loss"]) / 2, rtol=1e-12)


def test_forward_passes_give_nearly_the_same(command: Command) -> None:
    exact, found = command.table(), command.table("--scorer", "forward")
    assert np.corrcoef(exact["code"], found["code"])[0, 1] > 0.9999
    assert not np.array_equal(exact["code"], found["code"])


@pytest.mark.parametrize("estimator", ["datainf", "ekfac"])
def test_a_curvature_changes_scores_and_is_fitted_on_the_shards(command: Command, estimator: str) -> None:
    """Formulas have tests of their own; here: that it is another ranking, that it is fitted on rows of the shards, and
    that the number of rows it is fitted on counts."""
    plain = command.table()["code"]
    found = command.table("--estimator", estimator)["code"]
    few = command.table("--estimator", estimator, "--fit-samples", "4")["code"]
    assert 0.3 < np.corrcoef(plain, found)[0, 1] < 0.9999
    assert 0.3 < np.corrcoef(few, found)[0, 1] < 0.9999


def test_logra_is_the_projected_formula(command: Command, by_loop: dict[str, Any]) -> None:
    """Every gradient formed, projected and multiplied densely; then other probes over the store that was kept."""
    command.shards = command.shards[1:]
    store = command.folder / "store"
    options = ("--rank", "3", "--seed", "5", "--store", str(store))
    table = command.table("--estimator", "logra", *options)
    model = by_loop["model"]
    projection = Projection.random(dict(model.named_parameters()), 3, 5)

    def projected(gradient: Gradients) -> Gradients:
        return {
            name: (left @ gradient[name] @ projection.right[name].T).flatten().double()
            for name, left in projection.left.items()
        }

    batch = batch_of(command.shards[0], list(range(len(table["code"]))))
    each = losses_of(model, batch).sum(dim=1)
    rows = [projected(gradients_of(model, loss)) for loss in each]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in projection.left}
    for probe in ("code", "topics"):
        direction, wanted = projected(by_loop["probes"][probe]), torch.zeros(len(rows), dtype=torch.float64)
        for name, block in stacked.items():
            fisher = block.T @ block / len(rows)
            damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
            wanted += block @ torch.linalg.solve(damped, direction[name])
        close(table[probe].tolist(), wanted.tolist(), 1e-4)
    written = {file: file.stat().st_mtime_ns for file in store.rglob("part-*.npy")}
    assert written
    command.probes = {"docs": command.sample / "docs" / "probe"}
    dots = command.table("--estimator", "logra_dot", *options)["docs"]
    assert {file: file.stat().st_mtime_ns for file in store.rglob("part-*.npy")} == written
    direction = projected(mean_gradient(model, command.probes["docs"]))
    close(dots.tolist(), [product(row, direction) for row in rows], 1e-4)


# ---- processes, kills --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def undisturbed(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "scores.parquet"
    score_shards(toy_job(*toy_folders(tiny_sample), out, 1), load_toy, progress=False)
    return out.read_bytes()


def toy_folders(sample: Path) -> tuple[Path, Path]:
    return sample / "topics" / "train", sample / "code" / "probe"


def start_toy(sample: Path, out: Path, processes: int, *more: str) -> subprocess.Popen[str]:
    script = str(ROOT / "tests" / "tools" / "toy_scoring.py")
    command = [sys.executable, script, *map(str, toy_folders(sample)), str(out), str(processes), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(text.rsplit(")", 1)[1].split()[1]) == pid and "spawn_main" in command:
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for child processes in /proc")
def test_killed_and_resumed_to_the_same_bytes(tiny_sample: Path, tmp_path: Path, undisturbed: bytes) -> None:
    """Kill -9 of the main process with two at work: they end by themselves, and its parts are gone on with."""
    out, parts = tmp_path / "scores.parquet", tmp_path / ".scores.parquet.parts"

    def committed() -> set[Path]:
        return set(parts.rglob("part-*.npy"))

    killed = start_toy(tiny_sample, out, 2)
    wait_for(lambda: len(committed()) >= 2)
    workers = children_of(killed.pid)
    killed.kill()
    killed.communicate()
    assert len(workers) == 2
    wait_for(lambda: not any(map(alive, workers)), 60)
    before = {file: file.stat().st_mtime_ns for file in committed()}
    assert 2 <= len(before) < 22
    assert not out.exists()
    # A worker dies: the run ends with a line that says so.
    others = set(children_of(os.getpid()))

    def kill_one() -> None:
        wait_for(lambda: len(committed()) >= len(before) + 2)
        os.kill(min(set(children_of(os.getpid())) - others), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(UserError, match=r"a process died \(exit code -9.*--resume"):
        score_shards(toy_job(*toy_folders(tiny_sample), out, 2, resume=True), load_toy, progress=False)
    killer.join()
    assert set(children_of(os.getpid())) == others
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    left = 349 - 16 * len(committed())
    report = score_shards(toy_job(*toy_folders(tiny_sample), out, 1, resume=True), load_toy, progress=False)
    assert 0 < left <= report.samples < left + 16  # the last part is shorter than the others
    assert out.read_bytes() == undisturbed
    assert not parts.exists()


def test_another_process_loads_the_model_anew(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.shards = command.shards[1:]
    command.table()
    alone = command.out.read_bytes()
    capsys.readouterr()
    command.table("--processes", "2")  # one part, so one of them gets work
    assert command.out.read_bytes() == alone
    printed = capsys.readouterr()
    assert re.search(r"scores\.parquet: 32 rows; 32 samples in [\d,]+\.\d s \([\d,.]+/s\)", printed.out)
    assert re.search(r"32/32 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ ?(s/)? ?samples", printed.err)  # with the time left


def test_batches_do_not_depend_on_the_process(command: Command) -> None:
    """Another batch size is another run: its last digits may differ."""
    assert main(command.arguments("--batch-size", "4")) == 0
    assert main(command.arguments("--batch-size", "8", "--resume")) == 2
    assert main(command.arguments("--batch-size", "4", "--resume")) == 0


# ---- checkpoints of runs -----------------------------------------------------------------------------------
def test_checkpoints_of_a_run(tiny_run: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_run_config(tiny_run, ["max_duration=4ba", "save_interval=2ba", "model.tie_embeddings=true"])
    train(config)
    folder = Path(config.save_folder) / "tiny" / "checkpoints"
    saved = torch.load(folder / "ep0-ba4-rank0.pt", weights_only=False)["state"]
    command.models = [folder / "latest-rank0.pt"]
    plain, adam = command.table(), command.table("--estimator", "adam")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
        )
    ).eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in saved["model"].items()})
    direction = mean_gradient(model, command.probes["code"])
    moments = saved["optimizers"]["AdamW"]["state"]
    scaled = {
        name: each / ((moments[f"model.{name}"]["exp_avg_sq"] / (1 - 0.95**4)).sqrt() + 1e-8)
        for name, each in direction.items()
    }
    batch = batch_of(command.shards[0], list(range(0, 36, 4)))
    rows = [gradients_of(model, loss) for loss in losses_of(model, batch).sum(dim=1)]
    close(plain["code"][:36:4].tolist(), [product(row, direction) for row in rows], 1e-4)
    close(adam["code"][:36:4].tolist(), [product(row, scaled) for row in rows], 1e-4)
    # Several checkpoints of the run.
    command.models = [folder / "ep0-ba2-rank0.pt", folder / "ep0-ba4-rank0.pt"]
    both = command.table(models=2)
    assert np.abs(both["code"] - plain["code"]).max() > 1e-6
    # And a config.yaml that is another run's.
    settings = folder.parent / "config.yaml"
    settings.write_text(settings.read_text().replace("hidden_size: 16", "hidden_size: 32"))
    refused(command, capsys, "a checkpoint of another model", "'model.model.embed_tokens.weight'", "[512, 32]")
    settings.unlink()
    refused(command, capsys, "expected the run's config.yaml at")
    (folder / "ep0-ba2-rank0.pt").write_bytes(b"no checkpoint")
    settings.touch()
    refused(command, capsys, "not a readable checkpoint of a run")


# ---- selection ---------------------------------------------------------------------------------------------
class TestSelect:
    def select(self, command: Command, rule: str, *more: str) -> int:
        options = ("--select", rule, "--probe-column", "code", "--select-out", str(command.folder / "best"))
        return main(command.arguments(*options, *more))

    def test_new_shards_hold_the_best_rows_in_order(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        command.shards = [command.sample / source / "train" for source in ("docs", "topics")]
        assert self.select(command, "top_fraction=0.2") == 0
        best, table = command.folder / "best", pq.read_table(command.out).to_pydict()
        number = round(0.2 * len(table["code"]))
        threshold = sorted(table["code"])[-number]
        total = 0
        for source in ("docs", "topics"):
            rows = [
                row
                for name, row, score in zip(table["source"], table["sample_id"], table["code"], strict=True)
                if name == source and score >= threshold
            ]
            folder, origin = best / source / "train", command.sample / source / "train"
            new, old = read_rows(folder, range(len(rows))), read_rows(origin, rows)
            assert new.tokens.tobytes() == old.tokens.tobytes()
            assert new.doc_lengths.tobytes() == old.doc_lengths.tobytes()
            assert new.pieces.tolist() == old.pieces.tolist()
            meta, before = read_meta(folder), read_meta(origin)
            assert (meta.samples, meta.tokens) == (len(rows), int(old.doc_lengths.sum()))
            assert meta.tokens + meta.padding == meta.samples * meta.seq_len
            assert (meta.source, meta.split, meta.tokenizer_fingerprint) == (
                before.source,
                before.split,
                before.tokenizer_fingerprint,
            )
            total += len(rows)
        assert total == number
        assert verify(best).findings == []
        assert f"{number:,} samples with top_fraction=0.2 by 'code'" in capsys.readouterr().out
        sources = {"docs": {}, "topics": {}}
        data = {"local": str(best), "seq_len": 32, "sources": sources, "tokenizer": str(command.sample / "tokenizer")}
        batch = next(iter(get_loader(data, batch_size=8)))
        assert batch["input_ids"].shape == (8, 32)

    def test_resumed_overwritten_refused(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.select(command, "threshold=0") == 0
        table = pq.read_table(command.out).to_pydict()
        file = command.folder / "best" / "selection.json"
        chosen = json.loads(file.read_text())["chosen"]
        assert sum(chosen.values()) == sum(score > 0 for score in table["code"])
        when = file.stat().st_mtime_ns
        assert self.select(command, "threshold=0", "--resume") == 0
        assert file.stat().st_mtime_ns == when
        assert self.select(command, "top_fraction=0.5", "--resume") == 2
        assert "made with another select: expected top_fraction=0.5, found threshold=0" in capsys.readouterr().err
        assert self.select(command, "top_fraction=0.5", "--overwrite") == 0
        assert json.loads(file.read_text())["select"] == "top_fraction=0.5"
        capsys.readouterr()
        assert self.select(command, "threshold=1e9", "--resume") == 2
        assert "threshold=1e+09: chooses none of 68 samples" in capsys.readouterr().err
        assert json.loads(file.read_text())["select"] == "top_fraction=0.5"

    def test_a_loss_mask_stays(self, command: Command) -> None:
        masked_shards(command, command.folder / "chat", lambda size: np.arange(size) % 3 > 0)
        command.shards = [command.folder / "chat"]
        assert self.select(command, "top_fraction=0.5") == 0
        folder = command.folder / "best" / "chat" / "train"
        table = pq.read_table(command.out).to_pydict()
        rows = sorted(np.argsort(table["code"])[-len(read_rows_all(folder)) :].tolist())
        old, new = read_rows(command.shards[0], rows), read_rows(folder, range(len(rows)))
        assert old.loss_mask is not None
        assert new.loss_mask is not None
        assert new.loss_mask.tobytes() == old.loss_mask.tobytes()
        assert read_meta(folder).loss_tokens == int(old.loss_mask.sum())
        assert verify(folder).findings == []


def read_rows_all(folder: Path) -> np.ndarray:
    return read_rows(folder, range(read_meta(folder).samples)).tokens


def masked_shards(command: Command, folder: Path, mask: Callable[[int], np.ndarray]) -> None:
    """Shards of twelve conversations with a loss mask."""
    tokenizer = TokenizerWrapper(command.sample / "tokenizer")
    documents = []
    for number in range(12):
        ids = np.array([*tokenizer.encode(f"def f{number}(x): return x + {number}"), tokenizer.eos_id], np.uint16)
        documents.append(EncodedDocument(ids, number, mask(len(ids)).astype(np.uint8)))
    write_documents(folder, documents, tokenizer, seq_len=32, source="chat", split="train", **ABOUT)


# ---- what is refused ---------------------------------------------------------------------------------------
def refused(command: Command, capsys: pytest.CaptureFixture[str], *messages: str, more: tuple[str, ...] = ()) -> None:
    """Exit code 2, and one line with all of these; no scores are written."""
    command.out.unlink(missing_ok=True)
    capsys.readouterr()
    assert main(command.arguments(*more, *(() if "--resume" in more else ("--overwrite",)))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("score_influence: ")]
    assert len(lines) == 1
    for message in messages:
        assert message in lines[0]
    assert not command.out.exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("more", "messages"),
        [
            (("--estimator", "ekfak"), ("--estimator: expected one of dot,", "Did you mean 'ekfac'?")),
            (("--scorer", "hok"), ("--scorer: expected one of hook, forward", "Did you mean 'hook'?")),
            (("--by", "samples"), ("Did you mean 'sample'?",)),
            (("--layers", "model.layer.*"), ("matches none of 11 (such as model.embed_tokens.weight",)),
            (("--estimator", "logra", "--layers", "model.norm.weight"), ("expected at least one matrix",)),
            (("--estimator", "adam"), ("expected a checkpoint with the second moments of its optimizer",)),
            (("--estimator", "self"), ("--estimator self: expected no probe, found code, topics",)),
            (("--estimator", "cosine", "--scorer", "forward"), ("expected an estimator that needs no norms",)),
            (("--batch-size", "0"), ("--batch-size: expected at least 1, found 0",)),
            (("--probe", "code=elsewhere"), ("expected each name once, found 'code' twice",)),
            (("--probe", "loss=x"), ("'loss' is a column of the scores already",)),
            (("--probe", "nameless"), ("--probe: expected NAME=FOLDER, found 'nameless'",)),
            (("--probe", "far=nowhere"), ("nowhere: expected a shard folder", "no such folder")),
            (
                ("--select", "top=0.1", "--select-out", "x"),
                ("expected top_fraction=… or threshold=…, found 'top=0.1'",),
            ),
            (("--select", "threshold=0"), ("--select, --select-out: expected both or none",)),
            (("--select", "threshold=0", "--select-out", "x"), ("--probe-column: expected one of code, topics",)),
            (
                ("--select", "threshold=0", "--select-out", "x", "--probe-column", "code", "--by", "source"),
                ("--select: expected --by sample, found --by source",),
            ),
            (("--resume", "--overwrite"), ("expected one of them at most",)),
            (("--out", "."), ("--out: expected a file, found the folder .",)),
        ],
    )
    def test_options(
        self, command: Command, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], messages: tuple[str, ...]
    ) -> None:
        refused(command, capsys, *messages, more=more)

    def test_no_probe_and_no_shards(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        probes, command.probes = command.probes, {}
        refused(command, capsys, "--probe: expected at least one probe to score for, found none")
        command.probes, command.shards = probes, [command.folder]
        refused(command, capsys, f"{command.folder}: expected a shard folder", "found no shards in it")

    def test_shards_of_another_tokenizer_or_length(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        other = train_bpe(["another text " * 20], 300, command.folder / "tokenizer")
        about = {"source": "o", "split": "probe", **ABOUT}
        write_split(command.folder / "o", ["a text"] * 20, other, seq_len=32, **about)
        command.probes = {"o": command.folder / "o"}
        refused(command, capsys, "expected the tokenizer (fingerprint) of", "must be made with the same tokenizer")
        tokenizer = TokenizerWrapper(command.sample / "tokenizer")
        write_split(command.folder / "o", ["a text"] * 20, tokenizer, seq_len=16, **about)
        refused(command, capsys, "expected the seq_len of", "32, found 16")
        write_split(command.folder / "o", ["a text " * 30] * 9, tokenizer, seq_len=64, **about)
        command.shards = [command.folder / "o"]
        refused(command, capsys, "expected rows of up to 32 tokens", "found 64")

    def test_a_model_with_a_smaller_vocabulary(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        folder = command.folder / "small"
        model = reference(command.models[0])
        model.resize_token_embeddings(500)
        model.save_pretrained(folder)
        command.models = [folder]
        refused(command, capsys, "expected token ids below the model's vocabulary of 500", "found shards of 512")
        command.models = [command.folder / "nothing"]
        refused(command, capsys, "expected a model folder or a checkpoint, found nothing at")

    def test_nothing_is_predicted(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        masked_shards(command, command.folder / "none", np.zeros)
        masked_shards(command, command.folder / "first", lambda size: np.arange(size) == 0)  # which nothing predicts
        command.probes = {"none": command.folder / "none"}
        refused(command, capsys, "expected tokens that are predicted, found a loss mask of zeros only")
        command.probes = {"first": command.folder / "first"}
        refused(command, capsys, "probes.first", "found every label masked")
        refused(command, capsys, "--probe first", "found all labels masked", more=("--estimator", "logra"))
        command.probes, command.shards = {"code": command.sample / "code" / "probe"}, [command.folder / "first"]
        refused(command, capsys, "expected rows with tokens that count in the loss, found all labels masked")

    def test_an_empty_probe(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        empty = Path(shutil.copytree(command.sample / "code" / "probe", command.folder / "empty"))
        (empty / "index.json").write_text('{"version": 2, "shards": []}')
        command.probes = {"empty": empty}
        refused(command, capsys, f"{empty}: expected at least one sample, found an empty folder")

    def test_a_model_that_diverged(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        model = reference(command.models[0])
        model.model.norm.weight.data[0] = torch.nan
        model.save_pretrained(command.folder / "nan")
        command.models = [command.folder / "nan"]
        refused(command, capsys, "found NaN or infinity in model.norm.weight")

    def test_what_is_there_already(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(command.arguments()) == 0
        content, when = command.out.read_bytes(), command.out.stat().st_mtime_ns
        for more, message in (
            ((), "expected nothing there, found a file"),
            (("--resume", "--estimator", "cosine"), "made with another estimator: expected cosine, found dot"),
            (("--resume", "--layers", "*norm*"), "made with another layers: expected *norm*, found all"),
        ):
            capsys.readouterr()
            assert main(command.arguments(*more)) == 2
            assert message in capsys.readouterr().err
        command.models = command.models[::-1]
        assert main(command.arguments("--resume")) == 2
        assert "made with another model" in capsys.readouterr().err
        command.models = command.models[::-1]
        assert main(command.arguments("--resume")) == 0
        assert "68 rows; 0 samples" in capsys.readouterr().out
        assert (command.out.read_bytes(), command.out.stat().st_mtime_ns) == (content, when)
        command.out.write_bytes(b"something else")
        assert main(command.arguments("--resume")) == 2
        assert "expected scores of this tool, found another file" in capsys.readouterr().err

    def test_a_store_of_another_model_or_seed(self, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("--estimator", "logra", "--rank", "2", "--store", str(command.folder / "store"))
        assert main(command.arguments(*options)) == 0
        message = "made with another projection_seed: expected 1, found 0"
        refused(command, capsys, str(command.folder / "store"), message, more=(*options, "--seed", "1"))
        command.models = command.models[::-1]
        refused(command, capsys, "made with another model", more=options)


def test_probes_of_a_data_yaml(command: Command) -> None:
    command.shards = command.shards[1:]
    command.probes = {"code": command.probes["code"]}
    wanted = command.table()["code"]
    command.probes = {}
    found = command.table("--probes-from", str(command.sample / "data.yaml"))["code"]
    assert np.array_equal(found, wanted)
