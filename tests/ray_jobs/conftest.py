"""What the tests of jobs share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ray_jobs.s3_server import Server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Server]":
    """An S3 server with an empty bucket, and credentials for it."""
    from tests.ray_jobs.s3_server import CREDENTIALS, s3_server  # which takes a second

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as made:
        yield made
