"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server that this process and its children find through the environment."""
    pytest.importorskip("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
