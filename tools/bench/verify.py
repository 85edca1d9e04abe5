"""How fast shards are verified: GB/s of `inspect_shards.py verify`, and its ratio to hashing the files alone.

    python tools/bench/verify.py [--megabytes 200] [--workers 1 2]

Shards of random ids are written to a temporary folder: rows of 2,048 tokens as in training, rows of 128 (many, so that
what a row costs shows), rows with a loss mask, and compressed ones. The baseline reads each file and computes its
xxh64, with the same threads, in the same process, in turns with verify; that is the least that any check of hashes
does. GB are bytes of files (so those of compressed shards look slow); files are in the page cache. Medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from streaming.base.hashing import get_hash

from cheapertraining.data.rows import TokenRows
from cheapertraining.data.shards import INDEX_FILE, ShardMeta, hash_of_hashes, index_json, write_shard, write_sidecars
from cheapertraining.data.verification import verify

VOCAB = 50_000
SHARD_BYTES = 32_000_000
KINDS = {
    "rows of 2,048": (2048, False, None),
    "rows of 128": (128, False, None),
    "with loss mask": (2048, True, None),
    "zstd": (2048, False, "zstd:3"),
}


def random_rows(generator: np.random.Generator, count: int, seq_len: int, masked: bool) -> TokenRows:
    """Rows of two to nine pieces (fewer where rows are short), every tenth with padding of id 0."""
    pieces = generator.integers(2, min(10, seq_len // 8), count)
    lengths = np.ones(int(pieces.sum()), np.int64)
    filled = np.where(np.arange(count) % 10, seq_len, seq_len - seq_len // 16)
    ends = np.cumsum(pieces)
    lengths[ends - pieces] += filled - pieces  # the first piece of a row takes what the others leave
    tokens = generator.integers(0, VOCAB, (count, seq_len)).astype(np.uint16)
    padding = np.arange(seq_len) >= filled[:, None]
    tokens[padding] = 0
    mask = (generator.random((count, seq_len)) < 0.3).astype(np.uint8) * ~padding if masked else None
    return TokenRows(tokens, lengths.astype(np.uint32), pieces, mask)


def write_generated(folder: Path, size: int, seq_len: int, masked: bool, compression: str | None) -> None:
    """A shard folder of about ``size`` bytes before compression."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    per_shard = SHARD_BYTES // (seq_len * (2 + masked))
    shards = [random_rows(generator, per_shard, seq_len, masked) for _ in range(max(1, size // SHARD_BYTES))]
    tokens = sum(int(rows.doc_lengths.sum()) for rows in shards)
    samples = sum(map(len, shards))
    documents = generator.integers(0, 1 << 62, samples).astype(np.uint64)
    meta = ShardMeta(
        format_version=1,
        source="generated",
        split="train",
        seq_len=seq_len,
        vocab_size=VOCAB,
        tokenizer_fingerprint="",
        token_dtype="uint16",
        packing="best_fit",
        samples=samples,
        documents=len(documents),
        tokens=tokens,
        padding=samples * seq_len - tokens,
        cut_documents=0,
        input_hash=hash_of_hashes(documents),
        license="none",
        origin="generated",
        loss_tokens=sum(int(rows.loss_mask.sum()) for rows in shards if rows.loss_mask is not None) if masked else None,
    )
    entries = [
        write_shard(folder, number, [rows], meta.columns, compression=compression) for number, rows in enumerate(shards)
    ]
    write_sidecars(folder, meta, documents)
    (folder / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")


def read_and_hash(folder: Path, workers: int) -> float:
    """Seconds to read all shard files and hash them."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda file: get_hash("xxh64", file.read_bytes()), sorted(folder.glob("*.mds*"))))
    return time.perf_counter() - start


def report(folder: Path, kind: str, workers: int, rounds: int) -> None:
    """Print one row."""
    size = sum(file.stat().st_size for file in folder.glob("*.mds*"))
    ours, alone = [], []
    for _ in range(rounds):
        result = verify(folder, workers=workers)
        if result.findings or result.bytes != size:
            raise SystemExit(f"verify found fault with what was just written: {result.findings[:1]}")
        ours.append(result.seconds)
        alone.append(read_and_hash(folder, workers))
    ratio = statistics.median(a / b for a, b in zip(ours, alone, strict=True))
    mine, theirs = (size / 1e9 / statistics.median(seconds) for seconds in (ours, alone))
    print(f"{kind:15} {workers:7d} {size / 1e6:8.0f} {mine:14.2f} {theirs:16.2f} {ratio:13.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of shards of each kind (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("shards          workers       MB    verify GB/s   read+xxh64 GB/s    time to that")
    with TemporaryDirectory() as name:
        for kind, (seq_len, masked, compression) in KINDS.items():
            folder = Path(name) / kind.replace(" ", "-")
            write_generated(folder, given.megabytes * 1_000_000, seq_len, masked, compression)
            for workers in given.workers:
                report(folder, kind, workers, given.rounds)


if __name__ == "__main__":
    main()
