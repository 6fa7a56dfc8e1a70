"""Images to put into sources."""

import io
from collections.abc import Callable

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """A function from a number to a small PNG of its own colour."""

    def make(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number % 256, number // 256, 90)).save(buffer, "PNG")
        return buffer.getvalue()

    return make
