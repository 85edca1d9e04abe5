"""Where shards go: a local folder, or whatever object store Streaming can write to."""

from __future__ import annotations

import os
import shutil
import time
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cheapertraining.errors import UserError

__all__ = ["Destination"]

_ATTEMPTS = 4


class Destination:
    """A root under which files are put by name; picklable.

    Args:
        root: a folder, or an address such as ``s3://bucket/shards/wiki``.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.is_remote = "://" in root

    def put(self, file: Path, name: str) -> None:
        """Move a finished file to ``name``; there it appears whole or not at all.

        Raises:
            UserError: it cannot be written there.
        """
        try:
            if self.is_remote:
                self._upload(file, name)
                file.unlink()
            else:
                target = Path(self.root, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        except UserError:
            raise
        except Exception as error:  # every storage client raises its own kinds
            raise self._error("cannot write", name, error) from error

    def get(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none (or where it cannot be told from that)."""
        if not self.is_remote:
            file = Path(self.root, name)
            return file.read_bytes() if file.is_file() else None
        from streaming.base.storage.download import CloudDownloader

        from cheapertraining.data.stream import is_final

        with TemporaryDirectory() as folder:
            local = Path(folder, "file")
            for attempt in range(_ATTEMPTS):
                try:
                    CloudDownloader.direct_download(f"{self.root}/{name}", str(local))
                    return local.read_bytes()
                except FileNotFoundError:
                    return None
                except Exception as error:
                    if _is_missing(error):
                        return None
                    if attempt + 1 == _ATTEMPTS or is_final(error):
                        raise self._error("cannot read", name, error) from error
                time.sleep(2.0**attempt)
        raise AssertionError("not reached")

    def names(self, prefix: str) -> list[str]:
        """Names of the files below ``prefix``, sorted.

        Raises:
            UserError: the store cannot be reached, or cannot list.
        """
        if not self.is_remote:
            root = Path(self.root)
            return sorted(file.relative_to(root).as_posix() for file in (root / prefix).rglob("*") if file.is_file())
        base = self.root.split("://", 1)[1].partition("/")[2]
        try:
            found = _uploader(self.root, os.getpid()).list_objects(f"{prefix}/")
        except Exception as error:
            raise self._error("cannot list", prefix, error) from error
        return sorted(name[len(base) :].lstrip("/") for name in found or [])

    def remove(self, prefix: str) -> None:
        """Remove a local folder; object stores keep theirs (Streaming cannot remove)."""
        if not self.is_remote:
            shutil.rmtree(Path(self.root, prefix), ignore_errors=True)

    def _upload(self, file: Path, name: str) -> None:
        uploader = _uploader(self.root, os.getpid())
        staged = Path(uploader.local, name)
        staged.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, staged)
        try:
            uploader.upload_file(name)
        finally:
            staged.unlink(missing_ok=True)

    def _error(self, what: str, name: str, error: Exception) -> UserError:
        from cheapertraining.data.stream import reason_of

        todo = "the address and the credentials" if self.is_remote else "the path, its permissions and the free space"
        return UserError(f"{self.root}: {what} {name} ({reason_of(error)}). Check {todo}; --resume goes on from here.")


@lru_cache(maxsize=4)
def _uploader(root: str, pid: int) -> Any:
    """Streaming's uploader with a staging folder of its own; ``pid`` keeps a forked process from sharing a client."""
    from streaming.base.storage.upload import CloudUploader

    try:
        return CloudUploader.get(root, keep_local=True, retry=_ATTEMPTS)
    except Exception as error:
        from cheapertraining.data.stream import reason_of

        raise UserError(
            f"{root}: cannot be opened for writing ({reason_of(error)}). Check the address and the credentials."
        ) from error


def _is_missing(error: Exception) -> bool:
    """Whether the store answered that there is no such object (Streaming overwrites what the error says)."""
    response = getattr(error, "response", {})
    return response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NoSuchBucket") or "404" in str(error)
