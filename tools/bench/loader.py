"""Loader speed: samples per CPU-second of the mixture, of stock StreamingDataset and of a raw memory map.

    python tools/bench/loader.py [--seq-len 512 2048] [--batch-size 32] [--sources 8]

All three read the same rows, in one process without workers, over several rounds; printed are the medians and their
ratios. The stock loader decodes samples of the same shards, the memory map is one uint16 file of the same
tokens behind a DataLoader whose dataset gathers a whole batch at once: the fastest plain loader there is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cheapertraining.data import get_loader
from cheapertraining.data.tokenization import TokenizerWrapper, train_bpe

SAMPLES = 8192


class MemoryMap(Dataset[torch.Tensor]):
    """Rows of one uint16 file, gathered a batch at a time."""

    def __init__(self, file: Path, seq_len: int) -> None:
        self.rows = np.memmap(file, np.uint16, mode="r").reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[rows].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def write_rows(folder: Path, source: str, tokens: NDArray[np.uint16], tokenizer: TokenizerWrapper) -> None:
    """Write rows as the shards of one source, each cut into a few documents."""
    import json
    from dataclasses import asdict

    from streaming import MDSWriter

    from cheapertraining.data.shards import META_FILE, ShardMeta

    seq_len = tokens.shape[1]
    generator = np.random.default_rng(0)
    out = folder / source / "train"
    columns = {"tokens": f"ndarray:uint16:{seq_len}", "doc_lengths": "ndarray:uint32"}
    with MDSWriter(out=str(out), columns=columns) as writer:
        for row in tokens:
            cuts = np.sort(generator.choice(np.arange(1, seq_len), generator.integers(0, 4), replace=False))
            writer.write({"tokens": row, "doc_lengths": np.diff(cuts, prepend=0, append=seq_len).astype(np.uint32)})
    meta = ShardMeta(
        1, source, "train", seq_len, tokenizer.vocab_size, tokenizer.fingerprint, "uint16", "concat",
        len(tokens), len(tokens), tokens.size, 0, 0, "", "none", "random tokens of the benchmark",
    )  # fmt: skip
    (out / META_FILE).write_text(json.dumps(asdict(meta)), encoding="utf-8")


def stack(samples: list[dict[str, NDArray[np.uint16]]]) -> dict[str, torch.Tensor]:
    """What the memory map yields, from the stock loader's samples."""
    ids = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def cpu_rate(batches: Iterator[object], batch_size: int, count: int) -> float:
    """Samples per CPU-second over ``count`` batches."""
    start = time.process_time()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.process_time() - start)


def endless(loader: Iterable[object]) -> Iterator[object]:
    while True:
        yield from loader


def compare(seq_len: int, batch_size: int, sources: int, rounds: int) -> None:
    from streaming import Stream, StreamingDataset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_bpe(["a b c"], 300, folder / "tokenizer")
        tokens = np.random.default_rng(1).integers(0, 300, (SAMPLES, seq_len)).astype(np.uint16)
        names = [f"source{i}" for i in range(sources)]
        for source, part in zip(names, np.array_split(tokens, sources), strict=True):
            write_rows(folder, source, part, tokenizer)
        tokens.tofile(folder / "tokens.bin")
        config = {"local": str(folder), "seq_len": seq_len, "sources": {source: {} for source in names}}
        mixture = get_loader(config, tokenizer, batch_size)
        stock = StreamingDataset(
            streams=[Stream(local=str(folder / source / "train")) for source in names],
            batch_size=batch_size,
            shuffle=True,
        )
        loaders = {
            "mixture": endless(mixture),
            "stock": endless(DataLoader(stock, batch_size=batch_size, collate_fn=stack)),
            "memmap": endless(
                DataLoader(
                    MemoryMap(folder / "tokens.bin", seq_len),
                    batch_size=batch_size,
                    shuffle=True,
                    collate_fn=lambda batch: batch,
                )
            ),
        }
        counts = {"mixture": 200, "stock": 40, "memmap": 200}
        rates: dict[str, list[float]] = {key: [] for key in loaders}
        # The stock loader comes last: its threads go on polling in the background and would be counted with the others.
        for contenders in (("mixture", "memmap"), ("stock",)):
            for key in contenders:
                cpu_rate(loaders[key], batch_size, 20)
            for _ in range(rounds):
                for key in contenders:
                    rates[key].append(cpu_rate(loaders[key], batch_size, counts[key]))
    rate = {key: statistics.median(values) for key, values in rates.items()}
    print(
        f"seq_len {seq_len:5d}  batch {batch_size}  samples per CPU-second: mixture {rate['mixture']:,.0f}  "
        f"stock {rate['stock']:,.0f}  memmap {rate['memmap']:,.0f}  "
        f"mixture/stock {rate['mixture'] / rate['stock']:.1f}  mixture/memmap {rate['mixture'] / rate['memmap']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32])
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seq_len in arguments.seq_len:
        for batch_size in arguments.batch_size:
            compare(seq_len, batch_size, arguments.sources, arguments.rounds)


if __name__ == "__main__":
    main()
