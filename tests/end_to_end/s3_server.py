"""An S3 server on loopback that speaks the real protocol, and a line to it that can be cut."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["CuttingProxy", "S3Server", "s3_server"]

BUCKET = "shards"
_START = "import sys; from moto.server import main; main(sys.argv[1:])"


class S3Server:
    """A running server with one bucket, ``shards``; clients find it through the environment.

    Attributes:
        url: where it listens.
        client: boto3's client of it.
    """

    def __init__(self, url: str, log: Path) -> None:
        import boto3

        self.url = url
        self._log = log
        self.client: Any = boto3.client("s3", endpoint_url=url)
        self.client.create_bucket(Bucket=BUCKET)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Upload all files below a folder; returns the address of their root."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder).as_posix()}")
        return f"s3://{BUCKET}/{prefix}"

    def get_folder(self, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix, by name."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key[len(prefix) + 1 :]: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def downloads(self, prefix: str) -> Counter[str]:
        """How often each object below a prefix has been asked for."""
        found = re.findall(rf'"GET /{BUCKET}/{prefix}/(\S+) HTTP', self._log.read_text(encoding="utf-8"))
        return Counter(found)

    @contextmanager
    def refusing(self, after: int = 0) -> Iterator[None]:
        """Answer requests with 403 meanwhile, but for the first ``after``: the server then knows no such key."""
        self._allow(f"{after}")
        try:
            yield
        finally:
            self._allow("inf")

    def _allow(self, requests: str) -> None:
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", requests.encode(), method="POST")
        request.add_header("Content-Type", "application/octet-stream")
        urllib.request.urlopen(request).close()


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server, and point this process and its children to it; its log is written in ``folder``."""
    log = folder / "s3.log"
    command = [sys.executable, "-c", _START, "-H", "127.0.0.1", "-p", "0"]
    with log.open("w") as handle, pytest.MonkeyPatch.context() as environment:
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT)
        try:
            url = _wait_for_url(process, log)
            environment.setenv("S3_ENDPOINT_URL", url)
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                environment.setenv(name, "test")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            environment.delenv("AWS_SESSION_TOKEN", raising=False)
            yield S3Server(url, log)
        finally:
            process.terminate()
            process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        if found := re.search(r"Running on (http://\S+)", log.read_text(encoding="utf-8")):
            return found.group(1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break
    raise AssertionError(log.read_text(encoding="utf-8"))


class CuttingProxy:
    """A TCP proxy that breaks off connections in the middle of an answer.

    Args:
        target: URL of the server.
        after: bytes of answers that a connection lets through before it is cut.
        times: connections to cut; those after them are let be. May be set at any time.

    Attributes:
        url: to be used instead of the server's.
        cut: connections cut so far.
    """

    def __init__(self, target: str, after: int, times: int) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._after = after
        self.times = times
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.times > 0 and passed + len(data) > self._after:
                    self.times -= 1
                    self.cut += 1
                    client.sendall(data[: max(0, self._after - passed)])
                    break
                client.sendall(data)
                passed += len(data)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
