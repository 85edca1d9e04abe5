"""Kill -9 in the middle of a save, again and again; prints what each kill left. Started by ``test_checkpoints.py``.

python kill_saves.py FOLDER KILLS
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from cheapertraining.distributed.checkpoints import ShardedWriter, checkpoint_kind, load_sharded, read_rest

WIDTH = 300


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(WIDTH, WIDTH)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def restored(folder: Path) -> int:
    """The number of the newest checkpoint that has its name, after looking at everything in it; 0 without any."""
    found = sorted(folder.glob("ba*"), key=lambda each: int(each.name[2:]))
    if not found:
        return 0
    newest = found[-1]
    number = int(newest.name[2:])
    assert checkpoint_kind(newest) == "sharded"
    model, optimizer = make()
    load_sharded(newest, model, optimizer)
    assert all(bool((parameter == number).all()) for parameter in model.parameters())
    assert read_rest(newest)["state"] == {"batch": number}
    return number


def save_for_ever(folder: Path, background: bool) -> None:
    """Go on from the newest checkpoint; weights are the number of the save."""
    model, optimizer = make()
    number, writer = restored(folder), ShardedWriter(background)
    while True:
        number += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(number))
        writer.wait()
        rest = {"state": {"batch": number}, "rng": []}
        writer.save(folder / f"ba{number}", model, optimizer, rest, lambda folder: None)


def main(folder: Path, kills: int) -> None:
    rng, torn = random.Random(0), 0
    folder.mkdir()
    for turn in range(kills):
        before = restored(folder)
        child = os.fork()
        if child == 0:
            save_for_ever(folder, background=turn % 2 == 1)
        while not list(folder.glob(f"ba{before + 1}")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list(folder.glob(".unfinished-*")))
        assert restored(folder) > before
    print(f"{kills} kills, {torn} in the middle of a save, {restored(folder)} checkpoints")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
