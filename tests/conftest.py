"""Shared by all tests: a tiny sample of real text as real shards, made once from the interpreter's own library."""

from __future__ import annotations

import ast
import inspect
import os
import resource
from pathlib import Path
from types import ModuleType

import pytest

# Before anything imports them: no network, no key, one thread a process (several test processes share the cores).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)

# Streaming keeps shared memory open until the process ends, some 20 files a loader: more than the usual limit of 1,024
# for a process that makes the loaders of a whole test file.
_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_SOFT, min(_HARD, 8192)), _HARD))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first, so that no process is left with one of them when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


TINY_SOURCES = ("code", "docs", "topics")
TINY_SEQ_LEN = 32


def _code(modules: list[ModuleType]) -> list[str]:
    """The top-level functions and classes of the modules, each a document."""
    documents = []
    for module in modules:
        source = inspect.getsource(module)
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        documents += [ast.get_source_segment(source, node) or "" for node in nodes]
    return documents


def _docs(modules: list[ModuleType]) -> list[str]:
    """The docstrings of the modules' functions and classes."""
    return [text for module in modules for thing in vars(module).values() if (text := inspect.getdoc(thing))]


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def tiny_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data.yaml``, ``tokenizer/`` (512 tokens) and ``<source>/{train,probe,heldout}`` shards.

    Sources are ``code``, ``docs`` and ``topics``, rows have 32 tokens, and the probe is ``code``. Each train split has
    some hundred rows, the others at least 16.
    """
    import argparse
    import calendar
    import csv
    import json.decoder
    import math
    import textwrap

    from cheapertraining.data import train_bpe, write_split

    modules: list[ModuleType] = [argparse, calendar, csv, json.decoder, textwrap]
    texts = {"code": _code(modules), "docs": _docs([*modules, math, os]), "topics": _topics()[:30]}
    folder = tmp_path_factory.mktemp("tiny_sample")
    tokenizer = train_bpe([text for documents in texts.values() for text in documents], 512, folder / "tokenizer")
    for source, documents in texts.items():
        documents = [text[:1500] for text in dict.fromkeys(documents)][:80]
        splits = {"train": documents[8:], "probe": documents[:4], "heldout": documents[4:8]}
        for split, chosen in splits.items():
            write_split(
                folder / source / split,
                chosen,
                tokenizer,
                seq_len=TINY_SEQ_LEN,
                source=source,
                split=split,
                license="PSF-2.0",
                origin="CPython standard library",
            )
    sources = "".join(f"    {source}: {{weight: 1.0}}\n" for source in TINY_SOURCES)
    (folder / "data.yaml").write_text(
        f"data:\n  local: {folder}\n  seq_len: {TINY_SEQ_LEN}\n  sources:\n{sources}"
        "  probes:\n    code: {source: code}\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def tiny_run(tiny_sample: Path, tmp_path: Path) -> Path:
    """A run yaml over :func:`tiny_sample`: a model of one layer, 8 batches of 12 rows, saved in ``tmp_path/runs``."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
compose: {{data: {tiny_sample}/data.yaml}}
run_name: tiny
seed: 3
device: cpu
max_duration: 8ba
save_folder: {tmp_path}/runs
save_interval: 4ba
model:
  hidden_size: 16
  intermediate_size: 32
  num_layers: 1
  num_heads: 2
  num_kv_heads: 2
  max_position_embeddings: 32
train_loader: {{global_batch_size: 12, lag: 2}}
eval_loader: {{batch_size: 8, interval: 4ba, subset_num_batches: 1}}
optimizer: {{lr: 1.0e-2}}
scheduler: {{name: wsd, warmup: 2ba, decay: 0.2dur}}
algorithms:
  gradient_clipping: {{threshold: 1.0}}
loggers:
  jsonl: {{}}
""",
        encoding="utf-8",
    )
    return path
