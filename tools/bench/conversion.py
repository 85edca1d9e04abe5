"""Conversion: tokens a second against the tokenizer alone and against one document at a time; memory; packing.

    python tools/bench/conversion.py [INPUT.jsonl.gz …] [--megabytes 100] [--workers 2] [--rounds 3]

The text of the inputs (default: the modules of the standard library) is repeated to --megabytes. In turns, in one run:

* `convert`: JSON lines to shards, as `tools/convert_text.py` does it, from start to end;
* `tokenizer`: the same texts, in memory already, through the tokenizer in batches of 256, in as many processes;
* `one by one`: a conversion that calls the tokenizer for each document, joins ids in Python lists and writes int32
  rows, as is common practice, in as many processes, and in one (the usual default on a machine with two cores).

Times are wall times with the start of the processes. Then the peak memory of a conversion of a tenth of the input, of
all, and of three times as much; and what each way of packing does to the documents of the inputs. Where `trl` is
installed, its best-fit packing stands beside ours: its truncations and rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cheapertraining.data import TokenizerWrapper, pack, train_bpe
from cheapertraining.data.conversion import Job, Settings, TextEncoder, convert
from cheapertraining.data.conversion.destination import Destination
from cheapertraining.data.pieces import list_pieces

SEQ_LEN = 2048
VOCABULARY = 8192


def read_texts(inputs: list[str]) -> list[str]:
    """Texts of the inputs; of the standard library's modules where there are none."""
    if not inputs:
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
        return [text for file in modules if "test" not in file.parts and (text := _text(file))]
    texts = []
    for name in inputs:
        with (
            gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8") as handle
        ):
            texts += [json.loads(line)["text"] for line in handle]
    return texts


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def repeated(texts: list[str], megabytes: float) -> Iterator[str]:
    """The texts again and again, each copy with another first line."""
    size, copy = 0, 0
    while True:
        for text in texts:
            yield f"{copy}\n{text}"
            size += len(text.encode("utf-8"))
            if size >= megabytes * 1e6:
                return
        copy += 1


def write_files(folder: Path, texts: list[str], megabytes: float, count: int) -> Path:
    """JSON lines in ``count`` files of about the same size."""
    folder.mkdir()
    handles = [(folder / f"{number:02}.jsonl").open("w", encoding="utf-8") for number in range(count)]
    for number, text in enumerate(repeated(texts, megabytes)):
        handles[number % count].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    for handle in handles:
        handle.close()
    return folder


def make_job(source: Path, out: Path, tokenizer: str) -> Job:
    settings = Settings("bench", SEQ_LEN)
    pieces = tuple(list_pieces([str(source)]))
    return Job(settings, TextEncoder(tokenizer), pieces, Destination(str(out)), out / ".conversion")


def run_convert(source: Path, out: Path, tokenizer: str, workers: int) -> int:
    return convert(make_job(source, out, tokenizer), workers=workers).metas["train"].tokens


def run_tokenizer(source: Path, out: Path, tokenizer: str, workers: int) -> int:
    return _in_processes(_tokenize_file, source, out, tokenizer, workers)


def run_one_by_one(source: Path, out: Path, tokenizer: str, workers: int) -> int:
    return _in_processes(_convert_file, source, out, tokenizer, workers)


def _in_processes(work: Callable[..., int], source: Path, out: Path, tokenizer: str, workers: int) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cheapertraining.data.conversion", "streaming"])
    with ProcessPoolExecutor(workers, context, _one_thread) as pool:
        files = sorted(source.glob("*.jsonl"))
        return sum(pool.map(work, files, [out] * len(files), [tokenizer] * len(files)))


def _one_thread() -> None:
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _tokenize_file(file: Path, out: Path, tokenizer: str) -> int:
    wrapper = TokenizerWrapper(tokenizer)
    texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    started = time.perf_counter()
    tokens = 0
    for first in range(0, len(texts), 256):
        tokens += sum(len(ids) + 1 for ids in wrapper.encode_batch(texts[first : first + 256]))
    (out / f"{file.stem}.seconds").write_text(str(time.perf_counter() - started))
    return tokens


def _convert_file(file: Path, out: Path, tokenizer: str) -> int:
    from streaming import MDSWriter
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    buffer: list[int] = []
    tokens = 0
    with MDSWriter(out=str(out / file.stem), columns={"tokens": f"ndarray:int32:{SEQ_LEN}"}) as writer:
        for line in file.open(encoding="utf-8"):
            ids = encode(json.loads(line)["text"], truncation=False, padding=False)["input_ids"]
            buffer = [*buffer, *ids, encode.eos_token_id]
            tokens += len(ids) + 1
            while len(buffer) >= SEQ_LEN:
                writer.write({"tokens": np.asarray(buffer[:SEQ_LEN], dtype=np.int32)})
                buffer = buffer[SEQ_LEN:]
    return tokens


def compare_speed(source: Path, folder: Path, tokenizer: str, workers: int, rounds: int) -> None:
    runs = {"convert": run_convert, "tokenizer": run_tokenizer, "one by one": run_one_by_one}
    runs["one by one, one process"] = lambda source, out, tokenizer, _: run_one_by_one(source, out, tokenizer, 1)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    pure = []
    for number in range(rounds):
        for name, run in runs.items():
            out = folder / f"{name.replace(' ', '_')}-{number}"
            out.mkdir()
            started = time.perf_counter()
            tokens = run(source, out, tokenizer, workers)
            rates[name].append(tokens / (time.perf_counter() - started))
            if name == "tokenizer":
                pure.append(tokens * workers / sum(float(file.read_text()) for file in out.glob("*.seconds")))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in rate.items():
        print(f"{name:24s} {value:12,.0f} tokens/s  ({', '.join(f'{v:,.0f}' for v in rates[name])})")
    print(
        f"{'pure':24s} {statistics.median(pure):12,.0f} tokens/s  (tokenizer calls alone, without reading and starting)"
    )
    against = rate | {"pure": statistics.median(pure)}
    del against["convert"]
    print("   ".join(f"convert / {name} {rate['convert'] / value:.2f}" for name, value in against.items()))


PEAK = """
import resource, sys
from pathlib import Path
from tools.bench.conversion import run_convert
run_convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_memory(source: Path, out: Path, tokenizer: str) -> float:
    """MiB of a process that converts ``source``."""
    arguments = [sys.executable, "-c", PEAK, str(source), str(out), tokenizer]
    return float(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


def packing_table(texts: list[str], wrapper: TokenizerWrapper) -> None:
    lengths = np.array([len(ids) + 1 for ids in wrapper.encode_batch(texts)], np.int64)
    print(f"\npacking of {len(lengths):,} documents, {lengths.sum():,} tokens")
    print("seq_len  packing    padding  cut    needlessly  rows     tokens/s")
    for seq_len in (512, 2048):
        for packing in ("concat", "best_fit", "pad"):
            started = time.perf_counter()
            rows = pack(lengths, seq_len, packing)
            seconds = time.perf_counter() - started
            cut = rows.cut_documents
            needless = cut - int((lengths > seq_len).sum())
            padding = rows.padding / (len(rows) * seq_len)
            counts = f"{padding:7.2%}  {cut / len(lengths):5.1%}  {needless:10d}  {len(rows):7,}"
            print(f"{seq_len:7d}  {packing:9s}  {counts}  {lengths.sum() / seconds:,.0f}")
        if (found := trl_best_fit(lengths, seq_len)) is not None:
            padding, lost, count = found["padding"], found["lost"], found["rows"]
            print(f"{seq_len:7d}  trl bfd    {padding:7.2%}  tokens lost {lost:.1%}, {count:,} rows")


def trl_best_fit(lengths: np.ndarray[Any, np.dtype[np.int64]], seq_len: int) -> dict[str, float] | None:
    """What TRL's `bfd` does to documents of these lengths (it truncates longer ones); None where it is missing."""
    try:
        from datasets import Dataset
        from trl import pack_dataset
    except ImportError:
        return None
    data = Dataset.from_dict({"input_ids": [list(range(n)) for n in lengths.tolist()]})
    packed = pack_dataset(data, seq_len, "bfd", map_kwargs={"batch_size": len(lengths)})
    kept = sum(map(len, packed["input_ids"]))
    return {
        "rows": len(packed),
        "padding": 1 - kept / (len(packed) * seq_len),
        "lost": 1 - kept / int(lengths.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="JSON lines with a column text")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    texts = read_texts(given.inputs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wrapper = train_bpe(texts, VOCABULARY, folder / "tokenizer")
        source = write_files(folder / "all", texts, given.megabytes, 2 * given.workers)
        small = write_files(folder / "tenth", texts, given.megabytes / 10, 2 * given.workers)
        compare_speed(source, folder, wrapper.path, given.workers, given.rounds)
        large = write_files(folder / "three times", texts, 3 * given.megabytes, 2 * given.workers)
        parts = (small, source, large)
        peaks = [peak_memory(part, folder / f"peak-{part.name}", wrapper.path) for part in parts]
        sizes = (given.megabytes / 10, given.megabytes, 3 * given.megabytes)
        print("peak memory: " + ", ".join(f"{p:.0f} MiB at {n:g} MB" for p, n in zip(peaks, sizes, strict=True)))
        packing_table(texts, wrapper)


if __name__ == "__main__":
    main()
