"""Downloads that appear whole, checked, or not at all, and that fail with one line that names the source and address.

Streaming downloads shards under their final names and looks at them afterwards, if at all: what a full disk, a cut
connection or a kill leaves there is taken for the shard from then on.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.format.base.reader import FileInfo
from streaming.base.hashing import get_hash, is_hash
from streaming.base.storage.download import CloudDownloader

from cheapertraining.errors import UserError

__all__ = ["ShardStream", "download", "download_beside", "downloader_of", "is_final", "reason_of"]

_PART = ".part"
_LONGEST_WAIT = 30.0  # seconds
_DOWNLOAD_SECONDS = 60.0
_NO_USE_TO_RETRY = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT)


class _WrongContent(Exception):
    """What was downloaded is not what the index names."""


class ShardStream(Stream):
    """A Stream of one shard folder whose downloads are checked before they get their names.

    Args:
        name: of the source and split, for messages.
        remote: address of the folder; None where ``local`` is all there is.
        local: the folder, or the cache of ``remote``.
        download_retry: attempts a download gets after the first.
        validate_hash: algorithm of the digests in the index that downloads are compared with; sizes always are.
    """

    def __init__(self, name: str, remote: str | None, local: Path, download_retry: int, validate_hash: str | None):
        downloader_of(name, remote)  # refuses what no downloader is for
        super().__init__(remote=remote, local=str(local), download_timeout=_DOWNLOAD_SECONDS)
        if validate_hash is not None and not is_hash(validate_hash):
            raise UserError(f"data.validate_hash: '{validate_hash}' is not known. Use one of those of index.json.")
        self.name = name
        self._retry = download_retry
        self._hash = validate_hash
        self._files: dict[str, FileInfo] = {}

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """The readers of the index, which is downloaded where it is not there.

        Raises:
            UserError: it cannot be downloaded, or has no digests of the algorithm asked for.
        """
        if world.is_local_leader and self.remote is not None:
            for leftover in Path(self.local).glob(f".*{_PART}*"):  # of a download that was killed
                leftover.unlink(missing_ok=True)
        shards = super().get_shards(world, allow_unsafe_types)
        pairs = [pair for shard in shards for pair in shard.file_pairs]
        self._files = {info.basename: info for pair in pairs for info in pair if info is not None}
        if self._hash is not None and self.remote is not None:
            for raw, zipped in pairs:
                if self._hash not in (has := (zipped or raw).hashes):
                    raise UserError(
                        f"data.validate_hash: the shards of '{self.name}' ({self.remote}) have no {self._hash}, but "
                        f"{', '.join(sorted(has)) or 'no hash at all'}. Use one they have, or set it to null."
                    )
        return shards

    def prepare_shard(self, shard: Any) -> int:
        """Download and decompress a shard where that is to do; returns the change of disk use in bytes.

        Raises:
            UserError: it cannot be downloaded, or does not decompress.
        """
        try:
            return super().prepare_shard(shard)
        except UserError:
            raise
        except Exception as error:  # every compression library raises its own kinds
            for _, zipped in shard.file_pairs:
                if zipped is not None and self.remote is not None:
                    Path(self.local, zipped.basename).unlink(missing_ok=True)
            name = (shard.file_pairs[0][1] or shard.file_pairs[0][0]).basename
            raise UserError(
                f"shards of '{self.name}': {_join(self.remote or self.local, name)} cannot be unpacked in {self.local} "
                f"({reason_of(error)}). Check the free space; if there is enough, make this shard anew."
            ) from error

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """What Streaming calls to bring one file; see :func:`download`."""
        target = Path(self.local, to_basename or from_basename)
        if self.remote is not None:
            info = self._files.get(from_basename)
            download(
                self._downloader,
                _join(self.remote, from_basename),
                target,
                name=self.name,
                retry=self._retry,
                check=lambda file: None if info is None else self._check(file, info),
            )
        return str(target)

    def _check(self, file: Path, info: FileInfo) -> None:
        if (found := file.stat().st_size) != info.bytes:
            raise _WrongContent(f"expected {info.bytes} bytes, got {found}")
        if self._hash is not None and self._hash in info.hashes:
            found_hash = get_hash(self._hash, file.read_bytes())
            if found_hash != info.hashes[self._hash]:
                raise _WrongContent(f"expected {self._hash} {info.hashes[self._hash]}, got {found_hash}")


def downloader_of(name: str, remote: str | None) -> CloudDownloader:
    """Streaming's downloader for an address.

    Raises:
        UserError: Streaming knows no such address, or the package of that store is not installed.
    """
    try:
        return CloudDownloader.get(remote)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"shards of '{name}': {remote} cannot be read from ({reason_of(error)}). Give an address such as "
            "s3://bucket/folder; other stores than S3 need their packages (see mosaicml-streaming's extras)."
        ) from error


def download(
    downloader: CloudDownloader,
    remote: str,
    target: Path,
    *,
    name: str,
    retry: int,
    check: Callable[[Path], None] = lambda file: None,
) -> None:
    """Bring one file, which appears whole or not at all; nothing where it is there already.

    Args:
        downloader: of the address's kind.
        remote: address of the file.
        target: where it is to lie.
        name: of the source and split, for the message.
        retry: attempts after the first; a refusal (no such bucket, no permission, disk full) is final at once.
        check: raises where the content is not what it should be.

    Raises:
        UserError: naming source and address.
    """
    if target.is_file():
        return
    part = target.with_name(f".{target.name}.{os.getpid()}{_PART}")
    for attempt in range(retry + 1):
        try:
            part.unlink(missing_ok=True)
            downloader.download(remote, str(part), _DOWNLOAD_SECONDS)
            check(part)
            part.replace(target)
            return
        except Exception as error:  # every storage client raises its own kinds
            downloader.clean_up()
            part.unlink(missing_ok=True)
            ending = not threading.main_thread().is_alive()  # the interpreter waits for this thread alone
            if attempt == retry or is_final(error) or ending:
                tried = f", {attempt + 1} attempts" if attempt else ""
                raise UserError(
                    f"shards of '{name}': cannot read {remote}{_endpoint(remote)} ({reason_of(error)}{tried}). "
                    f"{_advice(error, target)}"
                ) from error
        time.sleep(min(_LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1))


def download_beside(name: str, remote: str, local: Path, files: Sequence[str], retry: int) -> None:
    """Bring small files of a shard folder; see :func:`download`."""
    local.mkdir(parents=True, exist_ok=True)
    downloader = downloader_of(name, remote)
    for file in files:
        download(downloader, _join(remote, file), local / file, name=name, retry=retry)
    downloader.clean_up()


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line without an end."""
    error = getattr(error, "last_exception", error)  # what lies behind an S3 client's "max retries exceeded"
    if code := _status(error):
        return f"{code} {getattr(error, 'response', {}).get('Error', {}).get('Message', '')}".strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    if isinstance(error, _WrongContent):
        return lines[0]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _status(error: BaseException) -> int | None:
    """The HTTP status with which an S3 server answered, if one did."""
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return status if isinstance(status, int) else None


def is_final(error: BaseException) -> bool:
    """Whether there is no use in trying again: the store refuses, or the disk is full or forbidden."""
    if (status := _status(error)) is not None:
        return 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, OSError):
        return error.errno in _NO_USE_TO_RETRY
    return "Credentials" in type(error).__name__


def _advice(error: BaseException, target: Path) -> str:
    if isinstance(error, OSError) and error.errno in _NO_USE_TO_RETRY:
        return f"Check the free space and the permissions of {target.parent}."
    if isinstance(error, _WrongContent):
        return f"Copy or make this file again; if the remote shards were made anew, remove {target.parent}."
    return "Check the address, the credentials and the network."


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _endpoint(remote: str) -> str:
    """The server where S3 is not Amazon's."""
    url = os.environ.get("S3_ENDPOINT_URL")
    return f" at {url}" if url and remote.startswith("s3://") else ""
