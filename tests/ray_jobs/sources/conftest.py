"""Images to put into sources, and a server to put them on."""

import io
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from tests.ray_jobs.s3_server import CREDENTIALS, Server, s3_server


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """A function from a number to a small PNG of its own colour."""

    def make(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number % 256, number // 256, 90)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An S3 server with an empty bucket, and credentials for it."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as made:
        yield made
