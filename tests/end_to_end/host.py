"""``train.py`` as on a machine of its own: ``host.py NAMESPACES DEVICE MASTER_ADDR CACHES SEEN_AS yaml key=value …``

Rank ``r`` enters the ``r``-th of the network namespaces (separated by commas), and sees at SEEN_AS the ``r``-th of the
folders CACHES, and at /dev/shm nothing of the others.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter(namespace: str, cache: str, seen_as: str) -> None:
    """Leave the machine's network and mounts for those of a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    _checked(libc.setns(handle, CLONE_NEWNET))
    _checked(libc.unshare(CLONE_NEWNS))
    for command in (
        ["mount", "--make-rprivate", "/"],
        ["mount", "--bind", cache, seen_as],
        ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
    ):
        subprocess.run(command, check=True)


if __name__ == "__main__":
    namespaces, device, address, caches, seen_as, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    enter(namespaces.split(",")[rank], caches.split(",")[rank], seen_as)
    own = {"MASTER_ADDR": address, "NODE_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {**own, "GLOO_SOCKET_IFNAME": device}
    train = Path(__file__).parents[2] / "train.py"
    sys.argv = [str(train), *arguments]
    sys.path.insert(0, str(train.parent))
    runpy.run_path(str(train), run_name="__main__")
