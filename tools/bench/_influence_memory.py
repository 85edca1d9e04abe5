"""Peak memory of a candidate, each in a process of its own, by the kernel's account of resident pages (Linux)."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tools.bench._influence_candidates import CANDIDATES
from tools.bench._influence_setting import Setting, make_batch, step

PLAIN = "plain step"
MIB = 2**20
_HERE = "tools.bench._influence_memory"


def peak(params: str, rows: int, length: int, name: str) -> int:
    """Bytes that this process needs at most beyond the model and the batch, in the candidate's second run.

    What the candidate holds on to counts: directions, factors. So do the gradients of the step.
    """
    torch.set_num_threads(1)
    setting = Setting(params, rows, length)
    step(setting.model, make_batch(params, 1, 8))  # whatever torch sets up at first
    setting.model.zero_grad()
    assert len(setting.batch)
    gc.collect()
    before = _status("VmRSS")
    if name == PLAIN:
        run = setting.plain
    else:
        case = next(candidate for candidate in CANDIDATES if candidate.name == name).make(setting)
        run = case.run
    run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return _status("VmHWM") - before


def peaks(setting: Setting, names: Sequence[str]) -> dict[str, int]:
    """:func:`peak` of each, forked off a server that has only imported what they need.

    Freed memory must not hide what is needed anew: the allocator gives back at once all but the smallest blocks.
    """
    kept = {key: os.environ.get(key) for key in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    os.environ.update(dict.fromkeys(kept, "65536"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_HERE])
    found = {}
    try:
        for name in names:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found[name] = pool.submit(peak, setting.params, setting.rows, setting.length, name).result()
    finally:
        for key, value in kept.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    return found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
