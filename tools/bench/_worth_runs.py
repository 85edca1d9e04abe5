"""Data, teacher, caches and runs of ``distillation_worth.py``: each is made once and left on disk."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from cheapertraining.config import ModelConfig
from cheapertraining.data import Batch, MixtureLoader, get_loader, train_bpe, write_split
from cheapertraining.data.inspection import open_shard
from cheapertraining.data.shard_files import read_index
from cheapertraining.data.shards import read_meta
from cheapertraining.distillation import OutputHead, TopKTargets, chunked_distillation_loss, renormalized
from cheapertraining.distillation.cache_job import CacheJob
from cheapertraining.distillation.cached import CachedTeacher
from cheapertraining.distillation.caching import cache_teacher
from cheapertraining.distillation.drawing import Drawing
from cheapertraining.distillation.losses import next_labels, shifted_mask
from cheapertraining.distillation.packing import Kind
from cheapertraining.distillation.teacher import TeacherWrapper, head_of
from cheapertraining.models import CausalLM, build_causal_lm

SOURCES = ("wiki", "docs", "code")
SEQ_LEN, VOCAB = 128, 1024
STUDENT = ModelConfig(
    hidden_size=48,
    intermediate_size=144,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    max_position_embeddings=SEQ_LEN,
    init_std=0.05,
)
TEACHER = replace(STUDENT, hidden_size=128, intermediate_size=384, num_layers=3, num_heads=4, num_kv_heads=4)
BINS = 15


@dataclass(frozen=True)
class Scale:
    """How much is done: characters of text a source, batches of 16 rows, evaluations."""

    characters: int = 420_000
    teacher_batches: int = 500
    batches: int = 200
    rows: int = 16
    eval_rows: int = 192
    every: int = 20
    teacher_rate: float = 3e-3
    rate: float = 4e-3


@dataclass(frozen=True)
class Variant:
    """One way to train the student.

    Attributes:
        targets: ``none``, ``live``, or the kind of a cache.
        size: draws, or k.
        drawing: of draws.
        alpha: share of the divergence.
        temperature: of both distributions.
        renormalize: forget the tail of top-k.
    """

    targets: str
    size: int = 0
    drawing: Drawing = "systematic"
    alpha: float = 0.9
    temperature: float = 1.0
    renormalize: bool = False


def make_data(out: Path, sample: Path, scale: Scale) -> Path:
    """Shards of the sample's text with a small vocabulary, split by document as the sample is; the data yaml."""
    path = out / "data" / "data.yaml"
    if path.exists():
        return path
    folder = path.parent
    texts = {(s, split): _texts(sample, s, split, scale.characters) for s in SOURCES for split in ("train", "heldout")}
    everything = [text for (_, split), some in texts.items() if split == "train" for text in some]
    tokenizer = train_bpe(everything, VOCAB, folder / "tokenizer")
    for (source, split), some in texts.items():
        options = {"license": "as the sample", "origin": "the embedded sample"}
        write_split(folder / source / split, some, tokenizer, seq_len=SEQ_LEN, source=source, split=split, **options)
    lines = "".join(f"    {source}: {{weight: 1.0}}\n" for source in SOURCES)
    path.write_text(f"data:\n  local: {folder}\n  seq_len: {SEQ_LEN}\n  sources:\n{lines}", encoding="utf-8")
    return path


def _texts(sample: Path, source: str, split: str, characters: int) -> list[str]:
    """The pieces of documents in the sample's rows, as text, up to so many characters."""
    tokenizer, folder = Tokenizer.from_file(str(sample / "tokenizer" / "tokenizer.json")), sample / source / split
    found, size = [], 0
    for entry in read_index(folder):
        rows = open_shard(entry, read_meta(folder))
        for chunk in rows.chunks():
            for row, tokens in enumerate(chunk.tokens):
                at = 0
                for length in rows.lengths_of(chunk.first + row, chunk.first + row + 1).tolist():
                    found.append(tokenizer.decode(tokens[at : at + length].tolist()))
                    size, at = size + len(found[-1]), at + length
                if size > characters:
                    return [text for text in found if text.strip()]
    return [text for text in found if text.strip()]


def make_teacher(out: Path, data: Path, scale: Scale) -> TeacherWrapper:
    """The teacher, trained by cross-entropy."""
    folder = out / "teacher"
    if not (folder / "config.json").exists():
        model = build_causal_lm(TEACHER, VOCAB, seed=1)
        loader = get_loader(data, batch_size=scale.rows, seed=1)
        _train(model, loader, Variant("none"), None, scale.teacher_batches, scale.teacher_rate, lambda done: None)
        loader.close()
        unfinished = out / ".teacher"
        model.model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return TeacherWrapper.load(folder)


def make_cache(out: Path, data: Path, variant: Variant) -> Path:
    """The teacher's targets for all training rows."""
    kind: Kind = "sampled" if variant.targets == "sampled" else "top_k"
    name = f"{kind}-{variant.size}-T{variant.temperature:g}" + (f"-{variant.drawing}" if kind == "sampled" else "")
    shards = [data.parent / source / "train" for source in SOURCES]
    job = CacheJob(
        out / "teacher",
        shards,
        out / "caches" / name,
        kind=kind,
        size=variant.size,
        drawing=variant.drawing,
        temperature=variant.temperature,
        batch_size=16,
        resume=True,
    )
    report = cache_teacher(job, progress=False)
    note = {"ids": report.entries / report.positions, "bytes": report.bytes_per_token}
    (out / "caches" / f"{name}.json").write_text(json.dumps(note))
    return job.out


def run(out: Path, data: Path, name: str, variant: Variant, seed: int, scale: Scale) -> dict[str, Any]:
    """The result of one run, from disk where it is there already."""
    file = out / "runs" / f"{name}-{seed}.json"
    settings = {"variant": asdict(variant), "scale": asdict(scale), "seed": seed}
    if file.exists() and (found := json.loads(file.read_text()))["settings"] == settings:
        return dict(found)
    teacher = TeacherWrapper.load(out / "teacher")
    loader = get_loader(data, batch_size=scale.rows, seed=100 + seed)
    asked: TeacherWrapper | CachedTeacher | None = None
    if variant.targets == "live":
        asked = teacher
    elif variant.targets != "none":
        asked = CachedTeacher(make_cache(out, data, variant), loader.mixture, teacher=teacher.fingerprint())
    model = build_causal_lm(STUDENT, VOCAB, seed=200 + seed)
    held = list(_heldout(loader, scale.eval_rows))
    course: list[tuple[int, float]] = []

    def note(done: int) -> None:
        if done % scale.every == 0 or done == scale.batches:
            course.append((done * scale.rows * SEQ_LEN, _cross_entropy(model, held)))

    started = time.process_time()
    _train(model, loader, variant, asked, scale.batches, scale.rate, note)
    seconds = time.process_time() - started
    loader.close()
    result = {"settings": settings, "course": course, "seconds": seconds, **evaluate(model, teacher, held)}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".unfinished")
    scratch.write_text(json.dumps(result))
    os.replace(scratch, file)
    return result


def _train(
    model: CausalLM,
    loader: MixtureLoader,
    variant: Variant,
    teacher: TeacherWrapper | CachedTeacher | None,
    batches: int,
    rate: float,
    note: Any,
) -> None:
    """AdamW, linear warm-up over a tenth, then a cosine to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for number, batch in zip(range(batches), loader, strict=False):
        progress = number / batches
        after = 0.1 + 0.45 * (1 + math.cos(math.pi * max(0.0, progress - 0.1) / 0.9))
        optimizer.param_groups[0]["lr"] = rate * (progress / 0.1 + 1e-3 if progress < 0.1 else after)
        targets = None if teacher is None else teacher(batch)
        if variant.renormalize and isinstance(targets, TopKTargets):
            targets = renormalized(targets)
        inputs = model.head_inputs(batch)
        loss = chunked_distillation_loss(
            inputs.hidden,
            head_of(inputs),
            targets,
            batch["labels"],
            alpha=variant.alpha,
            temperature=variant.temperature,
        )
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        note(number + 1)


def _heldout(loader: MixtureLoader, rows: int) -> Iterator[Batch]:
    for split in loader.heldout.values():
        left = rows // len(loader.heldout)
        for batch in split:
            if left <= 0:
                break
            yield {name: value[:left] for name, value in batch.items()}
            left -= len(batch["input_ids"])


@torch.no_grad()
def _cross_entropy(model: CausalLM, batches: list[Batch]) -> float:
    total, tokens = 0.0, 0
    for batch in batches:
        inputs = model.head_inputs(batch)
        loss = chunked_distillation_loss(inputs.hidden, head_of(inputs), None, batch["labels"])
        total, tokens = total + float(loss.cross_entropy * loss.tokens), tokens + int(loss.tokens)
    return total / tokens


@torch.no_grad()
def evaluate(model: CausalLM, teacher: TeacherWrapper, batches: list[Batch]) -> dict[str, float]:
    """Held-out numbers of a student: ``loss`` (nats a token), ``ece`` (expected calibration error of the likeliest
    token's probability, 15 bins of equal width, arXiv 1706.04599, eq. 3), ``acceptance`` and ``kl`` against the
    teacher, ``teacher_loss``."""
    sums = {"loss": 0.0, "acceptance": 0.0, "kl": 0.0, "teacher_loss": 0.0}
    bins, tokens = np.zeros((3, BINS)), 0
    for batch in batches:
        mask = shifted_mask(batch["labels"])
        labels = next_labels(batch["labels"])[mask]
        own = _log_probs(model.head_inputs(batch), mask)
        other = _log_probs(teacher.head_inputs(batch), mask)
        sums["loss"] += float(F.nll_loss(own, labels, reduction="sum"))
        sums["teacher_loss"] += float(F.nll_loss(other, labels, reduction="sum"))
        sums["acceptance"] += float(torch.minimum(own.exp(), other.exp()).sum())
        sums["kl"] += float((other.exp() * (other - own)).sum())
        confidence, guess = own.exp().max(dim=1)
        place = (confidence * BINS).long().clamp(max=BINS - 1).numpy()
        for row, values in enumerate((np.ones(len(labels)), confidence.numpy(), (guess == labels).numpy())):
            bins[row] += np.bincount(place, values, minlength=BINS)
        tokens += len(labels)
    means: Mapping[str, float] = {name: value / tokens for name, value in sums.items()}
    return {**means, "ece": float(np.abs(bins[1] - bins[2]).sum() / tokens)}


def _log_probs(inputs: Any, mask: torch.Tensor) -> torch.Tensor:
    head: OutputHead = head_of(inputs)
    return head.logits(inputs.hidden[mask]).log_softmax(dim=-1)
